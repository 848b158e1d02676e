"""Blocksworld with four actions: a simulator that explains why a plan fails, an optimal solver, and random problems.

Simulator and solver follow PlanBench's `blocksworld-4ops` domain exactly: pick-up and put-down take one block, stack
and unstack two, the hand holds one block, and the goal must hold at the end of the plan.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import comb, factorial

from cotree.base.errors import UsageError

Action = tuple[str, ...]  # ("stack", "a", "b")
TABLE = ""
_HAND = "hand"
_ARITY = {"pick-up": 1, "put-down": 1, "stack": 2, "unstack": 2}
CanonicalForm = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A planning problem. below: {block: the block below it or TABLE} initially. goal: the same at the end.

    Blocks that are not in the goal may stand anywhere.
    """

    below: Mapping[str, str]
    goal: Mapping[str, str]

    def init_atoms(self) -> list[str]:
        """The full initial state, in PlanBench's order (sorted)."""
        clear = [f"clear {block}" for block in self.below if block not in self.below.values()]
        return sorted([*clear, "handempty", *_support_atoms(self.below)])

    def goal_atoms(self) -> list[str]:
        """The goal, sorted."""
        return sorted(_support_atoms(self.goal))


def _support_atoms(below: Mapping[str, str]) -> list[str]:
    return [f"on {block} {under}" if under else f"ontable {block}" for block, under in below.items()]


def plan_error(problem: Problem, plan: Sequence[Action]) -> str | None:
    """Why a plan does not solve a problem: its first impossible step, or the goals that it misses. None if it does."""
    below, held = dict(problem.below), ""
    for step, (name, *blocks) in enumerate(plan, 1):
        block, under = (*blocks, TABLE)[:2]
        takes = name in ("pick-up", "unstack")
        if len(blocks) != _ARITY[name]:
            reason = f"{name} takes {_ARITY[name]} block{'s' * (_ARITY[name] > 1)}"
        elif takes and held:
            reason = f"the hand holds {held}"
        elif takes and below.get(block) != under:
            reason = f"{block} is not on {under or 'the table'}"
        elif takes and block in below.values():
            reason = f"{block} is not clear"
        elif not takes and held != block:
            reason = f"not holding {block}"
        elif name == "stack" and (under not in below or under in below.values()):
            reason = f"{under} is not clear"
        else:
            if takes:
                held = block
                del below[block]
            else:
                below[block], held = under, ""
            continue
        return f"step {step}: ({' '.join([name, *blocks])}): {reason}"
    missed = {block: under for block, under in problem.goal.items() if below.get(block) != under}
    return f"goal not reached: {', '.join(sorted(_support_atoms(missed)))}" if missed else None


def optimal_plan(problem: Problem) -> list[Action]:
    """A shortest plan (deterministic), by A* with `_min_steps`; UsageError for an unreachable goal."""
    blocks = sorted(problem.below)
    start = tuple(problem.below[block] for block in blocks)
    done: set[tuple[str, ...]] = set()
    queue: list[tuple[int, int, tuple[str, ...], tuple[Action, ...]]] = [(0, 0, start, ())]
    while queue:
        _, _, state, plan = heappop(queue)
        if state in done:
            continue
        done.add(state)
        if problem.goal.items() <= dict(zip(blocks, state, strict=True)).items():
            return list(plan)
        for action, following in _successors(blocks, state):
            if following not in done:
                bound = len(plan) + 1 + _min_steps(blocks, following, problem.goal)
                # Break ties by the longest plan, so that the search goes straight to the goal.
                heappush(queue, (bound, -len(plan), following, (*plan, action)))
    raise UsageError(f"blocksworld goal cannot be reached: {', '.join(problem.goal_atoms())}")


def _successors(blocks: list[str], state: tuple[str, ...]) -> Iterator[tuple[Action, tuple[str, ...]]]:
    """Each possible action and the state after it; a state says what each block stands on, or that it is held."""
    held = state.index(_HAND) if _HAND in state else None
    for i, block in enumerate(blocks):
        if block in state:
            continue
        if held is None:
            action = ("pick-up", block) if state[i] == TABLE else ("unstack", block, state[i])
            yield action, (*state[:i], _HAND, *state[i + 1 :])
        elif i == held:
            yield ("put-down", block), (*state[:i], TABLE, *state[i + 1 :])
        else:
            yield ("stack", blocks[held], block), (*state[:held], block, *state[held + 1 :])


def _min_steps(blocks: list[str], state: tuple[str, ...], goal: Mapping[str, str]) -> int:
    """A lower bound of the remaining actions. It is consistent (falls by at most one per step), so A* visits no state
    twice.

    A block must move (two actions) if it is in a wrong place, in the place of another block, or above one that must
    move; a held block must be put down (one action).
    """
    below = dict(zip(blocks, state, strict=True))
    wanted_on = {under: block for block, under in goal.items() if under}
    moves: dict[str, bool] = {TABLE: False, _HAND: False}

    def must_move(block: str) -> bool:
        if block not in moves:
            under = below[block]
            wrong = goal.get(block, under) != under or wanted_on.get(under, block) != block
            moves[block] = under != _HAND and (wrong or must_move(under))
        return moves[block]

    return 2 * sum(map(must_move, blocks)) + (_HAND in state)


def canonical_form(problem: Problem) -> CanonicalForm:
    """A form independent of block names: equal for two problems exactly if a renaming of blocks makes them equal.

    Blocks are linked to what they stand on, now and in the goal, and to what stands on them: at most four neighbours,
    each of another kind, so a walk from one block numbers its connected component in exactly one way. Each component
    is coded by the smallest such numbering over the blocks to start from.
    """
    placed = (problem.below, problem.goal)
    down = [{block: under for block, under in below.items() if under} for below in placed]
    links = [*down, *({under: block for block, under in below.items()} for below in down)]
    codes: dict[str, tuple[tuple[int, ...], ...]] = {}
    groups: dict[frozenset[str], list[str]] = {}
    for start in problem.below:
        walk = [start]
        for block in walk:
            walk += dict.fromkeys(link[block] for link in links if block in link and link[block] not in walk)
        number = {block: i for i, block in enumerate(walk)} | {TABLE: -1}
        codes[start] = tuple(tuple(number[below[b]] if b in below else -2 for below in placed) for b in walk)
        groups.setdefault(frozenset(walk), []).append(start)
    return tuple(sorted(min(codes[start] for start in group) for group in groups.values()))


def random_state(rng: random.Random, blocks: Sequence[str]) -> dict[str, str]:
    """What each block stands on, uniform over all states of these blocks with an empty hand.

    k towers of n blocks can stand in C(n-1, k-1) n!/k! ways (Lah numbers): k is drawn by these weights, then a
    permutation of the blocks and the k-1 places where a new tower begins.
    """
    n = len(blocks)
    ways = [comb(n - 1, k - 1) * factorial(n) // factorial(k) for k in range(1, n + 1)]
    towers = rng.choices(range(1, n + 1), ways)[0]
    order = rng.sample(list(blocks), n)
    bottoms = {0, *rng.sample(range(1, n), towers - 1)}
    return {block: TABLE if i in bottoms else order[i - 1] for i, block in enumerate(order)}


def random_problem(rng: random.Random, blocks: Sequence[str], complete_goal: bool) -> Problem:
    """A problem with a uniformly random initial state, and another uniformly random state as its goal.

    complete_goal: the goal places every block; else, as in PlanBench, it has no facts about the table.
    """
    while True:
        below, end = random_state(rng, blocks), random_state(rng, blocks)
        problem = Problem(below, end if complete_goal else {block: under for block, under in end.items() if under})
        if not problem.goal.items() <= below.items():
            return problem
