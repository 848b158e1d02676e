"""Grow the trees of many questions at once, spend the budget where it pays, and store what came.

Invariant: the content of the store depends on recipe, seed and completions, not on latency, on how many trees grow at
once, or on how often the process was killed on the way (a deadline in the recipe is the one exception).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from cotree.base.errors import UsageError
from cotree.experiment.recipe import Role, Search
from cotree.models.endpoints import Endpoint
from cotree.search.calls import Calls, Progress
from cotree.search.growth import Growth, patterns_of, prefixes_of
from cotree.search.reward import merit
from cotree.search.store import Call, StoredTree, TreeStore
from cotree.tasks import Question, Task
from cotree.tasks.extract import spoken

Asked = tuple[Task, Question]


def config_hash(settings: Search, roles: Mapping[str, Role], identities: Mapping[str, str], seed: int) -> str:
    """Names everything that decides a tree: search settings, prefixes, patterns, who writes what, and the seed."""
    grown = {
        "search": settings.model_dump(exclude={"trees_in_flight", "baselines"}),
        "patterns": patterns_of(settings),
        "prefixes": prefixes_of(settings),
        "roles": {
            role: [writer.model_dump() | {"model": identities[writer.model]} for writer in writers]
            for role, writers in roles.items()
        },
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(grown, sort_keys=True).encode()).hexdigest()[:16]


class Grower:
    """Grows the trees of one search config into one store."""

    def __init__(
        self,
        store: TreeStore,
        endpoints: Mapping[str, Endpoint],
        roles: Mapping[str, Role],
        settings: Search,
        seed: int,
    ) -> None:
        self.store, self.roles, self.settings, self.seed = store, roles, settings, seed
        self.config = config_hash(settings, roles, {name: e.identity for name, e in endpoints.items()}, seed)
        self.progress = Progress()
        self.calls = Calls(store, endpoints, self.progress)

    def grown(self, questions: Sequence[Asked]) -> list[tuple[Task, Question, StoredTree]]:
        """Every question, later turns included, with its stored tree."""
        pairs: list[tuple[Task, Question, StoredTree]] = []
        for task, first in questions:
            question: Question | None = first
            while question is not None:
                tree = self.store.tree(self.tree_id(question))
                pairs.append((task, question, tree))
                question = question.follow_up(best_answer(tree))
        return pairs

    async def grow_all(
        self, questions: Sequence[Asked], on_progress: Callable[[Progress], None] = lambda progress: None
    ) -> Progress:
        """Grow one tree a question and turn, `trees_in_flight` at once; trees that the store has are not grown again.

        A later turn's question holds the reply of the tree before, so the turns go one after another.
        """
        progress = self.progress
        # Family after family: its trees share their worked examples, which then stay warm in the servers' caches.
        turn = sorted(questions, key=lambda asked: (asked[0].name, asked[1].family))
        progress.trees_wanted = sum(1 + len(question.later) for _, question in turn)
        while turn:
            await self._grow_turn(turn, on_progress)
            turn = [
                (task, following)
                for task, question in turn
                if question.later
                and (following := question.follow_up(best_answer(self.store.tree(self.tree_id(question))))) is not None
            ]
        return progress

    async def _grow_turn(self, questions: Sequence[Asked], on_progress: Callable[[Progress], None]) -> None:
        finished = self.store.finished(self.config)
        left: list[Asked] = []
        for task, question in questions:
            tree_id = self.tree_id(question)
            if tree_id not in finished:
                left.append((task, question))
            elif self.store.asked(tree_id) != (list(question.messages), question.gold):
                raise UsageError(
                    f"question `{question.id}` of task `{question.task}` has changed since its tree was grown; put it "
                    "back, or choose another name= (the trees are kept)"
                )
        self.progress.trees += len(questions) - len(left)
        self.progress.trees_before += len(questions) - len(left)
        gate = asyncio.Semaphore(self.settings.trees_in_flight)
        wanting: list[Growth] = []

        def store(growth: Growth) -> None:
            self.store.put(growth.stored(self.config))
            finished[growth.tree_id] = growth.search.rollouts
            self.progress.trees += 1
            on_progress(self.progress)

        async def grow(task: Task, question: Question) -> None:
            async with gate:
                growth = Growth(
                    task, question, self.tree_id(question), self.calls, self.roles, self.settings, self.seed
                )
                await growth.run()
            # Both kinds of chains were found, and the tree ended for want of rollouts alone.
            could_use_more = growth.tally.promising and growth.stopped is None and growth.search.root.open_below > 0
            if self.settings.adaptive and could_use_more:
                wanting.append(growth)
            else:
                store(growth)

        async def grow_more(growth: Growth, rollouts: int) -> None:
            async with gate:
                growth.search.rollouts_left += rollouts
                await growth.run()
            store(growth)

        async with asyncio.TaskGroup() as group:
            for task, question in left:
                group.create_task(grow(task, question))
        if wanting:
            more = self._share(questions, finished, wanting)
            async with asyncio.TaskGroup() as group:
                for growth in wanting:
                    group.create_task(grow_more(growth, more))

    def tree_id(self, question: Question) -> str:
        """The same for the same question (turn) under the same config, always."""
        turn = f"/{question.turn}" if question.turn else ""
        return hashlib.sha256(f"{question.task}/{question.id}{turn}/{self.config}".encode()).hexdigest()[:16]

    def _share(self, questions: Sequence[Asked], finished: Mapping[str, int], wanting: Sequence[Growth]) -> int:
        """Extra rollouts for each tree that could use them: an equal part of what the others left over.

        A tree gets at most as many again as it had. Journalled before it is spent, so that a resume, which finds some
        of these trees finished, shares as the first run did.
        """
        key = f"share/{self.config}/{questions[0][1].turn}".encode()
        shared = self.store.recall(key)
        if shared is None:
            base = self.settings.rollouts
            ids = [self.tree_id(question) for _, question in questions]
            pool = sum(base - finished[tree] for tree in ids if tree in finished)
            shared = str(min(base, pool // len(wanting)))
            self.store.journal([Call(key, "", "", shared)])
        return int(shared)


def best_answer(tree: StoredTree) -> str:
    """What the assistant says to a turn in the next one, the thinking and a free text's tag left out.

    The answer thought of highest reward, then of the highest mean v/n on its way, then the first; empty without any.
    """
    answers = [tree.chain(node.node_id) for node in tree.nodes if node.type == "answer"]
    return spoken(max(answers, key=merit)[-1].text) if answers else ""
