"""The pictures of the README and of docs/viewer.md, taken of a run in headless Chromium.

    python -m benchmarks.screenshots runs/laptop         after `make demo`; writes docs/images/*.png, each under 200 KB

The tree is, of the first questions of the list, the one whose chains most datasets took, and then the largest.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import aiohttp
from tests.support.browser import Browser, browser
from tests.support.viewer import viewer

from cotree.base.run_folder import RunFolder, find_run

OUT = Path(__file__).parents[1] / "docs" / "images"
LARGEST = 200_000  # bytes of a picture


async def _best_tree(address: str) -> str:
    """The address of the tree that shows most."""
    async with aiohttp.ClientSession(f"{address}api/") as session:

        async def get(path: str) -> Any:
            async with session.get(path) as reply:
                return await reply.json()

        node = next(each["node"] for each in (await get("run"))["trees"] if each["questions"])
        rows = (await get(f"trees/{node}?verdicts=mixed&sort=thoughts&desc=1&limit=30"))["rows"]
        trees = [await get(f"trees/{node}/{row['tree']}") for row in rows]
    best = max(trees, key=lambda tree: (len(tree["chosen"]), len(tree["thoughts"])))
    return f"#/trees/{node}/{best['tree']}"


async def take(run: RunFolder, out: Path) -> list[Path]:
    """Take all pictures of a run; returns their files."""
    written = []

    async def shot(page: Browser, name: str) -> None:
        await asyncio.sleep(0.5)
        written.append(out / f"{name}.png")
        picture = await page.screenshot()
        assert len(picture) < LARGEST, f"{name}: {len(picture)} bytes"
        written[-1].write_bytes(picture)

    async with viewer(run, read_only=False, annotator="anna") as address, browser() as page:
        tree = await _best_tree(address)
        await page.look(width=1280, height=640)
        await page.open(address)
        await page.until('!!document.querySelector("table.trees a")')
        await shot(page, "list")
        await page.open(address + tree)
        await page.until('!!document.querySelector(".chain .thought")')
        await shot(page, "tree")
        if await page.run('!!document.querySelector(".uses button")'):
            await page.press("b")
            await shot(page, "side-by-side")
        await page.look(width=390, height=780, dark=True)
        await page.open(address + tree)
        await page.until('!!document.querySelector(".chain .thought")')
        await shot(page, "phone")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in asyncio.run(take(find_run(options.run), options.out)):
        print(path)


if __name__ == "__main__":
    main()
