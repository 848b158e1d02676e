"""Grow the trees of many questions at once, spend the budget where it pays, and store what came.

Invariant: what is stored depends on the settings, the seed, the questions and the completions; not on latency, on how
many trees grow at once, or on how often the process was killed (a deadline in the settings is the one exception).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cotree.base.errors import UsageError
from cotree.models.endpoints import Endpoint
from cotree.search.completer import Completer, Progress
from cotree.search.growth import Growth
from cotree.search.journal import Journal
from cotree.search.mcts import Node
from cotree.search.prompts import search_messages
from cotree.search.reward import chain_score
from cotree.search.sampling import sample_chains
from cotree.search.settings import Trees
from cotree.search.store import StoredTree, TreeStore
from cotree.search.thoughts import question_name
from cotree.tasks import Question, Task
from cotree.tasks.base import Asked
from cotree.tasks.extract import visible_text


async def grow_trees(
    store: TreeStore,
    journal: Journal,
    settings: Trees,
    questions: Sequence[Asked],
    *,
    endpoints: Mapping[str, Endpoint],
    config: str,
    seed: int,
    others: TreeStore | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Grow a tree for every question, and for every later turn of its conversation, that the store has none for.

    Args:
        journal: of the run; requests that it has answers to are not sent.
        endpoints: the open models of `settings.writers`.
        config: what decides the trees beside their questions (settings, writers, seed), as a hash; part of their ids.
        seed: of all that is drawn.
        others: the store of `settings.tokens_of`: a question is sampled at the tokens that its tree there has cost.
        on_progress: called after every finished tree.

    Raises:
        UsageError: `others` lacks the tree of a question.
        ExceptionGroup: of CotreeErrors: a model failed. What was answered is in the journal; the same call goes on.
    """
    budgets = None if others is None else _tokens_of(others, questions)
    grower = _Grower(
        store=store,
        journal=journal,
        completer=Completer(endpoints, journal),
        settings=settings,
        config=config,
        seed=seed,
        budgets=budgets,
        on_progress=on_progress,
    )
    await grower.grow(questions)
    return grower.completer.progress


def trees_of(store: TreeStore, questions: Sequence[Asked], config: str) -> Iterator[StoredTree]:
    """The stored trees of questions, those of later turns included, in order and read one at a time."""
    finished = store.finished(config)
    for _, _, tree_id in _turns(store, finished, questions, config):
        if tree_id in finished:
            yield store.tree(tree_id)


def trees_left(store: TreeStore, questions: Sequence[Asked], config: str) -> int:
    """How many trees of these questions, later turns included, are still to be grown."""
    finished = store.finished(config)
    turns = _turns(store, finished, questions, config)
    return sum(1 + len(question.later) for _, question, tree_id in turns if tree_id not in finished)


def tree_key(task: Task, question: Question) -> str:
    """A hash of all of a question that decides its tree: a question whose content changed is another question."""
    content = [
        question_name(question),
        question.family,
        search_messages(task, question),
        task.answer_form,
        question.gold,
        question.spec,
        task.verifier_version,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def best_answer(tree: StoredTree) -> str:
    """The reply that goes into the next turn's conversation: the answer of the best chain, without thinking and tag.

    The best chain is that of the highest reward, then of the highest mean v/n on its way, then the first; "" if there
    is no answer.
    """
    answers = [tree.chain(node.node_id) for node in tree.nodes if node.type == "answer"]
    return visible_text(max(answers, key=chain_score)[-1].text) if answers else ""


def _tree_id(task: Task, question: Question, config: str) -> str:
    return hashlib.sha256(f"{tree_key(task, question)}/{config}".encode()).hexdigest()[:16]


def _turns(
    store: TreeStore, finished: Collection[str], questions: Sequence[Asked], config: str
) -> Iterator[tuple[Task, Question, str]]:
    """Each question with its tree's id, then its later turns, as far as the replies before them are known."""
    for task, first in questions:
        question: Question | None = first
        while question is not None:
            tree_id = _tree_id(task, question, config)
            yield task, question, tree_id
            replied = question.later and tree_id in finished
            question = question.follow_up(best_answer(store.tree(tree_id))) if replied else None


def _tokens_of(others: TreeStore, questions: Sequence[Asked]) -> dict[str, int]:
    """The generated tokens that each question's tree in another store has cost, by question name."""
    configs = others.configs()
    if len(configs) > 1:
        raise UsageError(f"{others.path} has trees of {len(configs)} settings; `tokens_of` needs a store of one")
    config = configs[0] if configs else ""
    finished = others.finished(config)
    found: dict[str, int] = {}
    for _, question, tree_id in _turns(others, finished, questions, config):
        if tree_id not in finished:
            missing = f"no tree for question {question.id} of {question.task}"
            raise UsageError(f"tokens_of: {others.path} has {missing}; grow it first")
        found[question_name(question)] = finished[tree_id].tokens
    return found


@dataclass
class _Grower:
    """Grows or samples the trees of one node; the fields are the arguments of `grow_trees`.

    budgets: generated tokens for each question by its name, where they are those of other trees.
    """

    store: TreeStore
    journal: Journal
    completer: Completer
    settings: Trees
    config: str
    seed: int
    budgets: Mapping[str, int] | None
    on_progress: Callable[[Progress], None]

    async def grow(self, questions: Sequence[Asked]) -> None:
        """A tree for every question, turn after turn: a later turn's question holds the reply of the tree before."""
        # Family after family: its trees share their worked examples, which then stay warm in the servers' caches.
        turn = sorted(questions, key=lambda asked: (asked[0].name, asked[1].family))
        self.completer.progress.trees_wanted = sum(1 + len(question.later) for _, question in turn)
        while turn:
            await self._grow_turn(turn)
            turn = [
                (task, following)
                for task, question in turn
                if question.later and (following := self._follow_up(task, question)) is not None
            ]

    async def _grow_turn(self, questions: Sequence[Asked]) -> None:
        ids = {self._id(task, question): (task, question) for task, question in questions}
        self.journal.set_current(self.store.path, {question_name(asked[1]): id_ for id_, asked in ids.items()})
        finished = self.store.finished(self.config)
        left = {tree_id: asked for tree_id, asked in ids.items() if tree_id not in finished}
        progress = self.completer.progress
        progress.trees += len(questions) - len(left)
        progress.trees_before += len(questions) - len(left)
        gate = asyncio.Semaphore(self.settings.trees_in_flight)
        promising: list[tuple[str, Growth]] = []

        async def grow(tree_id: str, task: Task, question: Question) -> None:
            async with gate:
                growth = self._growth(task, question)
                if self.settings.method == "sampling":
                    await self._sample(growth)
                else:
                    await growth.run()
            # Both kinds of chains were found, and the tree ended for want of rollouts alone.
            wants_more = growth.chains.has_both and growth.stopped is None and growth.search.root.open_below > 0
            if self.settings.adaptive and self.settings.method == "mcts" and wants_more:
                promising.append((tree_id, growth))
            else:
                self._put(tree_id, growth)

        async def grow_more(tree_id: str, growth: Growth, rollouts: int) -> None:
            async with gate:
                growth.search.rollouts_left += rollouts
                await growth.run()
            self._put(tree_id, growth)

        async with asyncio.TaskGroup() as group:
            for tree_id, asked in left.items():
                group.create_task(grow(tree_id, *asked))
        if promising:
            share = self._share(sorted(ids), len(promising))
            async with asyncio.TaskGroup() as group:
                for tree_id, growth in promising:
                    group.create_task(grow_more(tree_id, growth, share))

    def _id(self, task: Task, question: Question) -> str:
        return _tree_id(task, question, self.config)

    def _follow_up(self, task: Task, question: Question) -> Question | None:
        return question.follow_up(best_answer(self.store.tree(self._id(task, question))))

    def _growth(self, task: Task, question: Question) -> Growth:
        seed = f"{self.seed}/{question_name(question)}"
        return Growth(task, question, self.completer, self.settings, roles=self.settings.roles, seed=seed)

    async def _sample(self, growth: Growth) -> None:
        """Sample whole chains at the budget of the other tree, or up to `rollouts` of them and the stop conditions."""
        stop, most = self.settings.stop, self.settings.rollouts
        started = time.monotonic()
        if self.budgets is not None:
            async for leaves in sample_chains(growth, budget=self.budgets[question_name(growth.question)]):
                self._count(growth, leaves)
            growth.stopped = "tokens"
            return
        async for leaves in sample_chains(growth, budget=stop.tokens, most=most):
            self._count(growth, leaves)
            seconds = time.monotonic() - started
            growth.stopped = growth.chains.stop_reason(stop, growth.spent.completion_tokens, seconds)
            if growth.stopped is not None:
                return
        growth.stopped = "tokens" if growth.search.rollouts < most else None

    def _count(self, growth: Growth, leaves: Sequence[Node]) -> None:
        self.completer.progress.thoughts += len(leaves)
        growth.count_leaves(leaves)

    def _put(self, tree_id: str, growth: Growth) -> None:
        pattern = "sampling" if self.settings.method == "sampling" else None
        # First the journal: a kill between the two leaves no stored tree whose completions count as unused.
        self.journal.add_uses(tree_id, growth.used)
        self.store.put(growth.to_stored(tree_id, self.config, pattern=pattern))
        self.completer.progress.trees += 1
        self.on_progress(self.completer.progress)

    def _share(self, tree_ids: Sequence[str], promising: int) -> int:
        """Extra rollouts for each promising tree: an equal part of what the others left over, at most as many again.

        Kept before they are spent, so that a resume, which finds some of these trees finished, shares as before.
        """
        base = self.settings.rollouts
        name = hashlib.sha256("/".join([self.config, str(base), *tree_ids]).encode()).hexdigest()
        share = self.journal.share(name)
        if share is None:
            finished = self.store.finished(self.config)
            left_over = sum(base - finished[tree].rollouts for tree in tree_ids if tree in finished)
            share = max(0, min(base, left_over // promising))
            self.journal.set_share(name, share)
        return share
