"""`blocksworld` and `blocksworld_one_shot`: PlanBench's plan generation, with generated problems for training.

Invariant: under any renaming of blocks, no training problem equals a benchmark problem, and no dev problem a training
problem. Plans are verified by simulation, so any valid plan is correct.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from cotree.base.rows import Row
from cotree.tasks.base import Question, Split, Verdict, WorkedExample, split_of, user_prompt, without_question
from cotree.tasks.benchmark import Benchmark
from cotree.tasks.extract import ExtractionMode
from cotree.tasks.loading import Source, field_value
from cotree.tasks.plan_text import extract_plan, facts_in_words, one_shot, parse_problem, plan_in_words, zero_shot
from cotree.tasks.strips import Action, CanonicalForm, Problem, canonical_form, optimal_plan, plan_error, random_problem

_BLOCKS, _SIZES, _DRAWS = "abcdefg", (3, 4, 5, 6, 7), 1000
# PlanBench's problems have at most this many blocks, so worked examples with six cannot be among them.
_MAX_BENCHMARK_SIZE = 5
_EXAMPLE_PROBLEMS = (
    Problem({"a": "", "b": "", "c": "b", "d": "", "e": "d", "f": ""}, {"f": "a"}),
    Problem({"a": "", "b": "a", "c": "", "d": "c", "e": "", "f": ""}, {"c": "e"}),
    Problem({"a": "", "b": "", "c": "a", "d": "", "e": "b", "f": ""}, {"a": "b", "d": "a"}),
)


def problem_of(question: Question) -> Problem:
    """The planning problem of a question of these tasks."""
    problem: Problem = question.spec["problem"]
    return problem


def _write_pddl(plan: Sequence[Action]) -> str:
    return "\n".join(f"({' '.join(action)})" for action in plan)


def _parse_pddl(text: str) -> list[Action]:
    return [tuple(line.strip("()").split()) for line in text.splitlines()]


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
    waits = False
    source = Source("blocksworld.jsonl", "tasksource/planbench", "MIT", 600, ("task_1_plan_generation",), "train")
    answer_form = "text"
    generated = True

    def question(self, row: Row) -> Question | None:
        """Parse the question from the prompt (`query`, `prompt_zero_shot`) of a row of the hub or of the local file."""
        # The hub also has logistics and obfuscated problems.
        if row.get("domain") not in (None, "blocksworld", "blocksworld_3"):
            return None
        problem = parse_problem(field_value(row, "query", "prompt_zero_shot"))
        # The hub restarts numbering for problems of three blocks.
        group = "blocksworld_3" if len(problem.below) == 3 else "blocksworld"
        id_ = f"{group}-{row['instance_id']}" if "instance_id" in row else str(field_value(row, "id"))
        gold = field_value(row, "ground_truth_plan")
        return self._question(id_, problem, _parse_pddl(gold if isinstance(gold, str) else "\n".join(gold)))

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """The benchmark's rows (split `test` or none), or generated problems that the benchmark does not have."""
        questions = self._read_questions(self.source)
        if split in ("train", "dev"):
            known = {canonical_form(problem_of(question)) for question in questions}
            questions = list(islice(self._generate(split, known), limit))
        return self._first(questions, split, limit)

    def _generate(self, split: Split, known: Collection[CanonicalForm]) -> Iterator[Question]:
        """Generate problems of a split, cycling through the sizes, without `known` ones; the canonical form decides the
        split."""
        seen = set()
        for i in range(_DRAWS):
            for size in _SIZES:
                rng = random.Random(f"blocksworld-{size}-{i}")
                problem = random_problem(rng, rng.sample(_BLOCKS, size), complete_goal=size <= _MAX_BENCHMARK_SIZE)
                stacked = {block: under for block, under in problem.goal.items() if under}
                form, text = canonical_form(Problem(problem.below, stacked)), zero_shot(problem)
                if form not in known and text not in seen and (split_of(str(form)) == "dev") == (split == "dev"):
                    seen.add(text)
                    yield self._question(f"generated-{size}-{i}", problem)

    def _question(self, id_: str, problem: Problem, gold: Sequence[Action] = ()) -> Question:
        """Make the question of a problem; the gold defaults to a shortest plan."""
        shortest = optimal_plan(problem)
        spec = {"problem": problem, "optimal_steps": len(shortest)}
        prompt, family = user_prompt(zero_shot(problem)), f"{len(problem.below)} blocks"
        return Question(id_, self.name, prompt, _write_pddl(gold or shortest), family=family, spec=spec)

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Three problems of six blocks with their shortest plans."""
        return without_question(map(_worked_example, _EXAMPLE_PROBLEMS), question)

    def extract(self, completion: str, finish_reason: str, mode: ExtractionMode) -> str | None:
        """The plan as PDDL lines, in either mode."""
        plan = extract_plan(completion, finish_reason)
        return None if plan is None else _write_pddl(plan)

    def verify(self, answer: str, question: Question) -> Verdict:
        """Run a plan of PDDL lines in the simulator. `detail`: why it fails, or how its length compares."""
        plan, shortest = _parse_pddl(answer), question.spec["optimal_steps"]
        error = plan_error(problem_of(question), plan)
        length = f"optimal, {shortest} steps" if len(plan) == shortest else f"{len(plan)} steps, {shortest} would do"
        return Verdict.of(error is None, answer, error or length)

    def same_answer(self, left: str, right: str, question: Question) -> bool:
        """Whether two plans have the same actions."""
        return left == right


class BlocksworldOneShot(Blocksworld):
    """The questions and the rule of `blocksworld`, by PlanBench's one-shot prompt, version 1.

    The example is the problem with the previous number, or one with six blocks if that is not in the data (as for
    generated problems). For base models, and for comparison with PlanBench's one-shot results.
    """

    name = "blocksworld_one_shot"
    prompt_version = "blocksworld/planbench-one-shot-1"
    description = "the same with a solved problem in the prompt, as PlanBench's one-shot results have it"

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """As `blocksworld`."""
        benchmark = {question.id: question for question in super().questions()}
        questions = []
        for question in super().questions(split, limit):
            group, _, number = question.id.rpartition("-")
            before = benchmark.get(f"{group}-{int(number) - 1}") if number.isdecimal() else None
            example = problem_of(before) if before else _EXAMPLE_PROBLEMS[0]
            plan = _parse_pddl(before.gold) if before else optimal_plan(example)
            prompt = user_prompt(one_shot(problem_of(question), example, plan))
            questions.append(replace(question, messages=prompt))
        return questions


def _worked_example(problem: Problem) -> WorkedExample:
    """A worked example of a problem, with its shortest plan as thoughts."""
    plan, goal = plan_in_words(optimal_plan(problem)), facts_in_words(problem.goal_atoms())
    towers = facts_in_words([atom for atom in problem.init_atoms() if atom.startswith("on ")])
    steps = {
        "sub_task": f"I see which blocks are in the way of the goal that {goal}.",
        "thinking": f"At first {towers}, so I {', then '.join(plan)}.",
        "double_check": f"Each block that I move is clear, and in the end {goal}, so the plan is right.",
    }
    return WorkedExample(zero_shot(problem), steps, "\n".join(plan))
