"""The viewer over a large store: opening it, lists, searches and memory, over HTTP; and its page in a browser.

    make bench-view                          100,000 trees of 10 thoughts, and one of 20,000 in headless Chromium
    python -m benchmarks.view --tiny         seconds: shows that it runs, the numbers mean little

Writes benchmarks/out/view.json. The server is `cotree view` in a process of its own. `open_seconds`: from its address
to the first page of the list, with the index that a search writes; `index_seconds`: once, for a store without one.
`list_ms` and `search_ms`: of each request the median of 9, of all filters and sorts (searches) the slowest one.
`tree_ms`: one tree of 20,000 thoughts as JSON. `peak_mb`: the server's resident peak. What the page adds
(`first_paint_ms`, `frame_ms`, ...) is described in benchmarks/view_browser.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import Request, urlopen

from benchmarks.store import generated
from benchmarks.view_browser import large_tree, measure_page

from cotree.base.machine import usable_cores
from cotree.base.numbers import number
from cotree.base.run_folder import NodeRecord, RunFolder
from cotree.search.index import TreeIndex
from cotree.search.store import TreeStore

OUT = Path(__file__).parent / "out" / "view.json"
TREES, THOUGHTS, TINY, REPEATS = 100_000, 12, 200, 9  # 12 make 10 thoughts and more below the root
RECIPE = """name: bench
models: {m: {weights: smollm2-135m-instruct}}
trees:
  train: {questions: {arithmetic: 1}, roles: {thinker: m}}
  large: {like: train, rollouts: 9}
"""
LISTS = (
    "", "sort=hard", "sort=tokens&desc=1", "sort=depth&offset=5000", "verdicts=mixed&sort=correct_share",
    "verdicts=all_wrong&min_depth=3", "task=arithmetic&forced=1", "reflected=helped&looped=1", "annotated=0&sort=hard",
)  # fmt: skip
SEARCHES = ("q=apple", "q=appl+box+carry", "q=twel&sort=hard", "q=77", "q=nowhere")


def make_run(folder: Path, trees: int) -> dict[str, Any]:
    """A run of generated trees and one large one; how long storing and indexing took."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    run, rng = RunFolder(folder), random.Random(0)
    for name in ("train", "large"):
        run.node(f"trees/{name}").write(NodeRecord(name, "bench" if name == "train" else "c", done=True))
    thoughts = 0
    with TreeStore(folder / "trees/train/trees.db") as store, TreeIndex(store) as index:
        started = time.perf_counter()
        for count in range(trees):
            tree = generated(count, THOUGHTS, rng)
            thoughts += len(tree.nodes) - 1
            store.put(tree)
        stored = time.perf_counter()
        index.fill()
        took = {"store_seconds": stored - started, "index_seconds": time.perf_counter() - stored}
    with TreeStore(folder / "trees/large/trees.db") as store, TreeIndex(store) as index:
        store.put(large_tree())
        index.fill()
    return {"trees": trees, "thoughts": thoughts, **took}


def get(address: str, path: str) -> tuple[float, Any]:
    """The seconds of a request, and its answer."""
    started = time.perf_counter()
    with urlopen(f"{address}api/{path}") as reply:  # a process of ours, on loopback
        content = reply.read()
    return time.perf_counter() - started, json.loads(content)


def slowest(address: str, queries: tuple[str, ...]) -> tuple[float, str]:
    """Of the medians of several requests each, the slowest one in ms, and which it is."""
    medians = {query: median(get(address, f"trees/train?{query}")[0] for _ in range(REPEATS)) for query in queries}
    worst = max(medians, key=medians.__getitem__)
    return 1000 * medians[worst], worst


def measure_server(folder: Path) -> dict[str, Any]:
    """What the server needs to open the store and to answer."""
    command = [sys.executable, "-m", "cotree.cli", "view", str(folder), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://[^/]+/", process.stdout.readline())
        assert found is not None
        address = found[0]
        opened, page = get(address, "trees/train?sort=hard")
        _annotate(address, page["rows"][0]["tree"])
        list_ms, slow_list = slowest(address, LISTS)
        search_ms, slow_search = slowest(address, SEARCHES)
        large = get(address, "trees/large")[1]["rows"][0]["tree"]
        tree_ms = 1000 * median(get(address, f"trees/large/{large}")[0] for _ in range(REPEATS))
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert peak is not None
    finally:
        process.terminate()
        process.wait()
    return {
        "open_seconds": opened, "list_ms": list_ms, "slowest_list": slow_list, "search_ms": search_ms,
        "slowest_search": slow_search, "tree_ms": tree_ms, "peak_mb": int(peak[1]) * 1024 / 1e6,
    }  # fmt: skip


def _annotate(address: str, tree: str) -> None:
    """Annotate a chain of a tree, so that lists have an annotation to look at."""
    found = get(address, f"trees/train/{tree}")[1]
    leaf = next(thought[0] for thought in found["thoughts"] if thought[found["columns"].index("verdict")])
    body = {"node": "train", "tree": tree, "leaf": leaf, "annotator": "bench", "verdict": "accept"}
    sent = Request(f"{address}api/annotations", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(sent) as reply:
        reply.read()


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small store and no browser")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = make_run(Path(folder) / "bench", TINY if options.tiny else TREES)
        result |= measure_server(Path(folder) / "bench")
    if not options.tiny:
        result |= asyncio.run(measure_page())
    about = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "cores": usable_cores()}
    result |= about | {"python": platform.python_version()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{number(result['trees'])} trees, {number(result['thoughts'])} thoughts")
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:<16}{value:>10.2f}")
    print(f"slowest list: {result['slowest_list']}; slowest search: {result['slowest_search']}\n{options.out}")


if __name__ == "__main__":
    main()
