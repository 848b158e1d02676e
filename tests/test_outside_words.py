"""Names and words from outside (a model, a server, a file, a recipe) can neither drive a terminal, nor leave their
place in a page or a folder, nor carry a key into what is printed or kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from tests.base.test_progress import HOSTILE
from tests.experiment.test_entries import BASE
from tests.support.datasets import dataset_of
from tests.support.trees import random_tree

import cotree.cli
from cotree.base.errors import UsageError
from cotree.base.progress import Output, SafeStream, terminal_safe
from cotree.base.run_folder import RunFolder
from cotree.base.settings import require_name
from cotree.data.card import block, cell
from cotree.eval.evaluate import evaluate_model
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.recipe import build_recipe, load_recipe, write_starter
from cotree.experiment.work import Worker
from cotree.models.resolve import parse_model
from cotree.models.settings import Model
from cotree.report.grid import Grid, write_grids

KEY = "sk-proj-Zx81hdhbQ7"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
ROW = '{"id": "3", "question": "Why?", "answer": "1"}\n'


def said_by(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[Any, ...]:
    """The exit code, stdout and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["cotree", *words])
    with pytest.raises(SystemExit) as left:
        cotree.cli.main()
    return left.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    "words",
    [
        ["run", f"no{HOSTILE}.yaml"],
        ["run", "r.yaml", f"trees.{HOSTILE}=1"],
        ["run", "r.yaml", f"name={HOSTILE}"],
        ["table", f"no{HOSTILE}"],
        ["eval", "--model", f"m{HOSTILE}", "--task", "letters"],
        ["eval", "--model", "smollm2-135m-instruct", "--task", HOSTILE],
        ["check-data", f"{HOSTILE}.jsonl"],
        ["export", f"{HOSTILE}.jsonl", "--to", HOSTILE, "-o", HOSTILE],
        [f"fly{HOSTILE}"],
        ["eval", f"--{HOSTILE}=3"],
        ["decode", "--seed", HOSTILE],
    ],
)
def test_errors_are_one_line_that_drives_no_terminal(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(BASE))
    code, _, said = said_by([word.replace("\ud800", "") for word in words], monkeypatch, capsys)
    assert code == 2 and len(said.splitlines()) == 1, said
    assert not UNSAFE.search(said.rstrip("\n")), ascii(said)


def test_lists_of_files_drive_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "\x1b[2J\x9b1m\u202e.jsonl"
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho"}]}
    (tmp_path / name).write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    for words in (["check-data", name], ["export", name, "--to", "jsonl", "-o", "out"], ["init", f"{name}.yaml"]):
        code, told, said = said_by(words, monkeypatch, capsys)
        assert code == 0, said
        assert "\ufffd" in told and not UNSAFE.search(told.replace("\n", "")), ascii(told)


def test_a_faults_traceback_and_what_libraries_say_drive_no_terminal(tmp_path: Path) -> None:
    """A bug's traceback, a warning and a log line, in a process of their own."""
    code = """
import logging, sys, warnings
import cotree.cli, cotree.tasks
def fault():
    warnings.warn("\\x1b[2J\\u202ewarned")
    logging.getLogger("x").warning("\\x1b]0;x\\x07 \\x9b1m logged")
    raise KeyError("x") from ValueError("\\x1b[2J\\rraised")
cotree.tasks.task_table = fault
sys.argv = ["cotree", "tasks"]
cotree.cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=tmp_path)
    said = done.stderr.decode()
    assert done.returncode == 1
    assert all(word in said for word in ("warned", "logged", "Traceback", "raised")), said
    assert not UNSAFE.search(said.replace("\n", "")), ascii(said)


def test_what_progress_bars_write_passes(capsys: pytest.CaptureFixture[str]) -> None:
    stream = SafeStream(sys.stderr)
    for text in ("\rfile.bin: 50%|##", "\n\n", "\x1b[A\x1b[A", "words \x1b[A\r"):
        stream.write(text)
    assert capsys.readouterr().err == "\rfile.bin: 50%|##\n\n\x1b[A\x1b[Awords \ufffd[A\ufffd"


@pytest.mark.parametrize("tty", [True, False])
def test_nor_do_tables_and_titles(
    tty: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty)
    table = Table("name\x1b[2J", title="\x9b2J")
    table.add_row("\x1b]0;owned\x07\u202e")
    Output().print(table)
    with Output().progress("\x1b]0;owned\x07\x9b") as update:
        update(1, 2, "")
    told = capsys.readouterr().out
    assert not re.search("\x1b\\]|\x07|[\x80-\x9f]|\u202e|name\x1b\\[2J", told), ascii(told)


@given(st.text(st.sampled_from("[](){}<>!|`*#-:/\\\"'&~$@wW.ahtps \n\r\t\x1b\x9b\u202e")))
def test_no_name_breaks_out_of_a_card(name: str) -> None:
    """A cell is one line without links, images, tags, code spans or cells; a block is all of its text, as it is."""
    written, text = cell(name), block(name)
    bare = re.sub(r"\\.", "", re.sub(r"&(#\d+|\w+);", "", written))
    assert not re.search(r"[\[\]<>|`*~$&]|://|www\.|@", bare, re.IGNORECASE), written
    assert not UNSAFE.search(written + text) and "\n" not in written + text
    assert text.startswith("<pre>") and text.endswith("</pre>") and "<" not in text[5:-6]


def test_a_cards_front_matter_and_headings_hold_any_name(tmp_path: Path) -> None:
    name = 'x"\n---\n# [free](http://evil) <img src=x> `\x1b[2J'
    trees = [replace(random_tree(seed), task=name) for seed in range(8)]
    about = {"name": name, "models": {name: name}, "recipe": name}
    dataset_of(trees, tmp_path / "it", passed={"about": about}, license=name)
    _, front, body = (tmp_path / "it" / "README.md").read_text().split("---\n", 2)
    read = yaml.safe_load(front)
    assert read["license"] == name and set(read) >= {"pretty_name", "tags", "configs"}
    assert "\n# [free]" not in body and "<img" not in body and body.count("\n# ") == 1
    assert re.findall(r"(?<!\\)\]\((?!figures/)", re.sub("<pre>.*</pre>", "", body)) == ["]("], "the paper's"
    assert not UNSAFE.search(body.replace("\n", ""))


def test_a_card_names_no_folder_of_its_maker(tmp_path: Path) -> None:
    task = tmp_path / "halves.yaml"
    task.touch()
    (tmp_path / "own.py").touch()
    trees = BASE["trees"]["train"] | {"questions": {str(task): 2}, "reward": {"function": f"{tmp_path}/own.py:score"}}
    recipe = build_recipe(BASE | {"trees": {"train": trees}})
    worker = Worker(recipe, RunFolder(tmp_path), Fingerprints(recipe), Output(quiet=True))
    about = worker._about([])["recipe"]
    assert "halves.yaml: 2" in about and "function: own.py:score" in about and str(tmp_path) not in about


@pytest.mark.parametrize("form", ["latex", "markdown", "html", "terminal"])
def test_no_name_breaks_out_of_a_table(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = "\\input{/etc/passwd} $x$ & % # <script> [a](b) ![c](d) | `e` \x1b[2J\u202e\n\\end{table}"
    Output().print(write_grids([Grid((name, "n"), {name: [(name, "1")]}, title=name)], [name], form))
    told = capsys.readouterr().out
    assert not UNSAFE.search(re.sub("\x1b\\[[0-9;]*m", "", told).replace("\n", ""))
    if form == "latex":
        assert not re.search(r"\\input|\\end\{table\}\S|(?<!\\)\$x", told)
    if form == "html":
        assert "<script" not in told
    if form == "markdown":
        assert not re.search(r"(?<!\\)[\[<`]", told)


BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/abs",
    "-x",
    ".hidden",
    "a\0b",
    "a\nb",
    "a b",
    "\x1b[2J",
    "x" * 300,
    "ü" * 150,
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_is_no_folders_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the name of a run, of a node, of a model, and of an evaluation without -o."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="name"):
        build_recipe(BASE | {"name": name})
    for kind, entry in (("models", {"url": "http://x", "mode": "chat"}), ("trees", BASE["trees"]["train"])):
        with pytest.raises(UsageError, match="name"):
            build_recipe(BASE | {kind: BASE[kind] | {name: entry}})
    with pytest.raises(UsageError, match="--name"):
        evaluate_model("http://127.0.0.1:9", "letters", chat=True, limit=1, name=name)
    with pytest.raises(UsageError):
        require_name(name, "x")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("served", ["..", "", "x" * 300, "-m"])
def test_nor_does_a_servers_model_name_a_folder_elsewhere(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--name"):
        evaluate_model("http://127.0.0.1:9", "letters", chat=True, limit=1, served=served)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["a", "qwen2.5", "x_1+y-2", "größe", "7B"])
def test_other_names_are_fine(name: str) -> None:
    assert require_name(name, "x") == name
    assert name in build_recipe(BASE | {"models": BASE["models"] | {name: {"url": "http://x", "mode": "chat"}}}).models


@pytest.mark.parametrize(
    "words", [["run", "x" * 300], ["table", "x" * 300], ["init", "x" * 300], ["check-data", "x" * 300 + ".jsonl"]]
)
def test_a_path_that_is_too_long_is_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, said = said_by(words, monkeypatch, capsys)
    assert code == 2 and len(said.splitlines()) == 1, said


def test_a_starter_is_named_by_a_name_only(tmp_path: Path) -> None:
    for stem in ("a: b", "x\nname: y\n#", "größe"):
        write_starter(tmp_path / f"{stem}.yaml")
        assert load_recipe(tmp_path / f"{stem}.yaml").name == "mine"


SECRET_URL = f"http://me:{KEY}@127.0.0.1:9"
WITH_KEY = [
    f"models.far={{url: 'http://127.0.0.1:9', mode: chat, api_key_env: {KEY}}}",
    f"models.far={{url: '{SECRET_URL}', mode: chat}}",
    f"models.far={{url: 'http://127.0.0.1:9/?key={KEY}', mode: chat}}",
    "models.far={url: 'http://127.0.0.1:9', mode: chat, api_key_env: hf_aBcDeFgHiJ0123}".replace(
        "hf_", "hf_" + KEY[3:]
    ),
    f"models.far.api_key={KEY}",
    f"models.fra.api_key_env={KEY}",
    f"models.far.url.api_key_env={KEY}",
    f"models.far.api_key_env=@{KEY}",
    f"models.far.api_key_env={{{KEY}: 1}}",
    f"models.far.price={KEY}",
    f"{KEY}",
]


@pytest.mark.parametrize("override", WITH_KEY)
def test_a_key_in_a_recipe_is_refused_and_never_repeated(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(BASE))
    for verb in ("run", "plan", "check"):
        code, told, said = said_by([verb, "r.yaml", override], monkeypatch, capsys)
        assert code == 2 and KEY[3:] not in told + said, said
    assert sorted(os.listdir(tmp_path)) == ["r.yaml"]


def test_nor_does_a_fault_of_yaml_repeat_its_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"name: x\nmodels: {{far: {{api_key_env: '{KEY}\n")
    with pytest.raises(UsageError, match="line") as raised:
        load_recipe(tmp_path / "r.yaml")
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "--task", "letters", "--chat", "--model", "http://127.0.0.1:9", "--api-key-env", KEY],
        ["eval", "--task", "letters", "--chat", "--model", SECRET_URL],
        ["eval", "--task", "letters", "--model", SECRET_URL],
        ["eval", "--task", "letters", "--model", SECRET_URL.upper()],
        ["eval", "--task", "letters", "--chat", "--model", "http://127.0.0.1:9", f"--api-key={KEY}"],
        ["decode", "Hi", "--model", SECRET_URL],
        ["decode", "Hi", "--model", "http://127.0.0.1:9", "--api-key-env", KEY],
        ["decode", "Hi", f"models.far={{url: '{SECRET_URL}', mode: chat}}"],
        ["serve", SECRET_URL, "--api-key-env", KEY],
        ["run", SECRET_URL],
        ["eval", "--task", "letters", "--model", "http://127.0.0.1:9", "--tokenizer", SECRET_URL],
    ],
)
def test_nor_on_the_command_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, told, said = said_by(words, monkeypatch, capsys)
    assert code == 2 and KEY.casefold() not in (told + said).casefold(), said
    assert "Traceback" not in said


def test_a_key_that_could_be_a_variables_name_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["decode", "Hi", "--model", "http://127.0.0.1:9", "--api-key-env"]
    assert "hf_" not in said_by([*words, "hf_abcDEF0123456789"], monkeypatch, capsys)[2]
    assert "the environment variable NO_KEY is not set" in said_by([*words, "NO_KEY"], monkeypatch, capsys)[2]


def test_python_errors_hide_the_input_too() -> None:
    for wrong in ({"url": SECRET_URL, "mode": "chat"}, {"url": "http://x", "mode": "chat", "api_key_env": KEY}):
        with pytest.raises(ValueError, match=r"written nowhere|without a key") as raised:
            Model(**wrong)
        assert KEY not in str(raised.value)
    with pytest.raises(UsageError):
        parse_model("http://x", chat=True, max_in_flight=0)


def test_what_can_be_printed_is_kept() -> None:
    words = "अनुच्छेद ১২ 等等 – “é” \u200d\tx\n"
    assert terminal_safe(words) == words
