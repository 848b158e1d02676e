"""The command line as a user meets it: exit codes, one clear line, no traceback, a fast --help."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

import cotree.cli
from cotree import __version__
from cotree.cli import app, main

ROOT = Path(__file__).parent.parent
LAPTOP = str(ROOT / "recipes" / "laptop.yaml")
VERBS = [
    "run", "plan", "check", "show", "view", "preview", "eval", "compare", "table", "train", "diagnose", "import",
    "export", "check-data", "merge", "clean", "report", "decode", "serve", "init", "tasks", "patterns", "models",
]  # fmt: skip
FAR = "models.far={url: 'http://127.0.0.1:9', tokenizer: smollm2-135m-instruct}"
FAR_WITH_KEY = "models.far={url: 'http://127.0.0.1:9', mode: chat, api_key_env: NO_KEY}"
CHAT = "models.far={url: 'http://127.0.0.1:9', mode: chat}"
REFLECTS = "trees.train.roles.reflector=far"
TWICE = ["evaluations.test.questions={twice.yaml: 2}", "evaluations.test.split=dev"]
MANY = ["trees.train.questions={arithmetic: 99999, letters: 99999}"]
TRAIN = ["train", "sft", "--student", "smollm2-135m-instruct", "-o", "x", "--data"]
OLD = "name: old\nsearch: {rollouts: 4}\n"


def shell(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cotree.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=120)


@pytest.mark.timed
def test_help_is_fast_and_loads_nothing_heavy() -> None:
    times, bare = [], []
    for _ in range(5):
        started = time.perf_counter()
        assert "Usage" in shell("--help").stdout
        times.append(time.perf_counter() - started)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import typer"], check=True)
        bare.append(time.perf_counter() - started)
    # 0.25 s beside 0.16 on two slow cores: what cotree adds to its command line's library is little.
    assert min(times) < 2 * min(bare)


def test_every_verb_is_there_with_an_example_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    group = typer.main.get_command(app)
    assert sorted(group.commands) == sorted(VERBS)  # type: ignore[attr-defined]
    for name in VERBS:
        command = group.commands[name]  # type: ignore[attr-defined]
        example = command.epilog.removeprefix("Example: ")
        words = shlex.split(example)
        assert words[:2] == ["cotree", name], example
        command.make_context(name, words[2:])  # raises where a word is none of the verb's
        assert command.help and command.help.split("\n")[0].endswith("."), name
        for parameter in command.params:
            assert parameter.name == "help" or parameter.help or parameter.param_type_name == "argument", parameter.name


def test_cli_has_no_logic() -> None:
    """Each verb is some imports, a call or two, and the printing of what came."""
    tree = ast.parse(Path(cotree.cli.__file__).read_text())
    verbs = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    assert len(verbs) == len(VERBS) + 1
    for verb in verbs:
        body = [node for node in verb.body if not isinstance(node, ast.ImportFrom)]
        assert len(body) <= 5, verb.name  # the docstring, and four statements


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "Missing argument 'RECIPE'. (see cotree run --help)"),
        (["run", "no.yaml"], "no recipe at no.yaml; `cotree init` writes one to start from"),
        (["run", "."], ". is a folder without a recipe.yaml; name a recipe file, or a run folder"),
        (["run", "old.yaml"], "a recipe of an older form (`search`)"),
        (["run", LAPTOP, "trees.train.rolouts=2"], "`trees.train`: unknown key `rolouts`; did you mean `rollouts`?"),
        (["run", LAPTOP, "serch=1", "foo=2", "bar=3"], "unknown key `serch`; known: name, seed, models"),
        (["run", LAPTOP, "models.smollm2.weights=llama-9"], "no weights `llama-9` are here; give"),
        (["run", LAPTOP, "models.smollm2.weights=/no/such.gguf"], "no weights `/no/such.gguf` are here"),
        (["run", LAPTOP, "models.smollm2.weights=not.gguf"], "not.gguf"),
        (["run", LAPTOP, "--only", "students/dop"], "unknown node `students/dop`; did you mean `students/dpo`?"),
        (["run", LAPTOP, "--only", "search"], "--only: unknown node `search`; known: trees/train"),
        (["run", LAPTOP, "--from", "nowhere"], "nowhere is no run folder (it has no recipe.yaml)"),
        (["run", LAPTOP, "--runs-dir", "rows.jsonl"], "--runs-dir rows.jsonl is a file; name a folder"),
        (["run", LAPTOP, "trees.train.questions.letters=99999"], "lower the number"),
        (["run", LAPTOP, "trees.train.questions.letters=-5"], "must be greater than or equal to 1"),
        (["run", LAPTOP, "trees.train.questions={}"], "`trees.train`: `questions` is missing; give {task: how many}"),
        (["run", LAPTOP, "evaluations.test.questions.letters=99999"], "lower the number"),
        (["run", LAPTOP, "evaluations.test.split=dve"], "`evaluations.test.split`: must be 'train', 'dev' or 'test'"),
        (["run", LAPTOP, *TWICE], "two dev questions of task `twice` are called `3`; give each an id of its own"),
        (["run", LAPTOP, "evaluations.test.questions={nowhere.yaml: 2}"], "nowhere.yaml"),
        (["run", LAPTOP, "evaluations.test.max_tokens=9000"], "tokens, `smollm2` takes 8192; lower `max_tokens`"),
        (["run", LAPTOP, "trees.train.patterns=[]"], "`trees.train.patterns`: must have at least 1 item"),
        (["run", LAPTOP, "students.sft.learning_rate=.inf"], "finite number"),
        (["run", LAPTOP, "students.sft.from=smolm2"], "unknown model or student `smolm2`; did you mean `smollm2`?"),
        (["run", LAPTOP, "students.dpo.data=sft"], "students.dpo: dpo trains on dpo rows, `sft` has sft"),
        (["run", LAPTOP, "students.sft.from=dpo"], "is a circle"),
        (["run", LAPTOP, "trees.train.reward={function: 'nowhere:f'}"], "cannot load nowhere"),
        (["run", LAPTOP, "trees.train.patterns={mine: {root: {thinking: 1}}}"], "no answer can be reached"),
        (["run", LAPTOP, CHAT, REFLECTS], "start the server"),
        (["run", LAPTOP, FAR_WITH_KEY, REFLECTS], "NO_KEY is not"),
        (["plan", LAPTOP, "students.dpo.bta=1"], "did you mean `beta`?"),
        (["plan", "file/"], "no recipe at file"),
        (["check", LAPTOP, "models.smollm2.weights=not.gguf"], "checks failed; the first: "),
        (["check", LAPTOP, "models.smollm2.weights=not.gguf", *MANY], "; letters has"),
        (["preview", LAPTOP, "pair"], "unknown dataset `pair`; did you mean `pairs`?"),
        (["preview", LAPTOP, "pairs"], "make them with `cotree run RECIPE --only datasets/pairs`"),
        (["report", "nowhere"], "nowhere is no run folder (it has no recipe.yaml); give one that `cotree run` made"),
        (["report", "older"], "older is a run of an older cotree, whose files have another form"),
        (["report", "rows.jsonl"], "rows.jsonl is no run folder"),
        (["show", "nowhere"], "nowhere is no run folder"),
        (["clean", "nowhere"], "nowhere is no run folder"),
        (["table", "nowhere"], "nowhere"),
        (["table"], "Missing argument 'RUN[:STUDENT]...'. (see cotree table --help)"),
        (["compare", "a", "b"], "a"),
        (["eval", "--model", "smollm2-135m-instruct"], "Missing option '--task'. (see cotree eval --help)"),
        (["eval", "--model", "smollm2", "--task", "letters"], "nothing at `smollm2`; give a server's URL"),
        (["eval", "--model", "smollm2-135m-instruct", "--task", "leters"], "did you mean `letters`?"),
        (["eval", "--quiet=3"], "does not take a value"),
        (["train", "sfft", *TRAIN[2:], "rows.jsonl"], "did you mean `sft`?"),
        (["train", "sft", "--student", "no", "--data", "rows.jsonl", "-o", "x"], "`no`"),
        ([*TRAIN, "no.jsonl"], "no.jsonl"),
        ([*TRAIN, "rows.jsonl"], "rows.jsonl"),
        ([*TRAIN, "rows.jsonl", "epoch=2"], "unknown key `epoch`; did you mean `epochs`?"),
        (["eval", "--model", "smollm2-135m-instruct", "--task", "letters", "--format", "pdf"], "'pdf' is not one of"),
        (["diagnose", "nowhere.jsonl"], "nowhere.jsonl"),
        (["diagnose", "empty.jsonl"], "empty.jsonl has no rows"),
        (["import", "empty.jsonl", "--student", "smollm2-135m-instruct", "-o", "x.parquet"], "empty.jsonl has no rows"),
        (["check-data", "older"], "older is a folder; name a file in it"),
        (["import", "nowhere.jsonl", "--student", "smollm2-135m-instruct", "-o", "x.parquet"], "nowhere.jsonl"),
        (["export", "nowhere", "--to", "jsonl", "-o", "x"], "nowhere"),
        (["export", "rows.jsonl", "--to", "csv", "-o", "x"], "csv"),
        (["check-data", "rows.jsonl"], "rows.jsonl"),
        (["decode", "Why?", "students.sft.epochs=2"], "unknown key `students`"),
        (["decode", "hi", "--seed"], "Option '--seed' requires an argument"),
        (["decode", "--task", "letters", "--id", "nothing"], "nothing"),
        (["init", "old.yaml"], "old.yaml is there already; name another file"),
        (["fly"], "No such command 'fly'. (see cotree --help)"),
        (["run", LAPTOP, "name=@x"], "`name`: the value is not YAML; quote it"),
    ],
    ids=lambda value: " ".join(map(os.path.basename, value)) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "not.gguf").write_bytes(b"GGUF!!")
    (tmp_path / "rows.jsonl").write_text('{"id": "3", "question": "Why?", "answer": "1"}\n' * 100)
    (tmp_path / "twice.yaml").write_text("name: twice\ndata: rows.jsonl\nprompt: '{question}'\n")
    (tmp_path / "old.yaml").write_text(OLD)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "manifest.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cotree", *words])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 2, said
    assert message in said
    assert said.startswith("cotree: ")
    assert len(said.strip().split("\n")) == 1 and said.count("\x1b") == 0
    now = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert now == before, "nothing is written before the input is known to work"


def test_the_same_from_a_shell(tmp_path: Path) -> None:
    done = shell("run", "no.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cotree: no recipe at no.yaml; `cotree init` writes one to start from\n"


def test_a_starter_is_planned_at_once(tmp_path: Path) -> None:
    made = shell("init", "mine.yaml", cwd=tmp_path)
    assert made.returncode == 0 and "cotree plan mine.yaml" in made.stdout
    done = shell("plan", "mine.yaml", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    nodes = json.loads(done.stdout)["nodes"]
    assert {node["state"] for node in nodes} == {"new"} and not any(node["why"] for node in nodes)
    assert sorted(os.listdir(tmp_path)) == ["mine.yaml"]
    *lines, time = shell("plan", "mine.yaml", cwd=tmp_path).stdout.strip().split("\n")
    assert time == "how long it takes is known once a part of it has run here"
    planned = [line.split()[:2] for line in lines if not line.startswith("weights served by ")]
    assert [name for name, _ in planned] == [node["name"] for node in nodes]
    assert {state.strip(";") for _, state in planned} == {"new"}


def test_a_disk_that_is_full_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import errno

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    monkeypatch.setattr("cotree.tasks.task_table", full)
    monkeypatch.setattr(sys, "argv", ["cotree", "tasks"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert capsys.readouterr().err == (
        "cotree: the disk is full (/somewhere); free some space, then re-run the same command to resume\n"
    )


@pytest.mark.parametrize(
    ("words", "said", "code"), [([], "Usage: cotree [OPTIONS]", 2), (["--version"], f"cotree {__version__}", 0)]
)
def test_without_a_verb(
    words: list[str], said: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/cotree", *words])
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    with pytest.raises(SystemExit) as left:
        main()
    assert (left.value.code, os.environ["HF_HUB_VERBOSITY"]) == (code, "error")
    assert capsys.readouterr().out.startswith(said)


def test_lists() -> None:
    assert "letters" in shell("tasks").stdout
    assert "double_check" in shell("patterns").stdout
    assert "smollm2-135m-instruct" in shell("models").stdout
