"""On a telephone nothing of the page is cut: what is wider than the screen scrolls inside its own box."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.report.conftest import make_run

from cotree.report.html import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
# Measured from a page around it, because the report's own policy forbids scripts.
MEASURE = """<iframe id="f" src="PAGE" style="width:WIDTHpx;height:900px;border:0"></iframe><pre id="out"></pre><script>
document.getElementById("f").onload = () => {
  const page = document.getElementById("f").contentDocument;
  const width = page.documentElement.clientWidth;
  const outside = [...page.body.querySelectorAll("*")].filter(
    (e) => !e.closest(".wide") && e.getBoundingClientRect().right > width + 0.5);
  const scrolling = [...page.querySelectorAll(".wide")].filter((e) => e.scrollWidth > e.clientWidth).length;
  document.getElementById("out").textContent =
    `wider ${page.documentElement.scrollWidth - width} outside ${outside.length} scrolling ${scrolling}`;
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_page_is_no_wider_than_its_screen(tmp_path: Path) -> None:
    long = " unbroken" + "x" * 300
    report = write_report(make_run(tmp_path / "run", hostile=long))
    scrolling = {}
    for width in (390, 1280):
        around = tmp_path / f"around{width}.html"
        around.write_text(MEASURE.replace("PAGE", report.as_uri()).replace("WIDTH", str(width)))
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                 f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]  # fmt: skip
        found = subprocess.run([str(BROWSER), *flags, around.as_uri()], capture_output=True, text=True, timeout=120)
        measured = re.search(r"wider (\d+) outside (\d+) scrolling (\d+)", found.stdout)
        assert measured is not None, found.stdout[-500:] + found.stderr[-500:]
        assert (int(measured[1]), int(measured[2])) == (0, 0)
        scrolling[width] = int(measured[3])
    assert scrolling[390] > 3 > scrolling[1280]
