"""`blocksworld` and `blocksworld_one_shot`: PlanBench's plan generation, and new problems of the same kind to train on.

Invariant: a verdict is the simulator's, so any plan that works is correct; and no training problem equals one of the
benchmark's, nor a dev problem one for training, under any renaming of blocks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from cotree.tasks.base import Question, Split, Verdict, WorkedExample, split_of
from cotree.tasks.benchmark import Benchmark
from cotree.tasks.extract import Mode
from cotree.tasks.loading import Row, Source, load_rows, value
from cotree.tasks.plan_text import extract_plan, facts_in_words, one_shot, plan_in_words, problem_in, zero_shot
from cotree.tasks.strips import Action, Form, Problem, canonical_form, fault, optimal_plan, random_problem

_DOMAINS = ("blocksworld", "blocksworld_3")
_BLOCKS, _SIZES, _DRAWS = "abcdefg", (3, 4, 5, 6, 7), 1000
# PlanBench's problems have no more blocks, so those of six are none of its own.
_LARGEST = 5
_EXAMPLES = (
    Problem({"a": "", "b": "", "c": "b", "d": "", "e": "d", "f": ""}, {"f": "a"}),
    Problem({"a": "", "b": "a", "c": "", "d": "c", "e": "", "f": ""}, {"c": "e"}),
    Problem({"a": "", "b": "", "c": "a", "d": "", "e": "b", "f": ""}, {"a": "b", "d": "a"}),
)


def problem_of(question: Question) -> Problem:
    """The problem that a question asks."""
    problem: Problem = question.spec["problem"]
    return problem


def _pddl(plan: Sequence[Action]) -> str:
    return "\n".join(f"({' '.join(action)})" for action in plan)


def _steps(lines: Sequence[str]) -> list[Action]:
    return [tuple(line.strip("()").split()) for line in lines]


class Blocksworld(Benchmark):
    """Plans for 3 to 5 blocks, asked by PlanBench's zero-shot prompt, version 1 (`plan_text.zero_shot`).

    Zero-shot is the default because it needs the problem alone: PlanBench's one-shot prompt shows the plan of another
    test problem, and ends where a base model would write on. An item, after the rules of the game:

        As initial conditions I have that, the blue block is clear, the hand is empty, the blue block is on top of the
        red block and the red block is on the table. My goal is to have that the red block is on the table and the blue
        block is on the table. What is the plan to achieve my goal? Just give the actions in the plan.

    `unstack the blue block from on top of the red block`, `put down the blue block` is correct, in words or in PDDL: a
    plan is correct if each action's preconditions hold in turn and the goal holds at the end; it need not be short. The
    verdict's detail begins with `optimal` for a shortest plan. Strict and lenient judge alike.

    Splits `train` and `dev` are generated, 3 to 7 blocks in turn. Up to five blocks, the sizes of PlanBench, a goal
    says where every block stands, the table too, as no goal of PlanBench does: so no row equals one, even a row that
    the data at hand lacks. With the table's facts left out they still differ from every row at hand.
    """

    name = "blocksworld"
    prompt_version = "blocksworld/planbench-zero-shot-1"
    description = "PlanBench: plans to restack 3 to 5 blocks, run in a simulator; training problems are generated"
    source = Source("blocksworld.jsonl", "tasksource/planbench", "MIT", 600, ("task_1_plan_generation",), "train")
    answer_form = "text"
    generated = True

    def question(self, row: Row) -> Question:
        """A row of the local file (`init`, `goal`) or of the hub (`query`)."""
        if "init" in row:
            problem = Problem.from_atoms(row["init"], value(row, "goal"))
        else:
            problem = problem_in(value(row, "query"))
        # The hub numbers the problems of three blocks anew.
        group = "blocksworld_3" if len(problem.below) == 3 else "blocksworld"
        name = f"{group}-{row['instance_id']}" if "instance_id" in row else str(value(row, "id"))
        gold = value(row, "ground_truth_plan")
        return self._ask(name, problem, _steps(gold.splitlines() if isinstance(gold, str) else gold))

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """The benchmark's rows (split `test` or none), or generated problems that the benchmark does not have."""
        asked = self._asked(self.source)
        if split in ("train", "dev"):
            known = {canonical_form(problem_of(q)) for q in asked}
            asked = list(islice(self._new(split == "dev", known), limit))
        return self._first(asked, split, limit)

    def _rows(self, source: Source) -> list[Row]:
        return [row for row in load_rows(source, self.data) if row.get("domain", "blocksworld") in _DOMAINS]

    def _new(self, dev: bool, known: set[Form]) -> Iterator[Question]:
        """Generated problems, one of each size in turn; a problem's form decides its split."""
        seen = set()
        for i in range(_DRAWS):
            for size in _SIZES:
                rng = random.Random(f"blocksworld-{size}-{i}")
                problem = random_problem(rng, rng.sample(_BLOCKS, size), whole=size <= _LARGEST)
                on = {block: under for block, under in problem.goal.items() if under}
                form, text = canonical_form(Problem(problem.below, on)), zero_shot(problem)
                if form not in known and text not in seen and (split_of(str(form)) == "dev") == dev:
                    seen.add(text)
                    yield self._ask(f"generated-{size}-{i}", problem)

    def _ask(self, name: str, problem: Problem, gold: Sequence[Action] = ()) -> Question:
        best = optimal_plan(problem)
        spec = {"problem": problem, "optimal_steps": len(best)}
        message = {"role": "user", "content": zero_shot(problem)}
        return Question(name, self.name, (message,), _pddl(gold or best), f"{len(problem.below)} blocks", spec=spec)

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Three problems of six blocks; one that is the question itself is left out."""
        return [e for e in map(_worked, _EXAMPLES) if e.question != question.messages[-1]["content"]]

    def extract(self, completion: str, finish_reason: str, mode: Mode) -> str | None:
        """The plan as PDDL lines."""
        plan = extract_plan(completion, finish_reason)
        return None if plan is None else _pddl(plan)

    def verify(self, answer: str, question: Question) -> Verdict:
        """Run a plan of PDDL lines."""
        plan = _steps(answer.splitlines())
        reason = fault(problem_of(question), plan)
        if reason is not None:
            return Verdict("wrong", 0.0, answer, reason)
        best = question.spec["optimal_steps"]
        told = f"optimal, {best} steps" if len(plan) == best else f"{len(plan)} steps, {best} would do"
        return Verdict("correct", 1.0, answer, told)

    def same_answer(self, left: str, right: str, question: Question) -> bool:
        """Two plans are one when their actions are."""
        return left == right


class BlocksworldOneShot(Blocksworld):
    """The questions and the rule of `blocksworld`, by PlanBench's one-shot prompt, version 1.

    The problem of the number before shows its plan. For base models, and to compare with PlanBench's one-shot results.
    Where that problem is not in the data (it never is for generated ones), one of six blocks takes its place.
    """

    name = "blocksworld_one_shot"
    prompt_version = "blocksworld/planbench-one-shot-1"
    description = "the same with a solved problem in the prompt, as PlanBench's one-shot results have it"

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """As `blocksworld`."""
        solved = {question.id: question for question in super().questions()}
        asked = []
        for question in super().questions(split, limit):
            group, _, number = question.id.rpartition("-")
            before = solved.get(f"{group}-{int(number) - 1}") if number.isdecimal() else None
            example = problem_of(before) if before else _EXAMPLES[0]
            plan = _steps(before.gold.splitlines()) if before else optimal_plan(example)
            message = {"role": "user", "content": one_shot(problem_of(question), example, plan)}
            asked.append(replace(question, messages=(message,)))
        return asked


def _worked(problem: Problem) -> WorkedExample:
    """A problem with its shortest plan, thought by thought."""
    plan, goal = plan_in_words(optimal_plan(problem)), facts_in_words(problem.goal_atoms())
    towers = facts_in_words([atom for atom in problem.init_atoms() if atom.startswith("on ")])
    thoughts = {
        "sub_task": f"I see which blocks are in the way of the goal that {goal}.",
        "thinking": f"At first {towers}, so I {', then '.join(plan)}.",
        "double_check": f"Each block that I move is clear, and in the end {goal}, so the plan is right.",
    }
    return WorkedExample(zero_shot(problem), thoughts, "\n".join(plan))
