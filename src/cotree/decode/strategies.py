"""Decoding strategies without a gold answer: tree search, whole chains (self-consistency, best-of-n), and beams.

Invariant: the gold answer is never used: strategies get a copy of the question without gold, spec and later turns, and
rank answers by model output (or a verifier model) only. The same seed and completions give the same answer, whatever
the latency.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cotree.base.errors import UsageError
from cotree.models.client import Counters
from cotree.search.growth import Growth
from cotree.search.journal import SearchModels
from cotree.search.mcts import Node, Slot, distinct_thoughts
from cotree.search.reward import chain_rank_key, chain_reward
from cotree.search.sampling import repeats_within, sample_chains
from cotree.search.settings import Role, Search
from cotree.search.thoughts import chain_text, question_name
from cotree.tasks.base import Message, Question, Split, Task, Verdict, WorkedExample, group_answers
from cotree.tasks.math_verdicts import check_math_answer


class OpenTask(Task):
    """The task of user questions without gold: answers in a box (these can vote) or free text; no verifier."""

    name = "open"
    description = "any question, answered in a box or as free text"
    prompt_version = "open/1"

    def __init__(self, *, boxed: bool) -> None:
        super().__init__()
        self.answer_form = "boxed" if boxed else "text"
        self.comparable = boxed

    def question_of(self, messages: Sequence[Message]) -> Question:
        """Make a question from a conversation; its id is a hash of it."""
        content = json.dumps(messages, ensure_ascii=True)
        return Question(hashlib.sha256(content.encode()).hexdigest()[:16], self.name, tuple(messages), "")

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """Always empty: questions come from users."""
        return []

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Always empty."""
        return ()

    def same_answer(self, left: str, right: str, question: Question) -> bool:
        """Whether two answers are the same text, or by math-verify the same number or formula."""
        if left.casefold().split() == right.casefold().split():
            return True
        return any(c.isdigit() for c in left + right) and check_math_answer(right, left)[0] is True


@dataclass(frozen=True, slots=True)
class Decoded:
    """The best answer of a search so far, with its chain, the votes, and the cost.

    answer: extracted; None if no chain has one.
    answer_text, answer_tokens: the chain's last thought with the answer, and its tokens; `reasoning`: the thoughts
        before. cut_off: no answer because of max_tokens.
    votes: {answer (in its first wording): votes}: one per leaf, or the sum of the leaves' values.
    answers: the answers of finished chains, in the order in which they ended.
    stopped: rollouts, tokens or deadline; "" while it runs.
    """

    answer: str | None
    reasoning: str
    answer_text: str
    answer_tokens: int
    cut_off: bool
    votes: dict[str, float]
    answers: tuple[str | None, ...]
    spent: Counters
    stopped: str = ""

    @property
    def chains(self) -> int:
        """The number of finished chains."""
        return len(self.answers)

    @property
    def text(self) -> str:
        """The whole chain's text."""
        apart = "" if self.answer_text.startswith("\n") or not self.reasoning else "\n"
        return f"{self.reasoning}{apart}{self.answer_text}"


class GoldFreeScorer:
    """Scores answers without a gold answer; those that disagree with the majority get a reflection.

    `vote`: share of answered leaves with the same answer, recomputed over the whole tree after each round.
    `likelihood`: geometric mean of the chain's token probabilities. `verifier`: the settings' `reward`.
    """

    def __init__(self, value: str) -> None:
        self.value, self.needs_logprobs = value, value == "likelihood"

    async def score_answer(self, growth: Growth, answer: Node) -> tuple[Verdict | None, float]:
        """The chain's value as reward; a verdict (no_answer) only if there is no answer."""
        if growth.task.extract(chain_text(answer.chain()), answer.finish_reason, "strict") is None:
            return Verdict("no_answer", 0.0), 0.0
        return None, await self.chain_value(growth, answer)

    async def chain_value(self, growth: Growth, node: Node) -> float:
        """The value of the chain down to a node, finished or not; 0 with `vote` (counted after the round)."""
        chain = node.chain()
        if self.value == "verifier":
            return await chain_reward(growth, chain, None)
        mean = sum(step.logprob * step.tokens for step in chain) / max(sum(step.tokens for step in chain), 1)
        return math.exp(mean) if self.value == "likelihood" else 0.0

    async def answers_to_reflect_on(self, growth: Growth, new: Sequence[Node]) -> Sequence[Node]:
        """Select the leaves that disagree with the majority; with `vote` also update the rewards of all leaves."""
        if not growth.task.comparable:
            return []
        leaves = growth.search.leaves
        _, group_of = await _answers(growth, leaves)
        votes = self.votes(leaves, group_of)
        if self.value == "vote":
            total = sum(votes.values())
            growth.search.set_rewards([0.0 if group is None else votes[group] / total for group in group_of])
        winner = max(votes, key=votes.__getitem__, default=None)
        return [leaf for leaf, group in zip(leaves, group_of, strict=True) if group not in (None, winner)]

    def votes(self, leaves: Sequence[Node], group_of: Sequence[int | None]) -> dict[int, float]:
        """{group of equal answers: votes}, in order of first appearance.

        group_of: each leaf's group number; None without an answer (no vote).
        """
        votes: dict[int, float] = {}
        for leaf, group in zip(leaves, group_of, strict=True):
            if group is not None:
                votes[group] = votes.get(group, 0.0) + (1.0 if self.value == "vote" else leaf.reward or 0.0)
        return votes


async def search_answer(
    task: Task,
    question: Question,
    models: SearchModels,
    settings: Search,
    *,
    roles: Mapping[str, Role],
    strategy: str = "mcts",
    value: str | None = None,
    seed: int = 0,
    on_round: Callable[[Decoded], None] = lambda best: None,
) -> Decoded:
    """Search for the answer to a question until the budget is spent; returns the best one.

    Args:
        settings: `stop.tokens` is the budget of generated tokens, to the nearest round (chain, beam); `rollouts` limits
            the chains (with a token budget only if set explicitly); `stop.seconds` is a deadline. The rest of `stop`
            needs verdicts and is ignored.
        strategy: `mcts`; `vote` (self-consistency) and `best_of_n` over independent whole chains; `beam` over thoughts,
            `leaves_per_round` wide.
        value: vote, likelihood or verifier; by default from `choose_value`.
        on_round: called after each round with the best answer so far.

    Raises:
        UsageError: the value does not fit the strategy or the task.
    """
    value = choose_value(task, strategy, value, settings)
    budget = settings.stop.tokens
    if budget is not None and "rollouts" not in settings.model_fields_set:
        settings = settings.model_copy(update={"rollouts": budget})
    without_gold = replace(question, gold="", spec={}, later=())
    scorer, name = GoldFreeScorer(value), f"{seed}/{question_name(question)}"
    growth = Growth(task, without_gold, models, settings, roles=roles, seed=name, scorer=scorer)
    started = time.monotonic()
    async for leaves in _ROUNDS[strategy](growth):
        best = await _best_answer(growth, scorer, leaves, by_vote=strategy in ("mcts", "vote"))
        on_round(best)
        if settings.stop.seconds is not None and time.monotonic() - started >= settings.stop.seconds:
            stopped = "deadline"
            break
    else:
        stopped = "rollouts" if budget is None or best.chains >= settings.rollouts else "tokens"
    return replace(best, stopped=stopped)


def choose_value(task: Task, strategy: str, value: str | None, settings: Search) -> str:
    """Choose how answers are valued: `value` if given, else the first possible of verifier, vote and likelihood.

    Raises:
        UsageError: strategy, value and task do not fit; the message says which do.
    """
    if strategy not in _ROUNDS:
        raise UsageError(f"unknown strategy `{strategy}`; strategies are {', '.join(_ROUNDS)}")
    if strategy == "vote" and not task.comparable:
        raise UsageError("free texts cannot vote: use mcts, best_of_n or beam")
    votes = task.comparable and strategy in ("mcts", "vote")
    possible = ["verifier"] if settings.reward is not None else ["vote", "likelihood"] if votes else ["likelihood"]
    if value not in (None, *possible):
        if settings.reward is not None:
            why = "the settings have a `reward`, which is the verifier"
        elif value == "verifier":
            why = "a verifier needs a `reward` in the settings"
        else:
            why = f"{strategy} chooses a chain by its own value" if task.comparable else "free texts cannot vote"
        raise UsageError(f"with {strategy} the value can be {' or '.join(possible)} here, not {value}: {why}")
    return value or possible[0]


async def _grow_tree(growth: Growth) -> AsyncIterator[list[Node]]:
    """Grow one tree; yields all its leaves after each round. An exhausted tree gets more children at the root."""
    search, budget, rounds = growth.search, growth.settings.stop.tokens, 0
    while search.rollouts_left and (
        budget is None or rounds == 0 or repeats_within(budget, growth.spent.completion_tokens, rounds) > 0
    ):
        if search.exhausted:
            search.expand_root()
        await growth.grow_round()
        rounds += 1
        yield search.leaves


async def _sample(growth: Growth) -> AsyncIterator[list[Node]]:
    """Sample independent whole chains; yields all leaves after each request."""
    leaves: list[Node] = []
    async for sampled in sample_chains(growth, budget=growth.settings.stop.tokens, most=growth.settings.rollouts):
        leaves += sampled
        yield leaves


async def _search_beams(growth: Growth) -> AsyncIterator[list[Node]]:
    """Run beam searches over thoughts one after another while the budget suffices; yields all leaves after each.

    Each kept chain is continued with the first type of its pattern's row, in at least `width` samples; the `width` new
    chains with the highest value are kept.
    """
    assert isinstance(growth.scorer, GoldFreeScorer)
    leaves: list[Node] = []
    width, budget, beams = growth.settings.leaves_per_round, growth.settings.stop.tokens, 0
    while beams == 0 or (budget is not None and repeats_within(budget, growth.spent.completion_tokens, beams) > 0):
        kept = [Node(0, None, None, "", path=f"beam{beams}/")]
        while kept:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(_write_next(growth, node, width)) for node in kept]
            new = [child for one in asked for child in one.result()]
            leaves += [child for child in new if child.reward is not None]
            valued = [(await growth.scorer.chain_value(growth, child), child) for child in new if child.reward is None]
            kept = [child for _, child in sorted(valued, key=lambda pair: -pair[0])[:width]]
        beams += 1
        yield leaves


async def _write_next(growth: Growth, node: Node, width: int) -> list[Node]:
    """Generate the next thoughts of a chain, at least `width` unless they are answers."""
    first = growth.search.child_slots(node)[0]
    n = first.n if first.type == "answer" else max(first.n, width)
    request = growth.search.thought_request(node, Slot(first.type, n, first.index))
    return distinct_thoughts(await growth.write_thoughts(request, ahead=False))


# {strategy: async generator that yields all leaves after each round within the budget}
_ROUNDS: Mapping[str, Callable[[Growth], AsyncIterator[list[Node]]]] = {
    "mcts": _grow_tree,
    "vote": _sample,
    "best_of_n": _sample,
    "beam": _search_beams,
}


async def _answers(growth: Growth, leaves: Sequence[Node]) -> tuple[list[str | None], list[int | None]]:
    """Each leaf's answer, and its group number among equal answers."""
    task = growth.task
    texts = [chain_text(leaf.chain()) if leaf.verdict is None else "" for leaf in leaves]
    answers = [task.extract(text, "stop", "strict") if text else None for text in texts]
    if not task.comparable:
        return answers, [None] * len(leaves)
    return answers, await asyncio.to_thread(group_answers, task, growth.question, answers)


async def _best_answer(growth: Growth, scorer: GoldFreeScorer, leaves: Sequence[Node], *, by_vote: bool) -> Decoded:
    """The chain with the highest value among those with the majority answer (`by_vote`), or among all."""
    answers, group_of = await _answers(growth, leaves)
    votes = scorer.votes(leaves, group_of)
    winner = max(votes, key=votes.__getitem__) if votes and by_vote else None
    candidates = [i for i, answer in enumerate(answers) if answer is not None and winner in (None, group_of[i])]
    best = max(candidates, key=lambda i: chain_rank_key(leaves[i].chain()), default=0)
    # A beam of which the model wrote nothing has no leaf.
    chain = leaves[best].chain() if leaves else [growth.search.root]
    wordings = {group: str(answers[group_of.index(group)]) for group in votes}
    return Decoded(
        answer=answers[best] if candidates else None,
        reasoning=chain_text(chain[:-1]),
        answer_text=chain[-1].text,
        answer_tokens=chain[-1].tokens,
        cut_off=not candidates and chain[-1].finish_reason == "length",
        votes={wordings[group]: count for group, count in sorted(votes.items(), key=lambda vote: -vote[1])},
        answers=tuple(answers),
        spent=replace(growth.spent),
    )
