"""Answer evaluation's questions by search: a `Sampler` for each way of decoding.

Invariant: a sample is a search of its own with a seed of its own, so samples are independent; its tokens are all that
the search generated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cotree.base.errors import UsageError
from cotree.decode.strategies import decode, settled
from cotree.eval.asking import Asked, Reply, Sampler, Sampling, Strategy
from cotree.experiment.recipe import Search, Stop, Thought, Writer
from cotree.models.client import Choice
from cotree.models.endpoints import Endpoint
from cotree.search.calls import Calls, Progress
from cotree.tasks import Question, Task


def searched(
    strategy: str, value: str | None, budget_tokens: int | None, how: Sampling, questions: Sequence[Asked]
) -> tuple[Strategy, int]:
    """A strategy that takes one sample a call (`Sampling.together`), and how many samples its requests ask for.

    Raises:
        UsageError: there is no budget, nothing to draw from, or the value does not go with it or a task's answers.
    """
    if budget_tokens is None or how.temperature == 0:
        raise UsageError("a strategy needs --budget-tokens, and a temperature to draw with, e.g. --temperature 0.8")
    if value == "verifier":
        raise UsageError("evaluation decodes by vote or likelihood")
    search = Search(
        rollouts=budget_tokens, patterns=["plain"], max_thought_tokens=min(256, how.max_tokens),
        thoughts={"answer": Thought(max_tokens=how.max_tokens)}, temperature=how.temperature, top_p=how.top_p,
        stop=Stop(tokens=budget_tokens),
    )  # fmt: skip
    values = {task.name: settled(task, strategy, value, search) for task, _ in questions}

    def of(endpoint: Endpoint, how: Sampling) -> Sampler:
        calls, roles = Calls(None, {endpoint.name: endpoint}, Progress()), {"thinker": (Writer(model=endpoint.name),)}
        # A search has requests enough to keep a server busy; thousands at once would only wait.
        gate = asyncio.Semaphore(search.trees_in_flight)

        async def sample(task: Task, question: Question, numbers: range) -> Reply:
            (number,) = numbers
            async with gate:
                best = await decode(
                    task, question, calls, roles, search,
                    strategy=strategy, value=values[task.name], seed=how.seed + number,
                )  # fmt: skip
            choice = Choice(best.text, "length" if best.cut else "stop", best.spent.completion_tokens)
            decoding = f"{strategy} by {values[task.name]}, {budget_tokens} tokens"
            return Reply((choice,), best.spent.prompt_tokens, decoding, best.found if strategy == "mcts" else None)

        return sample

    return of, search.widest
