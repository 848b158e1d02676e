"""`cotree run --dry-run`: what can be known at each point of a run, without a call or a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_server import FakeServerThread
from tests.support.tiny_student import dpo_row, sft_row, tiny_model, tiny_tokenizer, write_tiny_gguf

from cotree.base.progress import Output
from cotree.cli import main
from cotree.experiment.recipe import Recipe, recipe_yaml
from cotree.experiment.run import run
from cotree.experiment.run_folder import open_run
from cotree.train.plan import plan


class Kept(Output):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, line: object = "") -> None:
        self.lines.append(str(line))


def recipe(student: Path, url: str, **search: Any) -> Recipe:
    raw = {
        "name": "dry",
        "models": {
            "far": {"url": url, "model": "fake", "mode": "chat", "price": {"completion": 2.0}},
            "tiny": {"embedded": str(student)},
        },
        "roles": {"thinker": "far"},
        "tasks": {"train": {"letters": 5}, "eval": {"letters": 3}},
        "search": {"rollouts": 4, "patterns": ["plain"], "max_depth": 6, "max_thought_tokens": 10} | search,
        "build": {"sft": {"chains_per_tree": 2}},
        "train": {"student": "tiny", "sft": {"batch_size": 4, "epochs": 2}},
        "eval": {"max_tokens": 50, "control": False},
    }
    return Recipe.parse(raw, "test")


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")


def said(asked: Recipe, runs: Path, **options: Any) -> dict[str, str]:
    output = Kept()
    run(asked, runs, dry=True, output=output, **options)
    return dict(line.split(": ", 1) for line in output.lines)


def test_before_anything_there_are_bounds_and_no_calls(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServerThread(chat_only=True) as server:
        asked = recipe(student, server.url, baselines=False)
        (tmp_path / "recipe.yaml").write_text(recipe_yaml(asked))
        found = said(asked, tmp_path / "runs")
        monkeypatch.setattr("sys.argv", ["cotree", "run", str(tmp_path / "recipe.yaml"), "--dry-run"])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as exited:
            main()
        assert server.calls == 0 and not server.requests
    assert exited.value.code == 0
    assert capsys.readouterr().out.split("\n")[:-1] == [f"{name}: {line}" for name, line in found.items()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "tiny.gguf"]
    assert found["search"] == (
        "5 trees of at most 4 rollouts, written by far (server); at most 5,000 generated tokens, which cost at most "
        "0.01 (prompts not counted)"
    )
    assert found["train sft"].startswith("at most 10 rows in 6 steps; the rest is known when `build`")
    assert found["eval"] == "3 questions of each of 4 models, at most 600 generated tokens"
    assert "train control" not in found


def test_a_search_stays_below_its_bounds(student: Path, tmp_path: Path) -> None:
    with FakeServerThread(chat_only=True) as server:
        asked = recipe(student, server.url)
        most = int(re.findall(r"at most ([\d,]+) generated", said(asked, tmp_path)["search"])[0].replace(",", ""))
        run(asked, tmp_path, only="search", output=Output(quiet=True))
        with open_run(tmp_path, asked) as folder:
            assert 0 < folder.result("search")["tokens"]["completion"] <= most
        assert said(asked, tmp_path)["search"] == "done"
        assert list(said(asked, tmp_path, only="build")) == ["build"]


def test_where_rows_are_there_training_is_planned(student: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    asked = recipe(student, "http://127.0.0.1:9")
    with open_run(tmp_path, asked) as folder:
        for name, rows in (("sft", map(sft_row, range(9))), ("dpo", map(dpo_row, range(6)))):
            (folder.data / name).mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(list(rows)), folder.data / name / "train.parquet")
    before = sorted(tmp_path.rglob("*"))
    found = said(asked, tmp_path)
    for name, settings in (("sft", asked.train.sft), ("dpo", asked.train.dpo)):
        planned = plan(tmp_path / "dry" / "data" / name / "train.parquet", student, settings, 0, 512)
        tokens = f"{planned.tokens:,} tokens, packed {planned.packed_tokens:,} (ratio {planned.token_ratio:.2f})"
        assert (
            f"{planned.rows} rows (0 over build.max_tokens left out), {planned.steps} steps" in found[f"train {name}"]
        )
        assert tokens in found[f"train {name}"]
    assert sorted(tmp_path.rglob("*")) == before
