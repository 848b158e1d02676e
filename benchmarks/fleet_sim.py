"""What growing trees for 10 thousand, a million or 100 million questions takes: GPU hours, servers, driver, disk.

    python -m benchmarks.fleet_sim                                    the table
    python -m benchmarks.fleet_sim --tokens 6000 --speed 1500 --gpus 4 --days 7
    python -m benchmarks.fleet_sim --check                            predicts small runs and makes them, two minutes

The table is arithmetic on `Tree` (what a tree of yours takes: a run's `summary.json` has it), on `Server` (how fast
yours are) and on `Costs` (what cotree itself takes). `--check` measures small runs, predicts larger ones by the same
arithmetic, makes these too, and prints both: the time at two and four servers with a rate limit from that at one, the
driver's CPU time, tokens and disk of 720 trees from those of 180.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.fleet import RATE, measure

# Trees in one SQLite file; beyond it opening, copying and merging take minutes, and a shard is the better part.
MOST_IN_A_STORE = 1_000_000


@dataclass(frozen=True)
class Tree:
    """What one question's tree takes on average: requests, generated tokens, bytes in `trees.db` and `journal.db`."""

    requests: float
    tokens: float
    store_bytes: float
    journal_bytes: float


@dataclass(frozen=True)
class Server:
    """A model server: generated tokens a second with many requests in flight, and the GPUs that it holds."""

    tokens_per_second: float
    gpus: int


@dataclass(frozen=True)
class Costs:
    """What cotree takes: CPU seconds of the driver a request, trees a second that a dataset is built from; and the
    hours within which all trees are to be there."""

    cpu_per_request: float
    trees_read_per_second: float
    hours: float


@dataclass(frozen=True)
class Plan:
    """One row of the table; times in hours, sizes in GB (10^9 bytes).

    servers: that finish in time. driver_cores: that ask them; one process uses one, so more of them are shards.
    stores: files of at most a million trees. dataset_hours: of one process for one dataset. bottleneck: what sets the
    time, and what it takes to move on.
    """

    questions: int
    gpu_hours: float
    servers: int
    requests_per_second: float
    driver_cores: float
    store_gb: float
    journal_gb: float
    stores: int
    dataset_hours: float
    bottleneck: str


def seconds_of(trees: int, tree: Tree, tokens_per_second: float, cpu_per_request: float) -> float:
    """How long servers of so many tokens a second together take for some trees, or one driver, whichever is slower."""
    return trees * max(tree.tokens / tokens_per_second, tree.requests * cpu_per_request)


def plan(questions: int, tree: Tree, server: Server, costs: Costs) -> Plan:
    """What it takes to grow the trees of so many questions within `costs.hours`."""
    server_seconds = seconds_of(questions, tree, server.tokens_per_second, 0.0)
    servers = math.ceil(server_seconds / (3600 * costs.hours))
    rate = servers * server.tokens_per_second / tree.tokens * tree.requests
    cores, stores = rate * costs.cpu_per_request, math.ceil(questions / MOST_IN_A_STORE)
    bottleneck = "servers; one process and one store are enough"
    if stores > 1:
        bottleneck = f"servers; {stores} stores, as one file would be too large"
    if cores > 1:
        bottleneck = (
            f"one driver, which asks {1 / costs.cpu_per_request:,.0f} requests/s: {math.ceil(cores)} shards at least"
        )
    return Plan(
        questions,
        gpu_hours=server_seconds * server.gpus / 3600,
        servers=servers,
        requests_per_second=rate,
        driver_cores=cores,
        store_gb=questions * tree.store_bytes / 1e9,
        journal_gb=questions * tree.journal_bytes / 1e9,
        stores=stores,
        dataset_hours=questions / costs.trees_read_per_second / 3600,
        bottleneck=bottleneck,
    )


def table(plans: Sequence[Plan]) -> str:
    """A line for each number of questions."""
    heads = ("questions", "GPU hours", "servers", "requests/s", "driver cores", "trees.db GB", "journal.db GB")
    lines = [f"| {' | '.join(heads)} | stores | dataset, hours of one core | bottleneck |"]
    lines.append("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    lines += [
        f"| {p.questions:,} | {p.gpu_hours:,.0f} | {p.servers:,} | {p.requests_per_second:,.0f} | {p.driver_cores:.2g} "
        f"| {p.store_gb:,.1f} | {p.journal_gb:,.1f} | {p.stores} | {p.dataset_hours:,.1f} | {p.bottleneck} |"
        for p in plans
    ]
    return "\n".join(lines)


async def check(trees: int, seed: int) -> list[dict[str, Any]]:
    """Predictions of larger runs from smaller ones, each with what was then measured."""
    found: list[dict[str, Any]] = []

    def add(run: dict[str, float], **predicted: float) -> None:
        for what, value in predicted.items():
            found.append({"trees": run["trees"], "what": what, "predicted": value, "measured": run[what]})
            found[-1]["ratio"] = value / run[what]

    one = await measure(1, trees, seed)
    for count in (2, 4):
        run = await measure(count, trees, seed + count)
        tokens_per_second = count * RATE * one["tokens"] / one["calls"]
        add(run, seconds=seconds_of(int(run["trees"]), tree_of(one), tokens_per_second, 0.0))
    few, many = [await measure(1, 180 * times, seed, rate=math.inf) for times in (1, 4)]
    tree, cpu = tree_of(few), few["cpu_seconds"] / few["calls"]
    add(
        many,
        cpu_seconds=many["trees"] * tree.requests * cpu,
        tokens=many["trees"] * tree.tokens,
        store_bytes=many["trees"] * tree.store_bytes,
        journal_bytes=many["trees"] * tree.journal_bytes,
    )
    return found


def tree_of(run: dict[str, float]) -> Tree:
    """What a tree of a measured run took."""
    return Tree(*(run[what] / run["trees"] for what in ("calls", "tokens", "store_bytes", "journal_bytes")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = {"type": float, "metavar": "N"}
    parser.add_argument("--requests", default=20, **number, help="of a tree")
    parser.add_argument("--tokens", default=3000, **number, help="that a tree's requests generate")
    parser.add_argument("--store-bytes", default=15_000, **number, help="of a tree in trees.db")
    parser.add_argument("--journal-bytes", default=20_000, **number, help="of a tree in journal.db")
    parser.add_argument("--speed", default=2500, **number, help="generated tokens a second of one server")
    parser.add_argument("--gpus", type=int, default=4, help="of one server")
    parser.add_argument("--days", default=3, **number, help="until the last tree")
    parser.add_argument("--cpu-ms", default=0.4, **number, help="of the driver a request (make bench-search)")
    parser.add_argument("--trees-read", default=100, **number, help="a second, into one dataset (make bench-store)")
    parser.add_argument("--questions", type=int, nargs="+", default=[10_000, 1_000_000, 100_000_000])
    parser.add_argument("--check", action="store_true", help="predict small runs and make them")
    parser.add_argument("--trees", type=int, default=40, help="a server, of --check")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    if o.check:
        print(json.dumps(asyncio.run(check(o.trees, o.seed)), indent=1))
        return
    tree, server = Tree(o.requests, o.tokens, o.store_bytes, o.journal_bytes), Server(o.speed, o.gpus)
    costs = Costs(o.cpu_ms / 1000, o.trees_read, 24 * o.days)
    print(table([plan(questions, tree, server, costs) for questions in o.questions]))


if __name__ == "__main__":
    main()
