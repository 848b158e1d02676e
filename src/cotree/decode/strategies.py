"""Answer a question when nobody knows the answer: the search stage's engine, and its rivals at equal tokens.

Invariant: nothing here sees gold. The question that is worked on is a copy without gold, spec and later turns, so an
answer's value is made of what the model (or a verifier model) says alone. The same seed and completions give the same
answer whatever the latency.
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
from cotree.experiment.recipe import Role, Search
from cotree.models.client import Counters
from cotree.search.baselines import affordable, whole_chains
from cotree.search.calls import Calls
from cotree.search.growth import Growth
from cotree.search.mcts import Node, Slot, distinct
from cotree.search.prompts import chain_text
from cotree.search.reward import merit, reward_of
from cotree.tasks import Question, Split, Task, Verdict, WorkedExample
from cotree.tasks.agreement import groups
from cotree.tasks.base import Message
from cotree.tasks.math_verdicts import compare

STRATEGIES = ("mcts", "vote", "best_of_n", "beam")


class Open(Task):
    """A question of nobody's task, answered in a box (such answers can vote) or as free text. It cannot be verified."""

    name = "open"
    description = "any question, answered in a box or as free text"
    prompt_version = "open/1"

    def __init__(self, *, boxed: bool) -> None:
        super().__init__()
        self.answer_form = "boxed" if boxed else "text"
        self.comparable = boxed

    def ask(self, messages: Sequence[Message]) -> Question:
        """The question of a conversation, named by what it says."""
        said = json.dumps(messages, ensure_ascii=True)
        return Question(hashlib.sha256(said.encode()).hexdigest()[:16], self.name, tuple(messages), "")

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """None: they come from whoever asks."""
        return []

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """None."""
        return ()

    def same_answer(self, left: str, right: str, question: Question) -> bool:
        """The same words, or by math-verify the same number or formula."""
        if left.casefold().split() == right.casefold().split():
            return True
        return any(c.isdigit() for c in left + right) and compare(right, left)[0]


@dataclass(frozen=True, slots=True)
class Decoded:
    """The best answer so far. `answer` is what was extracted, None as long as no chain has one; `said` is the text that
    holds it and `reasoning` the thoughts before.

    votes: what each answer (in its first wording) has: a vote a leaf, or the sum of the leaves' values. found: what
    each chain that came to an end answers, in that order. stopped: rollouts, tokens or deadline; "" as long as it goes
    on.
    """

    answer: str | None
    reasoning: str
    said: str
    said_tokens: int
    cut: bool
    votes: dict[str, float]
    found: tuple[str | None, ...]
    spent: Counters
    stopped: str = ""

    @property
    def chains(self) -> int:
        """How many came to an end."""
        return len(self.found)

    @property
    def text(self) -> str:
        """The whole chain."""
        return f"{self.reasoning}\n{self.said}" if self.reasoning else self.said


class WithoutGold:
    """Values answers without gold, and doubts those that disagree with what wins the vote.

    `vote`: the share of the answered leaves that say the same, counted anew over the whole tree after each round.
    `likelihood`: the geometric mean of the probabilities of the chain's tokens. `verifier`: the settings' `reward`.
    """

    def __init__(self, value: str) -> None:
        self.value, self.logprobs = value, value == "likelihood"

    async def worth(self, growth: Growth, answer: Node) -> tuple[Verdict | None, float]:
        """No verdict but that there is no answer."""
        if growth.task.extract(answer.text, answer.finish_reason, "strict") is None:
            return Verdict("no_answer", 0.0), 0.0
        return None, await self.score(growth, answer)

    async def score(self, growth: Growth, node: Node) -> float:
        """The value of a chain, also of one that is not at its end; 0 until the votes are counted."""
        chain = node.chain()
        if self.value == "verifier":
            return await reward_of(growth, chain, None)
        mean = sum(step.logprob * step.tokens for step in chain) / max(sum(step.tokens for step in chain), 1)
        return math.exp(mean) if self.value == "likelihood" else 0.0

    async def doubts(self, growth: Growth, new: Sequence[Node]) -> Sequence[Node]:
        """Count the votes; the answers that do not say what most say."""
        if not growth.task.comparable:
            return []
        leaves = growth.search.leaves
        _, found = await _said(growth, leaves)
        votes = self.votes(leaves, found)
        if self.value == "vote":
            cast = sum(votes.values())
            growth.search.revalue([0.0 if group is None else votes[group] / cast for group in found])
        winner = max(votes, key=votes.__getitem__, default=None)
        return [leaf for leaf, group in zip(leaves, found, strict=True) if group not in (None, winner)]

    def votes(self, leaves: Sequence[Node], found: Sequence[int | None]) -> dict[int, float]:
        """What each group of answers has, in the order in which they appeared: the first wins a tie."""
        votes: dict[int, float] = {}
        for leaf, group in zip(leaves, found, strict=True):
            if group is not None:
                votes[group] = votes.get(group, 0.0) + (1.0 if self.value == "vote" else leaf.reward or 0.0)
        return votes


async def decode(
    task: Task,
    question: Question,
    calls: Calls,
    roles: Mapping[str, Role],
    settings: Search,
    *,
    strategy: str = "mcts",
    value: str | None = None,
    seed: int = 0,
    on_round: Callable[[Decoded], None] = lambda best: None,
) -> Decoded:
    """The best answer when the budget is spent.

    Args:
        settings: `stop.tokens` is the budget of generated tokens, met to the nearest round (chain, beam); `rollouts`
            bounds the chains, where there is a budget only if it was set; `stop.seconds` is a deadline. The rest of
            `stop` needs verdicts and does not count.
        strategy: `mcts`; `vote` (self-consistency) and `best_of_n` over independent whole chains; `beam` over thoughts,
            `leaves_per_round` wide.
        value: vote, likelihood or verifier; `settled` says what by default.
        on_round: told the best answer so far after each round.

    Raises:
        UsageError: the strategy and the task do not go with the value.
    """
    value = settled(task, strategy, value, settings)
    budget = settings.stop.tokens
    if budget is not None and "rollouts" not in settings.model_fields_set:
        settings = settings.model_copy(update={"rollouts": budget})
    blind = replace(question, gold="", spec={}, later=())
    name = f"{question.task}/{question.id}/{question.turn}/{seed}"
    judge = WithoutGold(value)
    tree_id = hashlib.sha256(name.encode()).hexdigest()[:16]
    growth = Growth(task, blind, tree_id, calls, roles, settings, seed, judge)
    rounds = {"mcts": _trees, "vote": _chains, "best_of_n": _chains, "beam": _beams}[strategy](growth, judge)
    stopped, started = "rollouts", time.monotonic()
    async for leaves in rounds:
        best = await _best(growth, judge, leaves, by_vote=strategy in ("mcts", "vote"))
        on_round(best)
        if settings.stop.seconds is not None and time.monotonic() - started >= settings.stop.seconds:
            stopped = "deadline"
            break
    else:
        stopped = "rollouts" if budget is None or best.chains >= settings.rollouts else "tokens"
    return replace(best, stopped=stopped)


def settled(task: Task, strategy: str, value: str | None, settings: Search) -> str:
    """The value that is meant: as given, or a verifier where there is one, a vote where there can be one, likelihood.

    Raises:
        UsageError: strategy, value and task do not go together; the message says what does.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"unknown strategy `{strategy}`; strategies are {', '.join(STRATEGIES)}")
    if strategy == "vote" and not task.comparable:
        raise UsageError(f"answers of {task.name} are free texts, which cannot vote: use mcts, best_of_n or beam")
    votes = task.comparable and strategy in ("mcts", "vote")
    able = ["verifier"] if settings.reward is not None else ["vote", "likelihood"] if votes else ["likelihood"]
    if value not in (None, *able):
        raise UsageError(
            f"{strategy} values answers of {task.name} by {' or '.join(able)} here, not by {value}: free texts cannot "
            "vote, best_of_n or beam chooses one chain by its own value, and a verifier needs search.reward"
        )
    return value or able[0]


async def _trees(growth: Growth, judge: WithoutGold) -> AsyncIterator[list[Node]]:
    """The leaves of one tree after each round. Where nothing is left to grow it is widened at its root."""
    search, budget, rounds = growth.search, growth.settings.stop.tokens, 0
    while search.rollouts_left and (
        budget is None or rounds == 0 or affordable(budget, growth.spent.completion_tokens, rounds) > 0
    ):
        if search.root.open_below == 0:
            search.widen()
        await growth.round()
        rounds += 1
        yield search.leaves


async def _chains(growth: Growth, judge: WithoutGold) -> AsyncIterator[list[Node]]:
    """Independent whole chains, each a leaf below the root."""
    leaves: list[Node] = []
    async for written in whole_chains(growth, growth.settings.stop.tokens, growth.settings.rollouts):
        for text, choice in written:
            leaf = Node(
                growth.search.root, "answer", text, f"{growth.search.seed}/{len(leaves)}", 1, tokens=choice.tokens,
                finish_reason=choice.finish_reason, logprob=choice.logprob or 0.0,
            )  # fmt: skip
            leaf.verdict, leaf.reward = await judge.worth(growth, leaf)
            leaves.append(leaf)
        yield leaves


async def _beams(growth: Growth, judge: WithoutGold) -> AsyncIterator[list[Node]]:
    """Beam searches over thoughts, one after another, for as long as the budget pays for one more.

    Every kept chain goes on by the first type of its pattern's row, in at least `width` samples; of what came the
    `width` chains of the highest value so far are kept.
    """
    leaves: list[Node] = []
    width, budget, beams = growth.settings.leaves_per_round, growth.settings.stop.tokens, 0
    while beams == 0 or (budget is not None and affordable(budget, growth.spent.completion_tokens, beams) > 0):
        kept = [Node(None, None, "", f"beam{beams}/", 0)]
        while kept:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(_followed(growth, node, width)) for node in kept]
            new = [child for one in asked for child in one.result()]
            leaves += [child for child in new if child.reward is not None]
            scored = [(await judge.score(growth, child), child) for child in new if child.reward is None]
            kept = [child for _, child in sorted(scored, key=lambda pair: -pair[0])[:width]]
        beams += 1
        yield leaves


async def _followed(growth: Growth, node: Node, width: int) -> list[Node]:
    """What the model writes after a chain."""
    first = growth.search.row(node)[0]
    n = first.n if first.kind == "answer" else max(first.n, width)
    wanted = growth.search.want(node, Slot(first.kind, n, first.index))
    return distinct(await growth.write(wanted))


async def _said(growth: Growth, leaves: Sequence[Node]) -> tuple[list[str | None], list[int | None]]:
    """Each leaf's answer, and which of them say the same."""
    task = growth.task
    answers = [task.extract(leaf.text, "stop", "strict") if leaf.verdict is None else None for leaf in leaves]
    if not task.comparable:
        return answers, [None] * len(leaves)
    return answers, await asyncio.to_thread(groups, task, growth.question, answers)


async def _best(growth: Growth, judge: WithoutGold, leaves: Sequence[Node], *, by_vote: bool) -> Decoded:
    """The chain of the highest value among those that say what wins the vote, or among all."""
    answers, found = await _said(growth, leaves)
    votes = judge.votes(leaves, found)
    winner = max(votes, key=votes.__getitem__) if votes and by_vote else None
    able = [i for i, answer in enumerate(answers) if answer is not None and winner in (None, found[i])]
    best = max(able, key=lambda i: merit(leaves[i].chain()), default=0)
    # A beam of which the model wrote nothing has no leaf.
    chain = leaves[best].chain() if leaves else [growth.search.root]
    firsts = {group: str(answers[found.index(group)]) for group in votes}
    return Decoded(
        answer=answers[best] if able else None,
        reasoning=chain_text(chain[:-1]),
        said=chain[-1].text,
        said_tokens=chain[-1].tokens,
        cut=not able and chain[-1].finish_reason == "length",
        votes={firsts[group]: count for group, count in sorted(votes.items(), key=lambda vote: -vote[1])},
        found=tuple(answers),
        spent=replace(growth.spent),
    )
