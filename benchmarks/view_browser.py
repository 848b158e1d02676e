"""The viewer's page with one tree of 20,000 thoughts, in headless Chromium without a GPU.

    python -m benchmarks.view_browser       prints what `make bench-view` also measures; half a minute

`first_paint_ms`: from the last byte of the tree's JSON to the frame in which it is drawn. `open_ms`: the same from the
click on its question, the server's work and 7 MB over loopback included. Both are the median of 5 opens in
one page.
`frame_ms`: the median interval of two frames (requestAnimationFrame) while a pointer drags the whole tree for 3 s;
`frame_zoomed_ms`: where its words can be read.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from tests.support.browser import CHROMIUM, Browser, browser
from tests.support.trees import node, tree_of
from tests.support.viewer import viewer

from cotree.base.run_folder import NodeRecord, RunFolder
from cotree.search.store import StoredTree, TreeStore

THOUGHTS, OPENS = 20_000, 5
WORDS = "add the numbers then carry one more apple to each box so that three times four is twelve again".split()  # noqa: SIM905
TREE = "f" * 16
RECIPE = """name: large
models: {m: {weights: smollm2-135m-instruct}}
trees: {train: {questions: {arithmetic: 1}, roles: {thinker: m}}}
"""

# Open the tree from the list and wait until it is drawn; [since the answer's last byte, since the click].
OPEN = """(async () => {
  performance.clearMarks(); performance.clearResourceTimings();
  const clicked = performance.now();
  location.hash = "#/trees/train/TREE";
  while (!performance.getEntriesByName("tree drawn").length) await new Promise((done) => setTimeout(done, 5));
  const drawn = performance.getEntriesByName("tree drawn")[0].startTime;
  const answer = performance.getEntriesByType("resource").find((entry) => entry.name.endsWith("TREE"));
  return [drawn - answer.responseEnd, drawn - clicked];
})()""".replace("TREE", TREE)
# Drag in a circle for 3 s; the intervals of frames.
PAN = """new Promise((done) => {
  const canvas = document.querySelector("canvas.tree");
  const box = canvas.getBoundingClientRect();
  const point = (kind, x, y) => canvas.dispatchEvent(
    new PointerEvent(kind, { pointerId: 1, bubbles: true, clientX: box.left + x, clientY: box.top + y }));
  const intervals = [];
  const started = performance.now();
  let last;
  point("pointerdown", 400, 300);
  const step = (now) => {
    if (last !== undefined) intervals.push(now - last);
    last = now;
    const seconds = (performance.now() - started) / 1000;
    point("pointermove", 400 + 200 * Math.sin(4 * seconds), 300 + 200 * (1 - Math.cos(4 * seconds)));
    if (seconds < 3) return requestAnimationFrame(step);
    point("pointerup", 400, 300);
    done(intervals);
  };
  requestAnimationFrame(step);
})"""


def large_tree(thoughts: int = THOUGHTS) -> StoredTree:
    """A tree of random shape, 8 thoughts deep, half of it judged answers of 40 words."""
    rng = random.Random(0)
    nodes, depths, inner = [node(0, None, None)], [0], [0]
    while len(nodes) <= thoughts:
        above = rng.choice(inner)
        goes_on = depths[above] < 7 and rng.random() < 0.5
        kind = rng.choice(["sub_task", "thinking", "double_check"]) if goes_on else "answer"
        verdict = None if goes_on else rng.choice(["correct", "wrong", "wrong", "no_answer"])
        if goes_on:
            inner.append(len(nodes))
        depths.append(depths[above] + 1)
        nodes.append(node(len(nodes), above, kind, " ".join(rng.choices(WORDS, k=40)), verdict))
    return replace(tree_of("large", nodes), tree_id=TREE)


async def measure_page() -> dict[str, float]:
    """The figures, none where there is no browser."""
    if CHROMIUM is None:
        print("the page is not measured: there is no Chromium (Debian: apt install chromium)")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        (run.path / "recipe.yaml").write_text(RECIPE)
        trees = run.node("trees/train")
        trees.write(NodeRecord("f", "c", done=True))
        with TreeStore(trees.path / "trees.db") as store:
            store.put(large_tree())
        async with viewer(run) as address, browser() as page:
            return await _measured(page, address)


async def _measured(page: Browser, address: str) -> dict[str, float]:
    opened = []
    await page.open(f"{address}#/experiment")
    for _ in range(OPENS):
        await page.run('location.hash = "#/experiment"')
        await page.until('!!document.querySelector("main.reading")')
        opened.append(await page.run(OPEN))
    frames = {"frame_ms": median(await page.run(PAN))}
    await page.run('for (let i = 0; i < 40; i++) document.querySelector(".tools button:nth-child(2)").click()')
    frames["frame_zoomed_ms"] = median(await page.run(PAN))
    first, whole = (median(each) for each in zip(*opened, strict=True))
    return {"first_paint_ms": first, "open_ms": whole, **frames}


if __name__ == "__main__":
    for name, value in asyncio.run(measure_page()).items():
        print(f"{name:16} {value:.1f}")
