"""Answer evaluation's questions by search: a `Sampler` for each way of decoding.

Invariant: a sample is a search of its own with a seed of its own, so samples are independent; its tokens are all that
the search generated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cotree.config import Search, Stop, Thought, Writer
from cotree.errors import UsageError
from cotree.eval.asking import Asked, Reply, Sampler, Sampling
from cotree.llm.client import Choice, Completion
from cotree.llm.endpoints import Endpoint
from cotree.search.calls import Calls, Progress
from cotree.search.decode import decode, settled
from cotree.tasks import Question, Task


def search_of(how: Sampling, budget_tokens: int | None, value: str | None) -> Search:
    """The search of a question.

    Raises:
        UsageError: there is no budget, nothing to draw from, or a value that evaluation does not offer.
    """
    if budget_tokens is None or how.temperature == 0:
        raise UsageError("a strategy needs --budget-tokens, and a temperature to draw with, e.g. --temperature 0.8")
    if value == "verifier":
        raise UsageError("evaluation decodes by vote or likelihood")
    return Search(
        rollouts=budget_tokens, patterns=["plain"], max_thought_tokens=min(256, how.max_tokens),
        thoughts={"answer": Thought(max_tokens=how.max_tokens)}, temperature=how.temperature, top_p=how.top_p,
        stop=Stop(tokens=budget_tokens),
    )  # fmt: skip


def searched(
    strategy: str, value: str | None, search: Search, questions: list[Asked]
) -> Callable[[Endpoint, Sampling], Sampler]:
    """The sampler of a strategy; it takes one sample a call (`Sampling.together`).

    Raises:
        UsageError: it does not go with a task's answers.
    """
    values = {task.name: settled(task, strategy, value, search) for task, _ in questions}

    def of(endpoint: Endpoint, how: Sampling) -> Sampler:
        calls, roles = Calls(None, {endpoint.name: endpoint}, Progress()), {"thinker": (Writer(model=endpoint.name),)}
        # A search has requests enough to keep a server busy; thousands at once would only wait.
        gate = asyncio.Semaphore(search.trees_in_flight)

        async def sample(task: Task, question: Question, numbers: range) -> Reply:
            (number,) = numbers
            async with gate:
                began = time.monotonic()
                best = await decode(
                    task, question, calls, roles, search,
                    strategy=strategy, value=values[task.name], seed=how.seed + number,
                )  # fmt: skip
            spent, seconds = best.spent, time.monotonic() - began
            choice = Choice(best.text, "length" if best.cut else "stop", spent.completion_tokens)
            completion = Completion(
                (choice,), spent.prompt_tokens, spent.cached_tokens, spent.completion_tokens, seconds
            )
            decoding = f"{strategy} by {values[task.name]}, {search.stop.tokens} tokens"
            return Reply(completion, decoding, best.found if strategy == "mcts" else None)

        return sample

    return of
