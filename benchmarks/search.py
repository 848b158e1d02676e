"""Search speed, ratios side by side in one run: cotree, the bare HTTP client, raw requests, treequest.

    make bench-search                           all parts
    python -m benchmarks.search --tiny          seconds: shows that it runs, the numbers mean little

Writes benchmarks/out/search.json. Ratios and CPU times carry from one machine to another, absolute rates do not.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.search_embedded import Shares, compare
from benchmarks.search_server import cpu_ms_per_request, serving
from benchmarks.search_stub import Grown, many_questions, one_tree, stub
from benchmarks.search_table import table
from benchmarks.search_tree import bytes_a_thought, milliseconds

from cotree.tasks import task

OUT = Path(__file__).parent / "out" / "search.json"
LATENCY = 0.05


@dataclass(frozen=True)
class Size:
    """How much of everything; the same parts at every size."""

    questions: int = 600
    in_flight: int = 512
    repeats: int = 3
    wide_rollouts: int = 64
    leaves: tuple[int, ...] = (1, 4, 8, 16)
    wide_trees: int = 3
    tree_sizes: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    memory_size: int = 10_000
    embedded_questions: int = 16
    embedded_rounds: int = 2
    embedded_rollouts: int | None = None
    peer_sizes: tuple[int, ...] = (100, 1_000, 1_766)


TINY = Size(8, 32, 1, 8, (1, 4), 1, (100, 200), 200, 2, 1, 1, (50, 100))


def measure(size: Size, seed: int) -> dict[str, Any]:
    """All parts, one after another."""
    started = time.perf_counter()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, Python {platform.python_version()}",
        "seed": seed,
        "tree_ms_per_thought": milliseconds(size.tree_sizes, seed),
        "memory_bytes_per_thought": bytes_a_thought(size.memory_size, seed),
    }
    with serving(LATENCY) as url:
        result |= asyncio.run(_stub(url, size, seed))
        result["server_cpu_ms_per_request"] = cpu_ms_per_request(url)
        if "treequest" in result:
            result["treequest"] |= _treequest(url, size, seed)
            ours, theirs = result["stub_rollouts_per_second"], result["treequest"]["rollouts_per_second"]
            result["rollouts_ratio_to_treequest"] = ours / theirs
    shares = asyncio.run(_embedded(size, seed))
    result["embedded_tokens_per_second"] = vars(shares)
    result["embedded_share_of_raw"] = shares.search / shares.raw
    result["embedded_share_of_evaluation"] = shares.search / shares.evaluation
    result["seconds"] = time.perf_counter() - started
    return result


async def _embedded(size: Size, seed: int) -> Shares:
    return await compare(
        questions=size.embedded_questions, rounds=size.embedded_rounds, rollouts=size.embedded_rollouts, seed=seed
    )


async def _stub(url: str, size: Size, seed: int) -> dict[str, Any]:
    """The best of several repeats of each side, which take turns: a busy machine can only slow them down."""
    peers: list[dict[str, float]] = []
    async with stub(url, size.in_flight) as endpoints:
        options = {"questions": size.questions, "in_flight": size.in_flight}
        runs = []
        for repeat in range(size.repeats):
            runs.append(await many_questions(endpoints, **options, seed=seed + repeat))
            if importlib.util.find_spec("treequest") is not None:
                peers.append(await _treequest_trees(url, size))
        one = await one_tree(
            endpoints, leaves=size.leaves, rollouts=size.wide_rollouts, trees=size.wide_trees, seed=seed
        )
    grown: Grown = min((grown for grown, _ in runs), key=lambda grown: grown.seconds / grown.thoughts)
    cpu = min(grown.cpu_seconds / grown.thoughts for grown, _ in runs)
    bare_cpu = min(bare.cpu_seconds / len(bare.replies) for _, bare in runs)
    return {
        "stub_thoughts_per_second": grown.thoughts / grown.seconds,
        "stub_requests_per_second": grown.calls / grown.seconds,
        "stub_rollouts_per_second": grown.rollouts / grown.seconds,
        "bare_requests_per_second": max(len(bare.replies) / bare.seconds for _, bare in runs),
        "thoughts_per_request": grown.thoughts / grown.calls,
        "cpu_ms_per_thought": 1000 * cpu,
        "cpu_ms_per_request": 1000 * cpu * grown.thoughts / grown.calls,
        "cpu_ms_per_rollout": 1000 * cpu * grown.thoughts / grown.rollouts,
        "bare_cpu_ms_per_request": 1000 * bare_cpu,
        "cpu_ratio_to_bare_client": cpu / bare_cpu,
        "one_tree_seconds": one,
        "one_tree_speedup": one[min(size.leaves)] / one[max(size.leaves)],
        "one_tree_rollouts": size.wide_rollouts,
        **({"treequest": _best(peers)} if peers else {}),
    }


async def _treequest_trees(url: str, size: Size) -> dict[str, float]:
    """treequest with as many small trees."""
    from benchmarks.search_treequest import trees

    gc.freeze()  # cotree's libraries are no part of what Python's garbage collector would look through for treequest
    questions = task("letters").questions(None, size.questions)
    run = await trees(url, questions, rollouts=8, samples=2, in_flight=size.in_flight // 2)
    gc.unfreeze()
    return {
        "rollouts_per_second": run.rollouts / run.seconds,
        "requests_per_second": run.requests / run.seconds,
        "cpu_ms_per_rollout": 1000 * run.cpu_seconds / run.rollouts,
        "cpu_ms_per_request": 1000 * run.cpu_seconds / run.requests,
    }


def _best(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure the best: the most a second, the least time."""
    return {name: (max if "second" in name else min)(run[name] for run in runs) for name in runs[0]}


def _treequest(url: str, size: Size, seed: int) -> dict[str, Any]:
    from importlib.metadata import version

    from benchmarks.search_treequest import bytes_a_node, milliseconds, one_tree_steps, trees

    questions = task("letters").questions(None, size.questions)
    steps = one_tree_steps(url, questions[0], size.wide_rollouts)
    batch = max(size.leaves)
    alone = asyncio.run(trees(url, questions[:1], rollouts=size.wide_rollouts, samples=batch, in_flight=1))
    return {
        "version": version("treequest"),
        "ms_per_node": milliseconds(size.peer_sizes, seed, nodes=min(30, min(size.peer_sizes) // 2)),
        "memory_bytes_per_node": bytes_a_node(min(1000, size.memory_size), seed),
        "one_tree_seconds": {"step": steps.seconds, f"ask_batch({batch})": alone.seconds},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="seconds; the numbers mean little")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    result = measure(TINY if options.tiny else Size(), options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    if "treequest" not in result:
        print("treequest is not installed, so it is not measured: pip install 'cotree[bench]'")
    print(f"{result['machine']}, {result['date']}, seed {result['seed']}, {result['seconds']:.0f} s: {options.out}")


if __name__ == "__main__":
    main()
