"""Rewards from other sources than the verifier: a Python function, an LLM judge, or a process reward model.

Invariant: a reward is in [0, 1] and never changes a verdict.
"""

from __future__ import annotations

import importlib
import json
import math
import runpy
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from cotree.base.errors import CotreeError, UsageError
from cotree.models.client import Request
from cotree.search.mcts import Node
from cotree.search.settings import Writer
from cotree.search.store import StoredNode
from cotree.search.thoughts import chain_text, draw
from cotree.tasks import Question, Verdict

if TYPE_CHECKING:
    from cotree.search.growth import Growth

# f(question, the whole chain's text, the verdict) -> reward; the verdict is None in decoding
RewardFunction = Callable[[Question, str, Verdict | None], float]


@cache
def load_reward_function(name: str) -> RewardFunction:
    """Import the function named by `module:name` or `path/to/file.py:name` (cached).

    Raises:
        UsageError: no such module, file or function; the message says which.
    """
    where, _, function = name.rpartition(":")
    try:
        if where.endswith(".py"):
            found: Any = runpy.run_path(where).get(function)
        else:
            found = getattr(importlib.import_module(where), function, None)
    except Exception as error:  # noqa: BLE001 - the user's module may raise anything
        raise UsageError(f"reward.function: cannot load {where}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise UsageError(f"reward.function: {where} has no function `{function}`")
    return found  # type: ignore[no-any-return]


async def chain_reward(growth: Growth, chain: Sequence[Node], verdict: Verdict | None) -> float:
    """The reward in [0, 1] of a chain, finished or not, from the source in the settings' `reward`.

    Raises:
        CotreeError: the function raises or returns a number outside [0, 1], or step scores are missing.
    """
    settings, question = growth.settings.reward, growth.question
    assert settings is not None
    if settings.function is not None:
        return _function_reward(load_reward_function(settings.function), question, chain_text(chain), verdict)
    if settings.process is not None:
        messages = step_score_messages(question, [thought.text for thought in chain], settings.separator)
        request = Request(
            prompt="", n=1, max_tokens=1, temperature=0.0, top_p=1.0, seed=0, stop=(), messages=messages, scores=True
        )
        scored = await growth.complete(settings.process, request)
        return combine_step_scores(json.loads(scored.choices[0].text), len(chain), settings.combine)
    assert settings.judge is not None
    return await _judge_reward(growth, settings.judge, settings.samples, chain_text(chain))


def _function_reward(function: RewardFunction, question: Question, text: str, verdict: Verdict | None) -> float:
    """Call the user's reward function; an exception or a number outside [0, 1] becomes a CotreeError."""
    try:
        reward = float(function(question, text, verdict))
    except Exception as error:
        what = f"{type(error).__name__}: {error} (question {question.id})"
        raise CotreeError(f"reward.function: {what}") from error
    if not 0.0 <= reward <= 1.0:
        raise CotreeError(f"reward.function: {reward} for question {question.id}; a reward is in [0, 1]")
    return reward


async def _judge_reward(growth: Growth, judge: str, samples: int, text: str) -> float:
    """Ask the model `judge` `samples` times whether the answer is right; returns the share of yes."""
    asked = "\n\n".join(message["content"] for message in growth.question.messages if message["role"] == "user")
    content = f"Question:\n{asked}\n\nAnswer:\n{text}\n\nIs the final answer right? Reply with yes or no."
    prompt = growth.models.endpoints[judge].prompt([{"role": "user", "content": content}])
    seed = draw(f"judge:{growth.seed}/{text}", 2**31)
    words = f"{prompt.opened}The final answer is right:"
    judged = await growth.continue_text(
        Writer(model=judge), prompt, words, n=samples, max_tokens=4, seed=seed, stop=("\n",)
    )
    return fmean(choice.text.strip().lower().startswith(("yes", "true")) for choice in judged.choices)


def step_score_messages(question: Question, thoughts: Sequence[str], separator: str) -> tuple[tuple[str, str], ...]:
    """The messages sent to a process reward model: the question, then the chain with `separator` after each thought."""
    asked = tuple((message["role"], message["content"]) for message in question.messages)
    # Remove separators inside a thought, so that it stays one step.
    steps = [thought.replace(separator, " ") for thought in thoughts]
    return (*asked, ("assistant", "".join(f"{step}{separator}" for step in steps)))


def combine_step_scores(scores: Sequence[float], steps: int, combine: Literal["least", "product", "last"]) -> float:
    """Reduce the step scores of a chain to one reward in [0, 1].

    Raises:
        CotreeError: the number of scores is not the number of steps.
    """
    if len(scores) != steps:
        raise CotreeError(
            f"reward.process: {len(scores)} scores came for {steps} thoughts; set `separator` to the model's "
            "step token, and serve it with a pooler that returns that token's score"
        )
    return {"least": min(scores), "product": math.prod(scores), "last": scores[-1]}[combine]


def chain_rank_key(chain: Sequence[StoredNode]) -> tuple[float, float]:
    """Sort key for a tree's chains, best last: the leaf's reward, then the mean v/n of its thoughts."""
    return chain[-1].reward or 0.0, sum(node.value / node.visits for node in chain if node.visits) / len(chain)
