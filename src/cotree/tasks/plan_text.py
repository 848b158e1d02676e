"""Blocksworld in words: PlanBench's prompts from a problem, and a plan from whatever a model wrote.

The templates, the colours and the order of facts are PlanBench's: Valmeekam et al., NeurIPS 2023, arXiv 2206.10498,
https://github.com/karthikv792/LLMs-Planning, MIT License, Copyright (c) 2023 Karthik Valmeekam.

Invariant: extraction reads a text once, in time linear in its length, and knows nothing of the problem, so a plan with
an impossible action or an unknown block is still a plan, for the simulator to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cotree.tasks.extract import ANSWER_TAG, after_thinking, spoken
from cotree.tasks.strips import TABLE, Action, Problem

_NAMES = "red blue orange yellow white magenta black cyan green violet silver gold"
COLOURS = dict(zip("abcdefghijkl", _NAMES.split(), strict=True))
_LETTERS = {colour: letter for letter, colour in COLOURS.items()}
_DOMAIN = """\
I am playing with a set of blocks where I need to arrange the blocks into stacks. Here are the actions I can do

Pick up a block
Unstack a block from on top of another block
Put down a block
Stack a block on top of another block

I have the following restrictions on my actions:
I can only pick up or unstack one block at a time.
I can only pick up or unstack a block if my hand is empty.
I can only pick up a block if the block is on the table and the block is clear. A block is clear if the block has no \
other blocks on top of it and if the block is not picked up.
I can only unstack a block from on top of another block if the block I am unstacking was really on top of the other \
block.
I can only unstack a block from on top of another block if the block I am unstacking is clear.
Once I pick up or unstack a block, I am holding the block.
I can only put down a block that I am holding.
I can only stack a block on top of another block if I am holding the block being stacked.
I can only stack a block on top of another block if the block onto which I am stacking the block is clear.
Once I put down or stack a block, my hand becomes empty.
Once you stack a block on top of a second block, the second block is no longer clear.

"""
_WORDS = {
    "clear": "the {} block is clear",
    "handempty": "the hand is empty",
    "on": "the {} block is on top of the {} block",
    "ontable": "the {} block is on the table",
    "pick-up": "pick up the {} block",
    "put-down": "put down the {} block",
    "stack": "stack the {} block on top of the {} block",
    "unstack": "unstack the {} block from on top of the {} block",
}
_FACT = re.compile(r"the (\w+) block is (?:on top of the (\w+) block|on the table)")

# One action with what may stand before it in its line. A name is a colour, a letter, "it", or "the ANYTHING block".
_BLOCK = (
    rf"(?:the[ \t]+)?(?:block[ \t]+)?((?:{'|'.join(_LETTERS)}|it|[a-l](?![ \t]+block))\b|(?<=the )\w++(?= block\b))"
    r"(?:[ \t]+block\b)?"
)
_ACTION = (
    r"[^\w\n]*+(?:(?:step|action|plan|so|the|answer|is|boxed|first|then|next|now|finally|and|i|(\d++))\b[^\w\n]*+)*+"
    rf"(pick|put|place|unstack|stack)(?:[ \t-]*(?:up|down)\b)?[ \t(\[:]+{_BLOCK}(?:[ \t]+(?:up|down)\b)?"
    r"(?:(?:[ \t]*\([^()\n]*\))?[ \t,\])]*(?:(?:from|off|on|onto|upon|top|of|to|over|the)\b[ \t\[(]*)*+"
    rf"(?:{_BLOCK}|table\b))?"
)
_LINE = re.compile(f"^{_ACTION}", re.MULTILINE)
_NEXT = re.compile(rf"(?=\)[ \t]*\(|\)?[ \t]*(?:[,;.\d]|->|and\b|then\b)){_ACTION}")
_HEADING = re.compile(r"\b(?:plan|actions|steps|answer|solution|plan is|follows)[^\w\n.!?]*$", re.MULTILINE)
_VERBS = {"pick": "pick-up", "put": "put-down", "place": "put-down"}


def plan_in_words(plan: Sequence[Action]) -> list[str]:
    """A plan's actions (`("stack", "a", "b")`), or atoms in the same form, as PlanBench words them."""
    return [_WORDS[name].format(*(COLOURS[block] for block in blocks)) for name, *blocks in plan]


def facts_in_words(atoms: Sequence[str]) -> str:
    """Atoms (`on a b`) as one enumeration."""
    *most, last = plan_in_words([tuple(atom.split()) for atom in atoms])
    return f"{', '.join(most)} and {last}" if most else last


def statement(problem: Problem) -> str:
    """The first state and the goal in words."""
    init, goal = facts_in_words(problem.init_atoms()), facts_in_words(problem.goal_atoms())
    return f"[STATEMENT]\nAs initial conditions I have that, {init}.\nMy goal is to have that {goal}.\n\n"


def zero_shot(problem: Problem) -> str:
    """PlanBench's zero-shot prompt."""
    return f"{_DOMAIN}{statement(problem)}What is the plan to achieve my goal? Just give the actions in the plan."


def one_shot(problem: Problem, example: Problem, plan: Sequence[Action]) -> str:
    """PlanBench's one-shot prompt: a solved problem goes before; the model writes on after `[PLAN]`."""
    newline, asked = "\n", "My plan is as follows:\n\n[PLAN]\n"
    shown = f"{statement(example)}{asked}{newline.join(plan_in_words(plan))}\n[PLAN END]\n\n"
    return f"{_DOMAIN}{shown}{statement(problem)}{asked}".rstrip("\n")


def problem_in(prompt: str) -> Problem:
    """The problem that a PlanBench prompt ends with."""
    init, _, goal = prompt.rpartition("[STATEMENT]")[2].partition("My goal")
    return Problem(_stated(init), _stated(goal))


def _stated(facts: str) -> dict[str, str]:
    return {_LETTERS[block]: _LETTERS[under] if under else TABLE for block, under in _FACT.findall(facts)}


def extract_plan(completion: str, finish_reason: str = "stop") -> list[Action] | None:
    """The plan that a completion commits to, or None where it has none.

    What counts is the text after thinking and after the answer tag, up to the first `[PLAN END]`. Actions stand at the
    beginning of a line (after a number, a bullet, "Step 1:" ...) or right after another one, in PDDL or in words. Of
    several lists the last one is the plan: a list begins where numbers start again or a heading ("Final plan:") stands.
    A completion cut by length has a plan only if `[PLAN END]` closed it.
    """
    # Looking for the tag by a pattern costs a fifth of a verdict, and most texts have none.
    text = spoken(completion) if ANSWER_TAG in completion else after_thinking(completion) or ""
    text = text.lower().replace("*", "").replace("`", "").replace("_", " ")
    text, closed, _ = text.partition("[plan end]")
    if finish_reason == "length" and not closed:
        return None
    text = text.rpartition("[plan]")[2] if closed else text.partition("[statement]")[0]
    plan: list[Action] = []
    end, last = 0, None
    for line in _LINE.finditer(text):
        number, verb, block, under = line.groups()
        if plan and ((number == "1" and last != "1") or _HEADING.search(text, end, line.start())):
            plan = []
        elif plan and last and not number:
            # Below a numbered step stands what explains it.
            end = line.end()
            continue
        last = number
        while True:
            blocks = [
                plan[-1][1] if name == "it" and plan else _LETTERS.get(name, name) for name in (block, under) if name
            ]
            name = "stack" if verb in ("put", "place") and len(blocks) == 2 else _VERBS.get(verb, verb)
            plan.append((name, *blocks))
            end = line.end()
            following = _NEXT.match(text, end)
            if following is None:
                break
            line, (_, verb, block, under) = following, following.groups()
    return plan or None
