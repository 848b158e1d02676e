"""Blocksworld in text: render PlanBench's prompts from a problem, and extract plans from model output.

The templates, the colours (`planbench.yaml`) and the order of facts are PlanBench's.

Invariant: extraction takes linear time and does not use the problem, so a plan with an impossible action or an unknown
block is extracted, and refused by the simulator.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cotree.tasks.extract import ANSWER_TAG, after_thinking, visible_text
from cotree.tasks.loading import packaged_yaml
from cotree.tasks.strips import TABLE, Action, Problem

_PLANBENCH = packaged_yaml("planbench.yaml")
COLOUR_OF: dict[str, str] = dict(zip("abcdefghijkl", _PLANBENCH["colours"], strict=True))
_LETTER_OF = {colour: letter for letter, colour in COLOUR_OF.items()}
_FACT = re.compile(r"the (\w+) block is (?:on top of the (\w+) block|on the table)")

# An action in PDDL or in words, with an optional line prefix; groups: step number, verb, two blocks. A block is a
# colour, a letter, "it", or "the ANYTHING block".
_BLOCK = (
    rf"(?:the[ \t]+)?(?:block[ \t]+)?((?:{'|'.join(_LETTER_OF)}|it|[a-l](?![ \t]+block))\b|(?<=the )\w++(?= block\b))"
    r"(?:[ \t]+block\b)?"
)
_ACTION = (
    r"[^\w\n]*+(?:(?:step|action|plan|so|the|answer|is|boxed|first|then|next|now|finally|and|i|(\d++))\b[^\w\n]*+)*+"
    rf"(pick|put|place|unstack|stack)(?:[ \t-]*(?:up|down)\b)?[ \t(\[:]+{_BLOCK}(?:[ \t]+(?:up|down)\b)?"
    r"(?:(?:[ \t]*\([^()\n]*\))?[ \t,\])]*(?:(?:from|off|on|onto|upon|top|of|to|over|the)\b[ \t\[(]*)*+"
    rf"(?:{_BLOCK}|table\b))?"
)
_ACTION_LINE = re.compile(f"^{_ACTION}", re.MULTILINE)
_NEXT_ACTION = re.compile(rf"(?=\)[ \t]*\(|\)?[ \t]*(?:[,;.\d]|->|and\b|then\b)){_ACTION}")
_HEADING = re.compile(r"\b(?:plan|actions|steps|answer|solution|plan is|follows)[^\w\n.!?]*$", re.MULTILINE)
_VERBS = {"pick": "pick-up", "put": "put-down", "place": "put-down"}


def plan_in_words(plan: Sequence[Action]) -> list[str]:
    """Render a plan's actions (`("stack", "a", "b")`), or atoms in the same form, in PlanBench's wording."""
    return [_PLANBENCH["sentences"][name].format(*(COLOUR_OF[block] for block in blocks)) for name, *blocks in plan]


def facts_in_words(atoms: Sequence[str]) -> str:
    """Render atoms (`on a b`) as one enumeration, "..., ... and ..."."""
    *most, last = plan_in_words([tuple(atom.split()) for atom in atoms])
    return f"{', '.join(most)} and {last}" if most else last


def zero_shot(problem: Problem) -> str:
    """PlanBench's zero-shot prompt."""
    question = "What is the plan to achieve my goal? Just give the actions in the plan."
    return f"{_PLANBENCH['rules']}\n{_statement(problem)}{question}"


def one_shot(problem: Problem, example: Problem, plan: Sequence[Action]) -> str:
    """PlanBench's one-shot prompt: `example` and its `plan`, then the problem; the model continues after `[PLAN]`."""
    request, steps = "My plan is as follows:\n\n[PLAN]\n", "\n".join(plan_in_words(plan))
    solved = f"{_statement(example)}{request}{steps}\n[PLAN END]\n\n"
    return f"{_PLANBENCH['rules']}\n{solved}{_statement(problem)}{request}".rstrip("\n")


def _statement(problem: Problem) -> str:
    """The initial state and the goal in words."""
    init, goal = facts_in_words(problem.init_atoms()), facts_in_words(problem.goal_atoms())
    return f"[STATEMENT]\nAs initial conditions I have that, {init}.\nMy goal is to have that {goal}.\n\n"


def parse_problem(prompt: str) -> Problem:
    """Parse the problem at the end of a PlanBench prompt."""
    init, _, goal = prompt.rpartition("[STATEMENT]")[2].partition("My goal")
    return Problem(_parse_facts(init), _parse_facts(goal))


def _parse_facts(facts: str) -> dict[str, str]:
    """{block: what it stands on}, as far as these facts tell."""
    found = {_LETTER_OF[block]: _LETTER_OF[under] if under else TABLE for block, under in _FACT.findall(facts)}
    return dict(sorted(found.items()))


def extract_plan(completion: str, finish_reason: str = "stop") -> list[Action] | None:
    """Extract the plan of a completion, or None.

    Reads the text after thinking and the answer tag, up to the first `[PLAN END]`. Actions are at the start of a line
    (after a number, a bullet, "Step 1:" ...) or right after another action, in PDDL or in words. The last of several
    lists is the plan; a list starts where numbering restarts or at a heading ("Final plan:"). A completion cut by its
    token limit has a plan only if `[PLAN END]` closed it.
    """
    # Looking for the tag by a pattern takes a fifth of a verdict's time, and most texts have none.
    text = visible_text(completion) if ANSWER_TAG in completion else after_thinking(completion) or ""
    text = text.lower().replace("*", "").replace("`", "").replace("_", " ")
    text, closed, _ = text.partition("[plan end]")
    if finish_reason == "length" and not closed:
        return None
    # Without the end marker a base model writes on with the statement of another problem.
    text = text.rpartition("[plan]")[2] if closed else text.partition("[statement]")[0]
    plan: list[Action] = []
    end, last_number = 0, None
    for found in _ACTION_LINE.finditer(text):
        number = found[1]
        if plan and ((number == "1" and last_number != "1") or _HEADING.search(text, end, found.start())):
            plan = []
        elif plan and last_number and not number:
            # A line without a number, below a numbered step, explains that step.
            end = found.end()
            continue
        last_number = number
        action: re.Match[str] | None = found
        while action is not None:
            _, verb, *names = action.groups()
            blocks = [plan[-1][1] if name == "it" and plan else _LETTER_OF.get(name, name) for name in names if name]
            stacks = verb in ("put", "place") and len(blocks) == 2
            plan.append(("stack" if stacks else _VERBS.get(verb, verb), *blocks))
            end = action.end()
            action = _NEXT_ACTION.match(text, end)
    return plan or None
