"""On a telephone nothing of the page is cut, and no table runs into another; its trees can be walked."""

from __future__ import annotations

from pathlib import Path

from tests.report.conftest import make_run
from tests.support.browser import browser, needs_browser

from cotree.report.html import write_report

pytestmark = needs_browser

# What stands outside of the screen, unless its own box scrolls; the boxes that scroll; the least gap of two tables.
MEASURE = """(() => {
  const width = document.documentElement.clientWidth;
  const outside = [...document.body.querySelectorAll("*")].filter(
    (e) => !e.closest(".wide") && e.getBoundingClientRect().right > width + 0.5);
  const tables = [...document.querySelectorAll("table")].map((e) => e.getBoundingClientRect());
  const gaps = tables.slice(1).map((box, i) => Math.max(box.top - tables[i].bottom, box.left - tables[i].right));
  return [document.documentElement.scrollWidth - width, outside.map((e) => e.outerHTML.slice(0, 80)),
    [...document.querySelectorAll(".wide")].filter((e) => e.scrollWidth > e.clientWidth).length, Math.min(...gaps)];
})()"""


async def test_the_page_is_no_wider_than_its_screen(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "run", hostile=" unbroken" + "x" * 300))
    scrolling = {}
    async with browser() as page:
        for width in (390, 1280):
            await page.look(width=width)
            await page.open(report.as_uri())
            wider, outside, scrolling[width], gap = await page.run(MEASURE)
            assert (wider, outside) == (0, [])
            assert gap >= 16, "one table runs into another"
    assert scrolling[390] > 3 > scrolling[1280]


async def test_the_trees_of_a_report_are_walked_by_keys_and_ask_for_nothing(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "run", hostile="<img src=x onerror=alert(1)></script><script>alert(1)"))
    async with browser() as page:
        await page.open(report.as_uri())
        assert await page.run('document.querySelectorAll("canvas.tree").length') == 3
        shown = '[...document.querySelector(".side").querySelectorAll(".thought header b")].map((e) => e.textContent)'
        assert (await page.run(shown))[-1] == "answer ✓ correct"
        await page.run('document.querySelector("canvas.tree").focus()')
        await page.press("ArrowLeft")
        assert await page.run(shown) == ["sub task", "thinking"]
        await page.press("ArrowRight")
        await page.click(".uses button")
        assert await page.run('document.querySelectorAll(".columns .thought").length') > 2
        assert page.requests == [report.as_uri()] and page.problems == []
