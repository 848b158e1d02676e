"""What a judged leaf is worth to the search: the task's rule, a Python function, or a model that judges or scores it.

Invariant: a reward is a number in [0, 1] and never changes a verdict; a thought without an answer is worth 0 and nobody
is asked about it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from cotree.config import Reward
from cotree.errors import CotreeError, UsageError
from cotree.search.mcts import Node
from cotree.store import StoredNode
from cotree.tasks import Question, Verdict
from cotree.tasks.base import Message

# f(question, the whole chain's text, the task's verdict) -> reward; in decoding nobody knows the verdict: None
RewardFunction = Callable[[Question, str, Verdict | None], float]


@cache
def load_function(name: str) -> RewardFunction:
    """The function that `module:name` or `path/to/file.py:name` names, loaded once.

    Raises:
        UsageError: no such module, file or function; the message says which.
    """
    where, _, function = name.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except Exception as error:  # noqa: BLE001 - the user's module may raise anything
        raise UsageError(f"search.reward.function: cannot load {where}: {type(error).__name__}: {error}") from None
    found: Any = getattr(module, function, None)
    if not callable(found):
        raise UsageError(f"search.reward.function: {where} has no function `{function}`")
    return found  # type: ignore[no-any-return]


def call(function: RewardFunction, question: Question, text: str, verdict: Verdict | None) -> float:
    """The user's function, held to its contract.

    Raises:
        CotreeError: it raised, or returned something that is no number in [0, 1].
    """
    try:
        reward = float(function(question, text, verdict))
    except Exception as error:
        what = f"{type(error).__name__}: {error} (question {question.id})"
        raise CotreeError(f"search.reward.function: {what}") from error
    if not (math.isfinite(reward) and 0.0 <= reward <= 1.0):
        raise CotreeError(f"search.reward.function: {reward} for question {question.id}; a reward is in [0, 1]")
    return reward


def judge_messages(question: Question, text: str) -> list[Message]:
    """What the judge is asked; it answers by continuing `JUDGE_PREFIX`."""
    asked = "\n\n".join(message["content"] for message in question.messages if message["role"] == "user")
    content = f"Question:\n{asked}\n\nAnswer:\n{text}\n\nIs the final answer right? Reply with yes or no."
    return [{"role": "user", "content": content}]


JUDGE_PREFIX = "The final answer is right:"


def share_of_yes(replies: list[str]) -> float:
    """The judge's reward: how many of its samples begin with yes (or true)."""
    yes = [reply.strip().lower().startswith(("yes", "true")) for reply in replies]
    return sum(yes) / len(yes)


def steps_messages(question: Question, thoughts: Sequence[str], separator: str) -> tuple[tuple[str, str], ...]:
    """What a process reward model reads: the question, and the chain with `separator` after each thought."""
    asked = tuple((message["role"], message["content"]) for message in question.messages)
    # A thought that holds the separator itself is one step all the same.
    steps = [thought.replace(separator, " ") for thought in thoughts]
    return (*asked, ("assistant", "".join(f"{step}{separator}" for step in steps)))


def combined(scores: Sequence[float], steps: int, how: Literal["least", "product", "last"]) -> float:
    """One reward of the scores of a chain's steps.

    Raises:
        CotreeError: there is not one score a step.
    """
    if len(scores) != steps:
        raise CotreeError(
            f"search.reward.process: {len(scores)} scores came for {steps} thoughts; set `separator` to the model's "
            "step token, and serve it with a pooler that returns that token's score"
        )
    return {"least": min(scores), "product": math.prod(scores), "last": scores[-1]}[how]


def check_reward(reward: Reward | None) -> RewardFunction | None:
    """The user's function, loaded before any work starts; None without one."""
    return None if reward is None or reward.function is None else load_function(reward.function)


def merit(chain: Sequence[Node | StoredNode]) -> tuple[float, float]:
    """By what the chains of a tree are compared: the reward at the end, then the mean v/n on the way."""
    return chain[-1].reward or 0.0, sum(node.value / node.visits for node in chain if node.visits) / len(chain)
