"""Grow the trees of many questions concurrently, redistribute unused rollouts, and store the trees.

Invariant: stored trees depend on the settings, the seed, the questions and the completions only; not on latency,
concurrency or restarts (a deadline in the settings is the one exception).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from cotree.base.errors import UsageError
from cotree.base.garbage import infrequent_gc
from cotree.models.endpoints import Endpoint
from cotree.search.commits import CommitsTogether
from cotree.search.growth import Growth
from cotree.search.journal import Journal, Progress, SearchModels
from cotree.search.reward import chain_rank_key
from cotree.search.sampling import sample_chains
from cotree.search.settings import Trees
from cotree.search.store import StoredTree
from cotree.search.stores import Stores
from cotree.search.thoughts import chain_text, names_of_turns, question_name
from cotree.tasks import Question, Task
from cotree.tasks.base import VERDICT_VERSION, Asked
from cotree.tasks.extract import visible_text

T = TypeVar("T")


class Turn(NamedTuple):
    """A question or a later turn of its conversation, its tree's id, and whether the store has the tree."""

    task: Task
    question: Question
    tree_id: str
    finished: bool


def turns_of(store: Stores, questions: Sequence[Asked], config: str) -> Iterator[Turn]:
    """Yield each question and its later turns, up to the first one without a tree in the store."""
    finished = store.finished(config)
    for task, first in questions:
        question: Question | None = first
        while question is not None:
            tree_id = tree_id_of(task, question, config)
            yield Turn(task, question, tree_id, tree_id in finished)
            replied = question.later and tree_id in finished
            question = question.follow_up(_best_reply(task, store.tree(tree_id))) if replied else None


def trees_of(store: Stores, questions: Sequence[Asked], config: str) -> Iterator[StoredTree]:
    """Iterate over the stored trees of questions and their later turns, in order."""
    return (store.tree(turn.tree_id) for turn in turns_of(store, questions, config) if turn.finished)


def unfinished_turns(store: Stores, questions: Sequence[Asked], config: str) -> list[str]:
    """The names (`question_name`) of all turns of these questions without a stored tree."""
    left = (turn.question for turn in turns_of(store, questions, config) if not turn.finished)
    return [name for question in left for name in names_of_turns(question)]


def tree_id_of(task: Task, question: Question, config: str) -> str:
    """The id of a question's tree under the settings with hash `config`: 16 hex digits."""
    return hashlib.sha256(f"{tree_key(task, question)}/{config}".encode()).hexdigest()[:16]


def tree_key(task: Task, question: Question) -> str:
    """Hash all parts of a question that affect its tree, so that changed content gives another tree id."""
    examples = [
        {"question": example.question, "steps": example.steps, "answer": example.answer}
        for example in task.worked_examples(question)
    ]
    asked = [question_name(question), question.family, examples, question.messages, task.answer_form]
    content = [*asked, question.gold, question.spec, task.verifier_version]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _best_reply(task: Task, tree: StoredTree) -> str:
    """The assistant message for the next turn: the best chain's answer without thinking and tag; "" without an answer.

    A free-text answer without a tag is the whole chain. Best: highest reward, then highest mean v/n, then first.
    """
    chains = [tree.chain(node.node_id) for node in tree.nodes if node.type == "answer"]
    best = max(chains, key=chain_rank_key, default=[])
    return visible_text(chain_text(best if task.answer_form == "text" else best[-1:]))


@dataclass
class TreeGrower:
    """Grows or samples the trees of one `trees` node.

    journal: the run's; requests that it can answer are not sent.
    endpoints: the open models of `settings.writers`.
    config: hash of everything but the questions that affects trees (settings, writers, seed); part of the tree ids.
    budgets: for `settings.tokens_of`: {`question_name`: generated tokens of its tree in the other node}.
    on_tree, on_progress: called after each tree is stored.
    """

    store: Stores
    journal: Journal
    settings: Trees
    endpoints: Mapping[str, Endpoint]
    config: str
    seed: int
    budgets: Mapping[str, int] | None = None
    on_tree: Callable[[StoredTree], None] = lambda tree: None
    on_progress: Callable[[Progress], None] = lambda progress: None

    def __post_init__(self) -> None:
        self.models = SearchModels(self.endpoints, self.journal)
        self.progress = self.models.progress
        self._finished = CommitsTogether(self._store_trees)

    async def grow(self, questions: Sequence[Asked]) -> Progress:
        """Grow all missing trees of these questions and of later turns of their conversations.

        Raises:
            UsageError: `budgets` lacks a question.
            ExceptionGroup: of CotreeErrors: a model failed. The same call resumes from the journal.
        """
        names = [name for _, question in questions for name in names_of_turns(question)]
        missing = [] if self.budgets is None else [name for name in names if name not in self.budgets]
        if missing:
            raise UsageError(f"tokens_of: no tree for question {missing[0]}; grow it first")
        self.progress.trees_wanted = len(names)
        # Group by family: its trees share worked examples, so servers' prefix caches hit.
        questions = sorted(questions, key=lambda asked: (asked[0].name, asked[1].family))
        # A later turn's prompt contains the reply from the previous turn's tree.
        with infrequent_gc():
            for number in range(max((1 + len(question.later) for _, question in questions), default=0)):
                turns = turns_of(self.store, questions, self.config)
                await self._grow_turns({turn.tree_id: turn for turn in turns if turn.question.turn == number})
        return self.progress

    async def _grow_turns(self, turns: Mapping[str, Turn]) -> None:
        """Grow the trees of one turn of many conversations, given as {tree id: turn}."""
        current = {question_name(turn.question): tree_id for tree_id, turn in turns.items()}
        self.journal.set_current(self.store.path, current)
        left = [turn for turn in turns.values() if not turn.finished]
        self.progress.trees += len(turns) - len(left)
        self.progress.trees_before += len(turns) - len(left)
        unstored: dict[str, Growth] = {}

        async def grow(turn: Turn) -> None:
            if (growth := await self._grow_tree(turn)) is not None:
                unstored[turn.tree_id] = growth

        async def grow_further(tree_id: str) -> None:
            growth = unstored[tree_id]
            growth.search.rollouts_left += extra
            await growth.run()
            await self._finished.add((tree_id, growth))

        await self._at_once(grow, left)
        if unstored:
            extra = self._extra_rollouts(sorted(turns), len(unstored))
            await self._at_once(grow_further, [turn.tree_id for turn in left if turn.tree_id in unstored])

    async def _at_once(self, grow: Callable[[T], Awaitable[None]], items: Sequence[T]) -> None:
        """Await `grow` for each item with `trees_in_flight` workers; one task per item could exhaust memory."""
        waiting = iter(items)

        async def work() -> None:
            for item in waiting:
                await grow(item)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.settings.trees_in_flight, len(items))):
                group.create_task(work())

    async def _grow_tree(self, turn: Turn) -> Growth | None:
        """Grow and store a tree; or return it unstored if `adaptive` should give it more rollouts.

        Those are trees with correct and wrong chains, where more rollouts make more pairs, that only ran out of
        rollouts.
        """
        settings, seed = self.settings, f"{self.seed}/{question_name(turn.question)}"
        growth = Growth(turn.task, turn.question, self.models, settings, roles=settings.roles, seed=seed)
        if settings.method == "sampling":
            await self._sample(growth)
        else:
            await growth.run()
        both = {"correct", "wrong"} <= {leaf.verdict for leaf in growth.search.leaves}
        wants_more = both and growth.stopped is None and not growth.search.exhausted
        if settings.adaptive and settings.method == "mcts" and wants_more:
            return growth
        await self._finished.add((turn.tree_id, growth))
        return None

    def _extra_rollouts(self, tree_ids: Sequence[str], growing: int) -> int:
        """Extra rollouts for each of the `growing` trees of a turn: an equal share of what finished trees left over.

        At most `rollouts`, so a tree's budget at most doubles.
        """
        rollouts, finished = self.settings.rollouts, self.store.finished(self.config)
        left_over = sum(rollouts - finished[tree_id] for tree_id in tree_ids if tree_id in finished)
        name = hashlib.sha256("/".join([self.config, str(rollouts), *tree_ids]).encode()).hexdigest()
        return self.journal.extra_rollouts(name, max(0, min(rollouts, left_over // growing)))

    async def _sample(self, growth: Growth) -> None:
        """Sample whole chains: to another tree's tokens (`budgets`), or up to `rollouts` or a stop condition."""
        tokens, most = self.settings.stop.tokens, self.settings.rollouts
        growth.started = time.monotonic()
        if self.budgets is not None:
            async for _ in sample_chains(growth, budget=self.budgets[question_name(growth.question)]):
                growth.stopped = "tokens"
            return
        async for _ in sample_chains(growth, budget=tokens, most=most):
            growth.stopped = growth.stop_condition()
            if growth.stopped is not None:
                return
        growth.stopped = "tokens" if growth.search.rollouts < most else None

    def _store_trees(self, finished: Sequence[tuple[str, Growth]]) -> None:
        # Journal first: a kill in between must not leave a stored tree whose completions count as unused.
        self.journal.add_uses({tree_id: growth.used for tree_id, growth in finished})
        trees = [self._stored_tree(tree_id, growth) for tree_id, growth in finished]
        self.store.put(*trees)
        for tree, (_, growth) in zip(trees, finished, strict=True):
            self.models.forget(question_name(growth.question))
            self.on_tree(tree)
            self.progress.trees += 1
            self.progress.thoughts += len(tree.nodes) - 1
            self.progress.verdicts.update(str(leaf.verdict) for leaf in growth.search.leaves)
            self.models.note_servers()
            self.on_progress(self.progress)

    def _stored_tree(self, tree_id: str, growth: Growth) -> StoredTree:
        question, spent, search = growth.question, growth.spent, growth.search
        return StoredTree(
            tree_id=tree_id,
            task=question.task,
            question_id=question.id,
            turn=question.turn,
            config=self.config,
            family=question.family,
            messages=list(question.messages),
            gold=question.gold,
            pattern="sampling" if self.settings.method == "sampling" else growth.pattern,
            rollouts=search.rollouts,
            stopped=growth.stopped or ("exhausted" if search.exhausted else "rollouts"),
            calls=spent.requests,
            prompt_tokens=spent.prompt_tokens,
            cached_tokens=spent.cached_tokens,
            completion_tokens=spent.completion_tokens,
            nodes=[*search.nodes],
            verdict_version=VERDICT_VERSION,
        )
