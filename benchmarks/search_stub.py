"""cotree's search against a stub server of 50 ms: many questions from one process, and one tree alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.search_raw import Replay, Sent, recorded, replay

from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.models.settings import Model
from cotree.models.weights import locate
from cotree.search.journal import Journal
from cotree.search.settings import Trees
from cotree.search.store import TreeStore
from cotree.search.trees import TreeGrower
from cotree.tasks import Question, Task, task

# A tree that is wide enough for many leaves a round: 8 x 8 thoughts before the answers.
WIDE = {
    "root": {"sub_task": 8},
    "sub_task": {"thinking": 8},
    "thinking": {"answer": 1},
    "reflection": {"thinking": 1},
}


@dataclass(frozen=True)
class Grown:
    """What growing trees took, and every request on the way."""

    seconds: float
    cpu_seconds: float
    rollouts: int
    thoughts: int
    calls: int
    tokens: int
    store_bytes: int
    journal_bytes: int
    sent: list[Sent]


Endpoints = Mapping[str, Endpoint]


async def grow(endpoints: Endpoints, settings: Trees, questions: Sequence[tuple[Task, Question]], seed: int) -> Grown:
    """Grow the trees into a new store on disk with a new journal, as a run does."""
    with TemporaryDirectory() as name:
        at_store, at_journal = Path(name) / "t.db", Path(name) / "j.db"
        with TreeStore(at_store) as store, Journal(at_journal) as kept:
            with recorded() as sent:
                started, cpu = time.perf_counter(), time.process_time()
                grower = TreeGrower(store, kept, settings, endpoints=endpoints, config="", seed=seed)
                progress = await grower.grow(questions)
                seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
            rollouts = sum(store.finished().values())
        sizes = at_store.stat().st_size, at_journal.stat().st_size
    return Grown(seconds, cpu_seconds, rollouts, progress.thoughts, progress.calls, progress.tokens, *sizes, sent)


def stub_settings(**settings: Any) -> Trees:
    """A search whose only writer is the stub server."""
    return Trees.model_validate({"questions": {"letters": 1}, "roles": {"thinker": "stub"}} | settings)


def stub(url: str, in_flight: int) -> AbstractAsyncContextManager[Endpoints]:
    """The stub server as a recipe names it; prompts are rendered and texts counted with a real tokenizer."""
    tokenizer = str(locate("smollm2-135m-instruct"))
    return open_endpoints({"stub": Model(url=url, tokenizer=tokenizer, max_in_flight=in_flight)})


async def many_questions(endpoints: Endpoints, *, questions: int, in_flight: int, seed: int) -> tuple[Grown, Replay]:
    """Many trees at once with the shipped patterns, and the bare client with the same bodies."""
    letters = task("letters")
    asked = [(letters, question) for question in letters.questions(None, questions)]
    settings = stub_settings(rollouts=8, leaves_per_round=2, trees_in_flight=in_flight // 2)
    grown = await grow(endpoints, settings, asked, seed)
    return grown, await replay(grown.sent, in_flight)


async def one_tree(
    endpoints: Endpoints, *, leaves: Sequence[int], rollouts: int, trees: int, seed: int
) -> dict[int, float]:
    """Median seconds of one wide tree grown alone, by leaves a round, at equal rollouts."""
    letters = task("letters")
    seconds: dict[int, float] = {}
    for k in leaves:
        settings = stub_settings(rollouts=rollouts, leaves_per_round=k, patterns={"wide": WIDE})
        grown = [
            await grow(endpoints, settings, [(letters, question)], seed) for question in letters.questions(None, trees)
        ]
        assert all(one.rollouts == rollouts for one in grown)
        seconds[k] = statistics.median(one.seconds for one in grown)
    return seconds
