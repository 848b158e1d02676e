"""Samplers for evaluation: plain completions, or decoding by search.

A `Sampler` generates some samples of one question at a time; implement this protocol to add another decoding method.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cotree.base.errors import UsageError
from cotree.decode.strategies import choose_value, search_answer
from cotree.eval.settings import AskSettings
from cotree.models.client import Choice, Request
from cotree.models.endpoints import Endpoint
from cotree.search.journal import SearchModels
from cotree.search.settings import Search, Stop, Thought, Writer
from cotree.search.thoughts import search_messages
from cotree.tasks.base import Asked, Message, Question, Task

# Samples per request: they share its prompt, and a server decodes them in parallel.
_SAMPLES_PER_REQUEST = 16
_LONGEST_THOUGHT = 256  # tokens
# {(task, question id): budget of generated tokens}
Budgets = Mapping[tuple[str, str], int]


@dataclass(frozen=True, slots=True)
class SampledReplies:
    """The replies to one question: one choice per sample, whose `tokens` count all that was generated for it.

    seconds: wall time of the request, or of the whole search.
    decoding: description of the search; "" for plain sampling.
    tree_answers: the answers of all chains of a search, in the order in which they ended.
    """

    choices: Sequence[Choice]
    prompt_tokens: int
    seconds: float
    decoding: str = ""
    tree_answers: Sequence[str | None] | None = None


class Sampler(Protocol):
    """Generates samples of questions. samples_per_call: maximum samples per call."""

    samples_per_call: int

    async def sample(self, task: Task, question: Question, numbers: range) -> SampledReplies:
        """Generate the samples with these numbers, in order; the number sets a sample's seed."""


def conversation(task: Task, question: Question, asking: AskSettings) -> list[Message]:
    """The messages of a question, with worked examples first if set."""
    if asking.strategy is not None:
        return search_messages(task, question, ends=search_settings(asking).ends)
    return search_messages(task, question, shown=3 if asking.examples else 0)


class PlainSampler:
    """Samples independent completions of the prompt."""

    samples_per_call = _SAMPLES_PER_REQUEST

    def __init__(self, endpoint: Endpoint, asking: AskSettings) -> None:
        self.endpoint, self.asking = endpoint, asking

    async def sample(self, task: Task, question: Question, numbers: range) -> SampledReplies:
        """Send one request for all samples."""
        prompt = self.endpoint.prompt(conversation(task, question, self.asking))
        request = Request(
            prompt=prompt.text + prompt.opened,
            messages=prompt.messages,
            n=len(numbers),
            seed=self.asking.seed + numbers.start,
            stop=self.endpoint.turn_stops,
            **self.asking.sampling(),
        )
        completion = await self.endpoint.complete(request, question.id)
        choices = [replace(choice, text=prompt.opened + choice.text) for choice in completion.choices]
        return SampledReplies(choices, completion.prompt_tokens, completion.seconds)


class SearchSampler:
    """Runs one search per sample, each with its own seed, so samples are independent."""

    samples_per_call = 1

    def __init__(self, endpoint: Endpoint, asking: AskSettings, budgets: Budgets | None) -> None:
        self.endpoint, self.asking, self.budgets = endpoint, asking, budgets
        self.models = SearchModels({endpoint.name: endpoint})
        # A few searches keep a server busy; more would only queue.
        self._running = asyncio.Semaphore(search_settings(asking).trees_in_flight)

    async def sample(self, task: Task, question: Question, numbers: range) -> SampledReplies:
        """Run one search."""
        strategy, budget = self.asking.strategy, self.asking.budget_tokens
        shown = f"{budget} tokens"
        if self.budgets is not None:
            # The budget of a conversation is divided over its turns.
            turns = question.turn + 1 + len(question.later)
            budget, shown = self.budgets[question.task, question.id] // turns, "tokens of another evaluation"
        assert strategy, "settings without one ask a plain sampler"
        settings = search_settings(self.asking, max(budget or 1, 1))
        value = choose_value(task, strategy, self.asking.value, settings)
        async with self._running:
            started = time.perf_counter()
            best = await search_answer(
                task,
                question,
                self.models,
                settings,
                roles={"thinker": (Writer(model=self.endpoint.name),)},
                strategy=strategy,
                value=value,
                seed=self.asking.seed + numbers.start,
            )
            seconds = time.perf_counter() - started
        choice = Choice(best.text, "length" if best.cut_off else "stop", best.spent.completion_tokens)
        decoding = f"{strategy} by {value}, {shown}"
        answers = best.answers if strategy == "mcts" else None
        return SampledReplies((choice,), best.spent.prompt_tokens, seconds, decoding, answers)


def make_sampler(endpoint: Endpoint, asking: AskSettings, budgets: Budgets | None) -> Sampler:
    """Create the sampler for the settings."""
    return PlainSampler(endpoint, asking) if asking.strategy is None else SearchSampler(endpoint, asking, budgets)


def samples_of_a_request(asking: AskSettings) -> int:
    """The largest `n` of a sampler's requests."""
    return min(asking.samples, _SAMPLES_PER_REQUEST) if asking.strategy is None else search_settings(asking).widest


def search_settings(asking: AskSettings, budget_tokens: int = 1) -> Search:
    """Search settings for an evaluation with a token budget; chains may be as long as plain replies."""
    return Search(
        rollouts=budget_tokens,
        examples=3,
        max_thought_tokens=min(_LONGEST_THOUGHT, asking.max_tokens),
        max_chain_tokens=asking.max_tokens,
        thoughts={"answer": Thought(max_tokens=asking.max_tokens)},
        temperature=asking.temperature,
        top_p=asking.top_p,
        stop=Stop(tokens=budget_tokens),
    )


def check_strategy(asking: AskSettings, questions: Sequence[Asked], budgets: Budgets | None) -> None:
    """Check that the strategy has a budget for every question and can rank answers of the tasks' form.

    Raises:
        UsageError: it does not.
    """
    if asking.strategy is None:
        return
    if budgets is None and asking.budget_tokens is None:
        raise UsageError("a strategy needs `budget_tokens` (--budget-tokens): about how many tokens a sample may take")
    for task, question in questions:
        choose_value(task, asking.strategy, asking.value, search_settings(asking))
        if budgets is not None and not budgets.get((question.task, question.id)):
            raise UsageError(
                f"question `{question.id}` of task `{question.task}` has no tokens in the evaluation that `tokens_of` "
                "names; ask the same questions in both"
            )
