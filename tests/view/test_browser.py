"""The viewer's page in a real browser: people's way through it, hostile text, a run that grows, a telephone's width."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from benchmarks.screenshots import LARGEST, take
from tests.report.conftest import apples_tree, make_run
from tests.support.browser import Browser, browser, needs_browser
from tests.support.trees import random_tree
from tests.support.viewer import viewer

from cotree.base.rows import read_rows, write_jsonl
from cotree.base.run_folder import RunFolder
from cotree.data.annotations import FILE, Annotations
from cotree.data.export import export_to
from cotree.search.store import TreeStore

pytestmark = needs_browser

APPLES = "#/trees/train/aaaaaaaaaaaaaaaa"
HOSTILE = (
    '</script><script>alert("ran")</script><img src=x onerror=alert(1)><svg onload=alert(2)> \u202egnp.exe \x07 '
    "$\\href{javascript:alert(3)}{x}$ $\\includegraphics{http://127.0.0.2/x.png}$ $\\frac{1$ [a](javascript:alert(4)) "
    + "w"
    * 5000
)
PICTURES = Path(__file__).parents[2] / "docs" / "images"
CHAIN = '[...document.querySelectorAll(".side .chain .thought header b")].map((e) => e.textContent).join(" > ")'


@asynccontextmanager
async def opened(run: RunFolder, place: str, **options: str) -> AsyncIterator[tuple[Browser, str]]:
    """The viewer of a run, opened at an address in it. Nothing but its own server may be asked, nothing may fail."""
    async with viewer(run, **options) as address, browser() as page:
        await page.open(address + place)
        await page.until('!!document.querySelector("main")')
        yield page, address
        assert [url for url in page.requests if not url.startswith((address, "about:", "data:"))] == []
        assert page.problems == []


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "laptop")


async def test_a_person_filters_selects_annotates_and_finds_it_exported(run: RunFolder, tmp_path: Path) -> None:
    async with opened(run, "") as (page, address):
        rows = 'document.querySelectorAll("table.trees tbody tr").length'
        await page.until(f"{rows} === 7")
        await page.run('{const e = document.querySelector(".filters select"); e.value = "letters"; '
                       'e.dispatchEvent(new Event("change"));}')  # fmt: skip
        await page.until(f"{rows} === 3")
        await page.click(".about button")
        await page.until(f"{rows} === 7")
        await page.write(".search", "apples bags")
        await page.until(f"{rows} === 1")
        await page.click("table.trees a")
        await page.until(f'{CHAIN} === "sub task > thinking > answer ✓ correct"')

        await page.press("a")
        await page.until('document.querySelector(".annotation .message")?.textContent.startsWith("Say your name")')
        await page.write("input.annotator", "anna")
        await page.until(
            'document.querySelector("input.annotator").value === "anna" && !document.querySelector(".message")'
        )
        await page.press("x")
        await page.write("textarea.fix", "3 * 6 = 18. 14 + 18 = 32.\nThe answer is: \\boxed{32}")
        await page.click(".fixing button")
        await page.until('document.querySelector(".message")?.textContent === "saved"')
        await page.write(".annotation .note", "shorter")
        await page.until('document.querySelector(".annotation .note").value === "shorter"')
        await page.until('document.querySelector(".message")?.textContent === "saved"')

        await page.open(address + APPLES + "?leaf=3")
        await page.until('document.querySelector("button.fix")?.getAttribute("aria-pressed") === "true"')
        assert await page.run('document.querySelector(".note").value') == "shorter"
        with Annotations(run.path / FILE) as kept:
            (saved,) = kept.all()
        assert (saved.annotator, saved.leaf, saved.verdict, saved.note) == ("anna", 3, "fix", "shorter")
        assert saved.text.startswith("3 * 6 = 18.")
        exported = tmp_path / "notes.jsonl"
        export_to(run.path, "annotations", str(exported))
        (row,) = read_rows(exported)
        assert (row["annotator"], row["verdict"], row["text"]) == ("anna", "fix", saved.text)
        await page.press("u")
        await page.until('document.querySelector(".message")?.textContent === "taken back"')
        with Annotations(run.path / FILE) as kept:
            assert [*kept.all()] == []


async def test_of_two_pages_that_save_the_later_one_sees_the_other(run: RunFolder) -> None:
    async with opened(run, APPLES + "?leaf=8", annotator="anna") as (page, address):
        await page.until('!!document.querySelector("button.accept")')
        said = {"node": "train", "tree": "a" * 16, "leaf": 8, "annotator": "anna", "verdict": "reject", "note": "wordy"}
        async with aiohttp.ClientSession() as session, session.post(f"{address}api/annotations", json=said) as reply:
            assert reply.status == 200
        await page.press("a")
        await page.until('document.querySelector(".message")?.textContent.includes("reject: wordy")')
        with Annotations(run.path / FILE) as kept:
            assert [each.verdict for each in kept.all()] == ["reject"]
        await page.press("a")
        await page.until('document.querySelector(".message")?.textContent === "saved"')
        page.problems.clear()  # the 409 is one


async def test_a_note_is_kept_however_it_is_left(run: RunFolder) -> None:
    async with opened(run, APPLES + "?leaf=8", annotator="anna") as (page, _):
        message = 'document.querySelector(".message")?.textContent'
        await page.until('!!document.querySelector("button.accept")')
        await page.press("a")
        await page.until(f'{message} === "saved"')
        await page.write(".annotation .note", "wordy")
        await page.until('document.querySelector(".note").getAttribute("value") === "wordy"')
        assert await page.run(message) == "saved"
        await page.run('document.querySelector(".note").focus()')
        await page.send("Input.insertText", text=", ")
        await page.click("button.reject")
        await page.until('document.querySelector("button.reject").getAttribute("aria-pressed") === "true"')
        with Annotations(run.path / FILE) as kept:
            assert [(each.verdict, sorted(each.note)) for each in kept.all()] == [("reject", sorted("wordy, "))]


async def test_keys_press_the_button_that_has_the_focus(run: RunFolder) -> None:
    async with opened(run, APPLES) as (page, _):
        await page.until('!!document.querySelector(".play")')
        await page.run('document.querySelector(".play").focus()')
        await page.press(" ")
        await page.until('document.querySelector(".play").textContent.includes("stop")')
        await page.run('document.querySelector(".tools input").focus()')
        before = await page.run("location.hash")
        await page.press("ArrowLeft")
        assert await page.run("location.hash") == before, "the arrows move the slider"


async def test_the_tree_is_walked_collapsed_played_and_put_side_by_side(run: RunFolder) -> None:
    async with opened(run, APPLES) as (page, _):
        await page.until(f'{CHAIN} === "sub task > thinking > answer ✓ correct"')
        await page.press("ArrowLeft", "ArrowDown", "ArrowRight")
        await page.until(f'{CHAIN} === "sub task > thinking > answer ✗ wrong"')
        assert "leaf=5" in await page.run("location.hash")
        await page.click("canvas.tree", at=(0.15, 0.5))
        await page.until(f'{CHAIN} === "sub task"')
        await page.press(" ", "ArrowRight")
        assert await page.run(CHAIN) == "sub task", "what is below is hidden"
        await page.press(" ", "ArrowRight", "ArrowRight")
        await page.until(f'{CHAIN} === "sub task > thinking > answer ✓ correct"')

        await page.press("b")
        assert await page.run('document.querySelector("details.shared").open') is False
        heads = '[...document.querySelectorAll(".columns h3")].map((e) => e.textContent)'
        assert await page.run(heads) == [
            "✓ correct, chosen in pairs",
            "✗ wrong, rejected in pairs, rejected in pairs_long",
        ]
        await page.press("Escape")
        await page.until(f'{CHAIN} === "sub task > thinking > answer ✓ correct"')

        await page.press("p")
        await page.until('document.querySelector(".tools output").textContent === "2 / 9"')
        await page.until('document.querySelector(".tools output").textContent === "9 / 9"')
        await page.press("[")
        await page.until('!location.hash.includes("aaaaaaaaaaaaaaaa")')


def reply(run: RunFolder, model: str, verdicts: str, text: str = "") -> None:
    """Leave a model's replies: "+" a right one, "-" a wrong one."""
    rows = []
    for place, sign in enumerate(verdicts):
        doc = {"id": f"q{place}", "task": "letters", "turn": 0, "question": f"How many?{text}", "answer": "2"}
        judged = {"verdicts": ["correct" if sign == "+" else "wrong"]}
        rows.append({"filter": "none", "doc": doc, "resps": [[f"{model} says{text}"]], "cotree": judged})
    write_jsonl(run.node("evaluations/test", model).path / "samples_letters.jsonl", rows)


async def test_a_students_replies_stand_beside_its_parents(run: RunFolder) -> None:
    reply(run, "sft", "++--")
    reply(run, "dpo", "-+++")
    async with opened(run, "#/replies?model=dpo") as (page, _):
        about = 'document.querySelector(".about")?.textContent'
        await page.until(f'{about} === "2 questions; dpo gained 2 and lost 1 against sft"')
        shown = '[...document.querySelectorAll("article .question b")].map((e) => e.textContent).join()'
        assert await page.run(shown) == "q2,2,q3,2"
        await page.run(
            '{const e = document.querySelectorAll(".filters select")[3]; e.value = "lost"; '
            'e.dispatchEvent(new Event("change"));}'
        )
        await page.until(f'{shown} === "q0,2"')
        assert "sft says" in await page.run('document.querySelector(".columns section:last-child").innerText')


async def test_hostile_text_is_text_in_every_view(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", hostile=HOSTILE)
    with TreeStore(run.node("trees/train").path / "trees.db") as store:
        named = replace(random_tree(1), tree_id="b" * 16)
        store.put(replace(named, nodes=[replace(node, model="\u202esmall") for node in named.nodes]))
    for model in run.cells():
        if model[0] == "test":
            reply(run, model[1], "+-", HOSTILE)
    async with opened(run, APPLES) as (page, address):
        text = await page.until('document.querySelector(".side")?.innerText')
        assert '</script><script>alert("ran")</script><img src=x onerror=alert(1)>' in text
        assert "⟨U+202E⟩gnp.exe ⟨U+0007⟩" in text and "javascript:alert(3)" in text and "\\frac{1" in text
        await page.open(address + "#/trees/train/" + "b" * 16)
        assert "⟨U+202E⟩small" in await page.until('document.querySelector(".legend")?.textContent')
        for place in ("#/trees/train", "#/experiment", "#/students", "#/replies?show=all"):
            await page.open(address + place)
            await page.until('!!document.querySelector("main")')
        assert await page.run('document.querySelector(".replies").innerText.includes("says</script><script>")')
        found = await page.run('[...document.querySelectorAll("script, img, iframe, link")].map((e) => e.outerHTML)')
        assert len(found) == 3, f"more than its own script, style and icon: {found}"


async def test_a_list_grows_with_its_run(run: RunFolder) -> None:
    async with opened(run, "#/trees/train") as (page, _):
        await page.until('document.querySelectorAll("table.trees tbody tr").length === 7')
        await page.until('performance.getEntriesByType("resource").some((e) => e.name.includes("/api/version"))')
        with TreeStore(run.node("trees/train").path / "trees.db") as store:
            store.put(replace(apples_tree(), tree_id="b" * 16, question_id="grown"))
        await page.until('document.querySelectorAll("table.trees tbody tr").length === 8')
        assert "grown" in await page.run('document.querySelector("table.trees").innerText')


@pytest.mark.parametrize("place", ["#/trees/train", APPLES, "#/experiment", "#/students"])
async def test_nothing_is_wider_than_a_telephone(tmp_path: Path, place: str) -> None:
    run = make_run(tmp_path / "run", hostile=" unbroken" + "x" * 300)
    async with opened(run, place) as (page, _):
        await page.look(width=390, height=844, dark=True)
        await page.until("document.documentElement.clientWidth === 390")
        assert await page.run("document.documentElement.scrollWidth") == 390
        assert await page.run("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"


async def test_the_pictures_of_the_documents_are_taken_by_a_command(run: RunFolder, tmp_path: Path) -> None:
    written = await take(run, tmp_path)
    assert [path.stem for path in written] == ["list", "tree", "side-by-side", "phone"]
    for path in written:
        picture = path.read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < LARGEST
    assert {path.name for path in written} == {path.name for path in PICTURES.glob("*.png")}
