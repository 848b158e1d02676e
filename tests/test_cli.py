"""The command line as a user meets it: exit codes, one clear line, no traceback, a fast --help."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAPTOP = str(ROOT / "recipes" / "laptop.yaml")


def cotree(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cotree.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=120)


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        assert "Usage" in cotree("--help").stdout
        times.append(time.perf_counter() - started)
    # 0.3 s on an idle machine; the bound leaves room for a busy one.
    assert min(times) < 0.6
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
        (["run", LAPTOP, "models.smollm2.embedded=/no/such.gguf"], "no such file"),
        (["run", LAPTOP, "--only", "sing"], "unknown stage `sing`"),
        (["run", LAPTOP, "--only", "build"], "needs `search` first"),
        (["run", LAPTOP, "tasks.train.letters=99999"], "lower the number"),
        (["run", LAPTOP, "eval.split=dev", "tasks.dev={}"], "name no such questions"),
        (["run", LAPTOP, "models.far={url: 'http://127.0.0.1:9', tokenizer: x}"], "start the server"),
        (["run", LAPTOP, "models.far={url: 'http://127.0.0.1:9', tokenizer: x, api_key_env: NO_KEY}"], "NO_KEY is not"),
        (["report", "nowhere"], "does not exist"),
        (["fly"], "No such command"),
        (["run"], "Missing argument"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    done = cotree(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("cotree: ")
    assert len(done.stderr.strip().split("\n")) == 1
    assert not (tmp_path / "runs" / "laptop" / "trees.db").exists()


def test_a_run_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    assert cotree("run", LAPTOP, "--only", "build", cwd=tmp_path).returncode == 2
    done = cotree("run", LAPTOP, "--only", "build", "search.rollouts=9", cwd=tmp_path)
    assert done.returncode == 2
    assert "different: search.rollouts" in done.stderr
    assert "name=NEW_NAME" in done.stderr


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs" / "laptop").mkdir(parents=True)
    (tmp_path / "runs" / "laptop" / "thesis.txt").write_text("mine")
    done = cotree("run", LAPTOP, cwd=tmp_path)
    assert done.returncode == 2
    assert "is no run folder" in done.stderr
    assert os.listdir(tmp_path / "runs" / "laptop") == ["thesis.txt"]


def test_lists() -> None:
    assert "letters" in cotree("tasks").stdout
    assert "double_check" in cotree("patterns").stdout
