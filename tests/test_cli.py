"""The command line as a user meets it: exit codes, one clear line, no traceback, a fast --help."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cotree import __version__
from cotree.cli import main
from cotree.experiment.recipe import load_recipe
from cotree.experiment.run_folder import open_run

ROOT = Path(__file__).parent.parent
LAPTOP = str(ROOT / "recipes" / "laptop.yaml")


FAR = "{url: 'http://127.0.0.1:9', tokenizer: x}"
FAR_WITH_KEY = "{url: 'http://127.0.0.1:9', tokenizer: x, api_key_env: NO_KEY}"


def cotree(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cotree.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=120)


@pytest.mark.timed
def test_help_is_fast_and_loads_nothing_heavy() -> None:
    times, bare = [], []
    for _ in range(5):
        started = time.perf_counter()
        assert "Usage" in cotree("--help").stdout
        times.append(time.perf_counter() - started)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import typer"], check=True)
        bare.append(time.perf_counter() - started)
    # 0.25 s beside 0.16 on two slow cores: what cotree adds to its command line's library is little.
    assert min(times) < 2 * min(bare)
    heavy = ["torch", "transformers", "datasets", "aiohttp", "matplotlib", "numpy", "pydantic", "rich.progress"]
    code = f"import cotree.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "no.yaml"], "no recipe at no.yaml"),
        (["run", LAPTOP, "search.rolouts=2"], "did you mean `rollouts`"),
        (["run", LAPTOP, "models.smollm2.embedded=llama-9"], "unknown embedded model `llama-9`"),
        (["run", LAPTOP, "models.smollm2.embedded=/no/such.gguf"], "unknown embedded model"),
        (["run", LAPTOP, "--only", "sing"], "unknown stage `sing`"),
        (["run", LAPTOP, "--only", "build"], "needs `search` first"),
        (["run", LAPTOP, "tasks.train.letters=99999"], "lower the number"),
        (["run", LAPTOP, "eval.split=dev", "tasks.dev={}"], "name no such questions"),
        (
            ["run", LAPTOP, "tasks.train.letters=-5"],
            "`tasks.train.letters`: must be greater than or equal to 1",
        ),
        (["run", LAPTOP, "tasks.train={}"], "`tasks.train`: must have at least 1 item"),
        (["run", LAPTOP, "tasks.dev.letters=99999"], "lower the number"),
        (["run", LAPTOP, "eval.split=dev", "tasks.eval.letters=99999"], "lower the number"),
        (["run", LAPTOP, "tasks.dev={twice.yaml: 2}"], "two dev questions of task `twice` are called `3`"),
        (["run", LAPTOP, "eval.max_tokens=9000"], "tokens, `smollm2` takes 8192; lower eval.max_tokens"),
        (["run", LAPTOP, "search.patterns=[]"], "`search.patterns`: must have at least 1 item"),
        (["run", LAPTOP, "train.sft.learning_rate=.inf"], "finite number"),
        (["run", LAPTOP, "models.smollm2.embedded=not.gguf"], "not.gguf"),
        (["run", LAPTOP, "search.reward={function: 'nowhere:f'}"], "cannot load nowhere"),
        (
            ["run", LAPTOP, "search.own_patterns={mine: {root: {thinking: 1}}}"],
            "from `thinking` no answer can be reached",
        ),
        (["run", LAPTOP, f"models.far={FAR}", "roles.reflector=far"], "start the server"),
        (["run", LAPTOP, f"models.far={FAR_WITH_KEY}", "roles.reflector=far"], "NO_KEY is not"),
        (["report", "nowhere"], "does not exist"),
        (["eval", LAPTOP, "--limit", "2"], "a recipe does not go with --limit"),
        (["eval", LAPTOP, "--model", "smollm2-135m-instruct"], "--model does not go with a recipe"),
        (["eval", "--compare", "a", "b", "--task", "letters"], "--compare does not go with --task"),
        (["eval", "--table", "a", "--name", "b"], "--table does not go with --name"),
        (["build", LAPTOP, "--check", "a.parquet"], "--check does not go with recipe"),
        (["build", "--check", "a.parquet", "--out", "b"], "--check does not go with --out"),
        (["fly"], "No such command 'fly'. (see cotree --help)"),
        (["decode", "hi", "--seed"], "Option '--seed' requires an argument"),
        (["eval", "--quiet=3"], "does not take a value"),
        (
            ["check", LAPTOP, "models.smollm2.embedded=not.gguf", "tasks.train={letters: 99999, arithmetic: 99999}"],
            "; arithmetic has",
        ),
        (["run"], "Missing argument 'RECIPE'. (see cotree run --help)"),
        (["run", "."], "cotree: . is a folder; name a recipe"),
        (["run", LAPTOP, "--runs-dir", "rows.jsonl"], "--runs-dir rows.jsonl is a file; name a folder"),
        (["run", LAPTOP, "serch=1", "foo=2", "bar=3"], "unknown key `serch`; did you mean `search`?"),
        (["decode", "Why?", "train.sft.epochs=2"], "unknown key `train`; known: seed, models, roles, search"),
    ],
)
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cotree", *words])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert message in said
    assert said.startswith("cotree: ")
    assert len(said.strip().split("\n")) == 1
    assert not (tmp_path / "runs").exists(), "nothing is written before the recipe is known to work"


def test_the_same_from_a_shell(tmp_path: Path) -> None:
    done = cotree("run", "no.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cotree: no recipe at no.yaml; `recipes/laptop.yaml` is a good start\n"


def test_a_run_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "runs", load_recipe(Path(LAPTOP))):
        pass
    done = cotree("run", LAPTOP, "search.rollouts=9", cwd=tmp_path)
    assert done.returncode == 2
    assert "different: search.rollouts" in done.stderr
    assert "name=NEW_NAME" in done.stderr


def test_a_build_beside_a_run_refuses_what_it_would_not_read(tmp_path: Path) -> None:
    with open_run(tmp_path / "runs", load_recipe(Path(LAPTOP))) as folder, folder.stage("search"):
        pass
    done = cotree("build", LAPTOP, "build.sft.length=shortest", "train.dpo.beta=0.5", "--out", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert "only `build.` values can differ" in done.stderr
    assert done.stderr.endswith("leave out train.dpo.beta\n")


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs" / "laptop").mkdir(parents=True)
    (tmp_path / "runs" / "laptop" / "thesis.txt").write_text("mine")
    done = cotree("run", LAPTOP, cwd=tmp_path)
    assert done.returncode == 2
    assert "is no run folder" in done.stderr
    assert os.listdir(tmp_path / "runs" / "laptop") == ["thesis.txt"]


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
    assert "letters" in cotree("tasks").stdout
    assert "double_check" in cotree("patterns").stdout
