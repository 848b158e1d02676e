"""A search of very many small trees: its memory while it grows, and how soon it asks when it is started again.

    python -m benchmarks.search_resume                      100,000 trees of 2 rollouts, some minutes
    python -m benchmarks.search_resume --trees 2000         seconds
    python -m benchmarks.search_resume --filled --trees 1000000     the finished trees are generated, not grown

Each part runs in a process of its own against a stub server without delay. `begins_asking` counts from the opening of
the store and the journal to the first request, in seconds and in CPU seconds; starting Python and reading libraries
come before it. With `--filled` a store is also counted, and a tenth of it is read, written as Parquet, and read from
there as a dataset does, in an order that is not the file's.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, fields
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

import aiohttp
from benchmarks.search_server import serving
from benchmarks.search_stub import stub, stub_settings

from cotree.data.kinds import write_parquet
from cotree.models.client import Choice, Completion
from cotree.search.database import checksum
from cotree.search.journal import Journal, Progress
from cotree.search.parquet import TREES_PER_GROUP
from cotree.search.store import StoredNode, StoredTree, TreeStore, count_trees
from cotree.search.stores import TreeStores
from cotree.search.thoughts import question_name
from cotree.search.trees import TreeGrower, tree_id_of
from cotree.tasks import Question, Task
from cotree.tasks.base import Split, WorkedExample, user_prompt

TREES, MORE, STEPS = 100_000, 100, 10


class Additions(Task):
    """As many questions as are asked for: adding 1."""

    name, description, prompt_version = "additions", "sums with 1", "additions/1"
    answer_form = "number"
    waits = False

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """The first `limit` of them."""
        prompts = (user_prompt(f"What is {n} + 1? Put the final answer in \\boxed{{}}.") for n in range(limit or 0))
        return [Question(str(n), self.name, prompt, str(n + 1), family="add") for n, prompt in enumerate(prompts)]

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """One, which is no question of the task."""
        steps = {"sub_task": "I add 1 to a million.", "thinking": "1000000 + 1 = 1000001."}
        return [WorkedExample("What is 1000000 + 1? Put the final answer in \\boxed{}.", steps, "1000001")]


def batched(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    """Parts of so many, in order."""
    return (questions[start : start + size] for start in range(0, len(questions), size))


def memory_mb() -> float:
    """The resident memory of this process now, in 10^6 bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def fill(folder: Path, trees: int) -> None:
    """A store with a finished tree of 6 thoughts, and a journal with 4 completions, for each question."""
    task, config = Additions(), ""
    columns = [column.name for column in fields(StoredTree) if column.name != "nodes"]
    texts = ["I add the two numbers.", "1 and 1 more is 2, as I can count.", "The answer is: \\boxed{2}"] * 2
    nodes: list[tuple[Any, ...]] = [astuple(StoredNode(0, None, None, "", visits=2, value=1.0))]
    for n, text in enumerate(texts, 1):
        kind, verdict = ("sub_task", "thinking", "answer")[(n - 1) % 3], ("correct", "wrong")[n // 4]
        node = StoredNode(n, 0 if n in (1, 4) else n - 1, kind, text, model="stub", depth=(n - 1) % 3 + 1, tokens=12)
        node.seconds, node.visits, node.value = 0.05, 1, float(n < 4)
        if kind == "answer":
            node.verdict, node.reward, node.answer = verdict, float(verdict == "correct"), "2"
        nodes.append(astuple(node))
    said = Completion((Choice(texts[1], "stop", 12),), 200, 0, 12, 0.05)
    with TreeStore(folder / "trees.db") as store, Journal(folder / "journal.db") as journal:
        for batch in batched(task.questions(limit=trees), 1000):
            rows, rows_of_nodes, completions = [], [], []
            for question in batch:
                tree_id = tree_id_of(task, question, config)
                values = {"tree_id": tree_id, "config": config, "turn": 0, "pattern": "plain", "rollouts": 2}
                values |= {"task": task.name, "question_id": question.id, "family": question.family}
                values |= {"messages": json.dumps(question.messages), "gold": question.gold, "stopped": "rollouts"}
                values |= {"calls": 4, "prompt_tokens": 800, "cached_tokens": 0, "completion_tokens": 48}
                row, of_tree = tuple(map(values.get, columns)), [(tree_id, *node) for node in nodes]
                rows.append((*row, checksum(row, of_tree)))
                rows_of_nodes += of_tree
                name = question_name(question)
                completions += [(hashlib.sha256(f"{n}/{name}".encode()).digest(), name, said) for n in range(4)]
            with store._transaction():
                for table, new in (("trees", rows), ("nodes", rows_of_nodes)):
                    store._db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(new[0]))})", new)
            journal.add(completions)


def read_store(folder: Path) -> dict[str, Any]:
    """What opening, counting, reading and writing as Parquet take; a tenth of the trees is read and written."""
    started, found = time.perf_counter(), dict[str, Any]()

    def note(what: str) -> None:
        nonlocal started
        found[what] = round(time.perf_counter() - started, 2)
        started = time.perf_counter()

    with TreeStore(folder / "trees.db") as store:
        note("open_seconds")
        found["counted"] = count_trees(folder / "trees.db")
        note("count_seconds")
        found["read"] = sum(1 for _ in islice(store.trees(), found["counted"] // 10))
        note("read_seconds")
        rows = map(asdict, islice(store.trees(), found["counted"] // 10))
        path, columns = folder / "trees.parquet", get_type_hints(StoredTree)
        write_parquet(path, columns, rows, {}, rows_per_group=TREES_PER_GROUP, checksums=True)
        note("parquet_seconds")
        found["parquet_mb"] = path.stat().st_size / 1e6
        with TreeStores([path]) as trees:
            note("parquet_open_seconds")
            ids = sorted(trees.finished(), key=lambda tree_id: tree_id[::-1])
            found["parquet_read"] = sum(1 for _ in map(trees.tree, ids))
        note("parquet_read_seconds")
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return found


async def grow(url: str, folder: Path, trees: int) -> dict[str, Any]:
    """Grow so many trees, or those that are missing; memory after every tenth, and when the first request went out."""
    task = Additions()
    asked = [(task, question) for question in task.questions(limit=trees)]
    first: list[float] = []
    original = aiohttp.ClientSession.request

    def request(self: aiohttp.ClientSession, method: str, url: Any, **options: Any) -> Any:
        # Looking at the servers comes before.
        if started and method == "POST" and not first:
            first.extend((time.perf_counter() - started, time.process_time() - cpu))
        return original(self, method, url, **options)

    aiohttp.ClientSession.request = request  # type: ignore[assignment,method-assign]
    memory: dict[int, float] = {}

    def look(progress: Progress) -> None:
        if progress.trees % max(trees // STEPS, 1) == 0:
            memory[progress.trees] = round(memory_mb(), 1)

    settings = stub_settings(rollouts=2, leaves_per_round=1, trees_in_flight=256)
    started = cpu = 0.0
    async with stub(url, 256) as endpoints:
        first.clear()
        before, started, cpu = memory_mb(), time.perf_counter(), time.process_time()
        with TreeStore(folder / "trees.db") as store, Journal(folder / "journal.db") as journal:
            grower = TreeGrower(store, journal, settings, endpoints=endpoints, config="", seed=0, on_progress=look)
            progress = await grower.grow(asked)
    return {
        "trees": progress.trees,
        "grown": progress.trees - progress.trees_before,
        "begins_asking": [round(seconds, 2) for seconds in first],
        "seconds": round(time.perf_counter() - started, 1),
        "memory_mb_before": round(before, 1),
        "memory_mb": memory,
    }


def measure(trees: int, *, filled: bool) -> dict[str, Any]:
    """Grow or generate all in one process, then grow a few more in another one that finds these finished."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder, serving(0.0) as url:

        def part(number: int, *how: str) -> dict[str, Any]:
            command = [sys.executable, "-m", "benchmarks.search_resume", "--trees", str(number), *how, folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            return dict(json.loads(done.stdout.splitlines()[-1]))

        found = {"filled": part(trees, "--fill")} if filled else {"grown": part(trees, "--grow", url)}
        found["mb"] = {path.name: path.stat().st_size / 1e6 for path in sorted(Path(folder).glob("*.db"))}
        found["resumed"] = part(trees + MORE, "--grow", url)
        if filled:
            found["read"] = part(trees, "--read")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=int, default=TREES)
    parser.add_argument("--filled", action="store_true", help="generate the finished trees")
    parser.add_argument("--grow", nargs=2, metavar=("URL", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--fill", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--read", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grow:
        print(json.dumps(asyncio.run(grow(options.grow[0], Path(options.grow[1]), options.trees))))
    elif options.fill:
        started = time.perf_counter()
        fill(Path(options.fill), options.trees)
        print(json.dumps({"seconds": time.perf_counter() - started}))
    elif options.read:
        print(json.dumps(read_store(Path(options.read))))
    else:
        print(json.dumps(measure(options.trees, filled=options.filled), indent=1))


if __name__ == "__main__":
    main()
