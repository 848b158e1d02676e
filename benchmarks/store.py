"""Speed and memory of datasets over a large store: generated trees, read, gated, selected and written as they stream.

    make bench-store                          100,000 trees of 60 thoughts, an SFT and a DPO dataset
    python -m benchmarks.store --tiny         seconds: shows that it runs, the numbers mean little

Writes benchmarks/out/store.json. Each dataset reads all trees, so `trees_per_second` counts every tree twice.
`peak_mb` is the resident peak of the whole building process, libraries included;
`peak_mb_tenth` is the same after a tenth of the trees: memory that grew with the trees would show between the two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cotree.data.build import build_dataset
from cotree.data.gates import Rules
from cotree.data.settings import Dataset, RowKind
from cotree.models.tokenizer import load_tokenizer
from cotree.models.weights import locate
from cotree.search.store import StoredNode, StoredTree, TreeStore
from cotree.search.thoughts import PREFIXES

OUT = Path(__file__).parent / "out" / "store.json"
TREES, THOUGHTS, TINY = 100_000, 60, 40
WORDS = "add the numbers then carry one more apple to each box so that three times four is twelve again".split()  # noqa: SIM905


def generated(number: int, thoughts: int, rng: random.Random) -> StoredTree:
    """2 sub-tasks, thinking below them, each checked and answered, a third of the answers right."""
    nodes: list[StoredNode] = []

    def add(parent: int | None, kind: str | None, verdict: str | None = None) -> int:
        words = "" if kind is None else f"{PREFIXES[kind][0]} {' '.join(rng.choices(WORDS, k=12))}".strip()
        text = f"The answer is: \\boxed{{{rng.randrange(100)}}}" if kind == "answer" else words
        reward = None if verdict is None else float(verdict == "correct")
        depth = 0 if parent is None else nodes[parent].depth + 1
        nodes.append(
            StoredNode(
                node_id=len(nodes),
                parent_id=parent,
                type=kind,
                text=text,
                prefix="",
                model="m",
                depth=depth,
                visits=1,
                value=reward or 0.0,
                verdict=verdict,
                reward=reward,
                answer=None,
                tokens=12,
                finish_reason="stop",
                seed=0,
                seconds=0.1,
            )
        )
        return len(nodes) - 1

    add(None, None)
    tasks = [add(0, "sub_task") for _ in range(2)]
    while len(nodes) <= thoughts - 3:
        checked = add(add(rng.choice(tasks), "thinking"), "double_check")
        add(checked, "answer", rng.choice(["correct", "wrong", "wrong"]))
    prompt = [{"role": "user", "content": f"What is {number} + 1? Put the final answer in \\boxed{{}}."}]
    return StoredTree(
        tree_id=f"{number:016x}",
        task="arithmetic",
        question_id=str(number),
        turn=0,
        config="bench",
        family="sum",
        messages=prompt,
        gold="1",
        pattern="double_check",
        rollouts=20,
        stopped="rollouts",
        calls=20,
        prompt_tokens=100,
        cached_tokens=0,
        completion_tokens=700,
        nodes=nodes,
    )


def fill(path: Path, trees: int) -> None:
    """A store of generated trees; the same ones every time."""
    rng = random.Random(0)
    with TreeStore(path) as store:
        for number in range(trees):
            store.put(generated(number, THOUGHTS, rng))


def build_measured(store: Path, out: Path) -> dict[str, Any]:
    """Build both datasets in this process; rows, chains, seconds and the peak of memory in MB (10^6 bytes)."""
    tokenizer = load_tokenizer(locate("smollm2-135m-instruct"))
    kinds: tuple[RowKind, ...] = ("sft", "dpo")
    rows = chains = 0
    started = time.perf_counter()
    with TreeStore(store) as trees:
        for kind in kinds:
            rules = Rules(Dataset(trees=("generated",), rows=kind), tokenizer)
            counts = build_dataset(rules, out / kind, name=kind, trees=trees.trees())
            rows, chains = rows + counts.rows, chains + counts.chains
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"rows": rows, "chains": chains, "seconds": seconds, "peak_mb": peak}


def measure(trees: int) -> dict[str, Any]:
    """A tenth and all, each in a fresh process, so that one's peak is not the other's."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder, found = Path(name), []
        for part in (max(trees // 10, 1), trees):
            started = time.perf_counter()
            fill(folder / f"{part}.db", part)
            print(f"{part:,} trees generated in {time.perf_counter() - started:.0f} s", flush=True)
            command = [sys.executable, "-m", "benchmarks.store", "--build", str(folder / f"{part}.db")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            (folder / f"{part}.db").unlink()
    tenth, whole = found
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, Python {platform.python_version()}",
        "trees": trees,
        "thoughts_per_tree": THOUGHTS,
        "rows_per_second": whole["rows"] / whole["seconds"],
        "trees_per_second": 2 * trees / whole["seconds"],
        "peak_mb": whole["peak_mb"],
        "peak_mb_tenth": tenth["peak_mb"],
        **{name: whole[name] for name in ("rows", "chains", "seconds")},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build is not None:
        with tempfile.TemporaryDirectory(dir=options.build.parent) as out:
            print(json.dumps(build_measured(options.build, Path(out))))
        return
    result = measure(TINY if options.tiny else TREES)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['trees']:,} trees of {THOUGHTS} thoughts, {result['chains']:,} chains -> {result['rows']:,} rows in "
        f"{result['seconds']:.0f} s: {result['rows_per_second']:.0f} rows/s, {result['trees_per_second']:.0f} trees/s, "
        f"peak {result['peak_mb']:.0f} MB ({result['peak_mb_tenth']:.0f} MB for a tenth of the trees)"
    )


if __name__ == "__main__":
    main()
