"""The documents say what is true: names, verbs, options, recipes, links, and the examples that they point to."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml

from cotree.cli import app
from cotree.experiment.recipe import build_recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The old commands stand in it beside the new ones.
COMMANDS = [path for path in DOCS if path.name != "migration.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(path: Path, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert all(isinstance(block, str) for block in found)
    return found


def _commands(path: Path) -> Iterator[list[str]]:
    """The words of every `cotree ...` command: a line of a block without a language, or between backticks."""
    for block in _blocks(path, ""):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\$ |eval )?(?:\.venv/bin/)?cotree (\S.*)", line.strip())
            if found:
                yield shlex.split(found[1], comments=True)
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for written in re.findall(r"`cotree (\S[^`]*)`", text):
        yield shlex.split(written.replace("\n", " "))


@cache
def _verbs() -> dict[str, set[str]]:
    """The options of every verb."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: {"--help", *(option for each in command.params for option in each.opts)}
        for name, command in commands.items()
    }


@pytest.mark.parametrize("path", COMMANDS, ids=_name)
def test_every_command_is_a_verb_with_its_options(path: Path) -> None:
    for verb, *words in _commands(path):
        if verb in ("--version", "--help"):
            continue
        assert verb in _verbs(), f"cotree {verb}"
        for word in words:
            option = word.partition("=")[0]
            if re.match(r"--?[a-z]", option):
                assert option in _verbs()[verb], f"cotree {verb} {option}"


def test_commands_are_found() -> None:
    assert len([*_commands(ROOT / "README.md")]) >= 5
    assert {"run", "plan", "show", "table"} <= {words[0] for path in COMMANDS for words in _commands(path)}


@pytest.mark.parametrize("path", DOCS, ids=_name)
def test_every_recipe_loads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in _blocks(path, "yaml"):
        for task_file in re.findall(r"[\w-]+\.yaml(?=:)", block):  # as the page has the reader write them
            Path(task_file).touch()
        content = yaml.safe_load(block)
        if isinstance(content, dict) and {"name", "models"} <= content.keys():
            assert build_recipe(content).nodes


def test_every_recipe_file_loads() -> None:
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("path", [*DOCS, ROOT / "CHANGELOG.md"], ids=_name)
def test_links_to_files_and_headings_resolve(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?://|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), link


def _anchors(path: Path) -> set[str]:
    """The names that GitHub gives to a file's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_name_in_the_map_of_the_paper_exists() -> None:
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", text)
    assert len(named) > 40
    for file, name in named:
        path = ROOT / ("tests" if Path(file).name.startswith("test_") else "src/cotree") / file
        assert path.is_file(), file
        if name:
            assert name in _defined(path), f"{file}:{name}"


@cache
def _defined(path: Path) -> set[str]:
    """The functions, classes, methods and constants of a module."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], inside: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(inside + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{inside}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(inside + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


@pytest.mark.parametrize("path", DOCS, ids=_name)
def test_python_in_the_documents_is_python(path: Path) -> None:
    for block in _blocks(path, "python"):
        compile(block, str(path), "exec")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_the_picture_is_a_picture_in_light_and_dark() -> None:
    picture = (ROOT / "docs" / "picture.svg").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in picture and "<title" in picture
    assert 'src="picture.svg"' in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")


def test_the_first_picture_of_the_readme_is_a_tree_in_the_browser() -> None:
    first = re.findall(r'src="([^"]*)"', (ROOT / "README.md").read_text(encoding="utf-8"))[0]
    pictures = [*(ROOT / "docs" / "images").glob("*.png")]
    assert ROOT / first in pictures and all(path.stat().st_size < 200_000 for path in pictures)


@pytest.mark.parametrize("path", EXAMPLES, ids=_name)
def test_an_example_is_short_python(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    compile(text, str(path), "exec")


def test_the_example_of_an_own_task_runs(tmp_path: Path) -> None:
    script = ROOT / "examples" / "own_task.py"
    found = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in found.stdout.splitlines()] == ["correct", "wrong", "no_answer"]


def test_no_placeholder_is_left() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert [page.name for page in pages if re.search(r"@[A-Z]{2,}@", page.read_text(encoding="utf-8"))] == []
