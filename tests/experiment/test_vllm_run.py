"""A recipe whose weights vLLM serves: searched, trained and evaluated without a GGUF, resumed, and moved."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.models.test_vllm import runs
from tests.support import fake_vllm
from tests.support.experiment import KeptOutput, tiny_student

from cotree.base.errors import CotreeError, UsageError
from cotree.base.run_folder import RunFolder
from cotree.cli import main
from cotree.eval.evaluate import evaluate_model
from cotree.experiment.check import check
from cotree.experiment.engines import with_engines
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.plan import plan, plan_lines
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import run
from cotree.train.student import convert_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a transformers folder."""
    place = tmp_path_factory.mktemp("weights")
    return convert_gguf(tiny_student(place), place / "tiny")


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The fake `vllm` on PATH, which knows the answers."""
    monkeypatch.setenv("PATH", str(fake_vllm.install(tmp_path / "bin")), prepend=os.pathsep)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ordered = {"knowing": True, "starts": str(tmp_path / "starts"), "requests": str(tmp_path / "requests")}
    monkeypatch.setenv("FAKE_VLLM", json.dumps(ordered))
    return ordered


def written(folder: Path, **model: Any) -> dict[str, Any]:
    questions, thinker = {"letters": 2}, {"thinker": "base"}
    return {
        "name": "r",
        "models": {"base": {"weights": str(folder)} | model},
        "trees": {"train": {"questions": questions, "roles": thinker, "rollouts": 8, "patterns": ["plain"]}},
        "datasets": {"longest": {"trees": "train", "rows": "sft", "length": "longest"}},
        "students": {"sft": {"from": "base", "method": "sft", "data": "longest"}},
        "evaluations": {"test": {"models": ["base", "sft"], "questions": questions, "max_tokens": 8}},
    }


class Watching(KeptOutput):
    """Notes, when a student begins, how many processes of vLLM there are."""

    def __init__(self, faults: dict[str, Any]) -> None:
        super().__init__()
        self.faults, self.beside_training = faults, -1

    def print(self, line: object = "") -> None:
        super().print(line)
        if line == "students/sft: begins":
            self.beside_training = sum(runs(pid) for each in fake_vllm.starts(self.faults) for pid in each["pids"])


def test_search_training_and_evaluation_without_a_gguf(folder: Path, faults: dict[str, Any], tmp_path: Path) -> None:
    recipe = build_recipe(written(folder, engine="vllm", engine_args={"dtype": "float32", "max_model_len": 4096}))
    lines = plan_lines(plan(recipe, tmp_path / "runs"))
    assert "weights served by vLLM: base, sft" in lines
    output = Watching(faults)
    made = run(recipe, tmp_path / "runs", output=output)
    assert "weights served by vLLM: base, sft" in output.lines
    assert output.beside_training == 0, "the GPU is free for training"
    starts = fake_vllm.starts(faults)
    student = made.node("students/sft").path / "model"
    assert [start["args"]["model"] for start in starts] == [str(folder), str(folder), str(student)]
    assert {start["args"]["dtype"] for start in starts} == {"float32"}
    assert [*tmp_path.rglob("*.gguf")] == [], "no GGUF was made of anything"
    for node, name in ("trees/train", "base"), ("evaluations/test/base", "base"), ("evaluations/test/sft", "sft"):
        assert "api_utils" in (made.path / node / f"vllm-{name}-0.log").read_text()
    model = made.cells()["test", "sft"].parts["model"]
    assert model == {"student": made.nodes()["students/sft"].fingerprint, "engine": "vllm",
                     "engine_args": {"dtype": "float32"}}  # fmt: skip
    row = made.cells()["test", "base"].result
    assert row["tokens"]["completion"] > 0
    run(recipe, tmp_path / "runs", output=output)
    assert len(fake_vllm.starts(faults)) == len(starts), "nothing is left to do"
    with pytest.raises(UsageError, match=r"the server counts .* prompt tokens"):  # the fake's tokens are words
        check(recipe, output, tmp_path / "runs")
    assert "ok   model `base`: reach: 1 server ready in vLLM" in output.lines


def test_a_server_that_dies_amid_a_search_is_named_and_the_search_resumed(
    folder: Path, faults: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", json.dumps(faults | {"crash_after": 5, "crashes": 1}))
    recipe = build_recipe(written(folder, engine="vllm"))
    log = tmp_path / "runs" / "r" / "trees" / "train" / "vllm-base-0.log"
    with pytest.raises(CotreeError, match=f"vLLM ended .*Engine core died.; its log is {log}.* resume"):
        run(recipe, tmp_path / "runs", only="trees", output=KeptOutput())
    made = run(recipe, tmp_path / "runs", only="trees", output=KeptOutput())
    assert made.nodes()["trees/train"].done and len(fake_vllm.starts(faults)) == 2
    requests = Path(faults["requests"]).read_text().splitlines()
    assert len(requests) == len(set(requests)), "what was answered is not asked again"


def test_a_run_keeps_its_engine_on_another_machine(
    folder: Path, faults: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laptop = RunFolder(tmp_path / "laptop")
    laptop.path.mkdir()
    plain = build_recipe(written(folder))
    here = with_engines(plain, laptop)
    assert here.models["base"].engine is None, "llama.cpp is the only one to choose"
    (laptop.path / "recipe.yaml").write_text(yaml.safe_dump(written(Path("/home/other") / folder.name)))
    before = Fingerprints(here).of("trees/train").of

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # the same folder on a machine with a GPU
    moved, new = with_engines(plain, laptop), with_engines(plain, RunFolder(tmp_path / "new"))
    assert Fingerprints(moved).of("trees/train").of == before
    assert moved.models["base"].engine == "llama.cpp" and new.models["base"].engine == "vllm"
    assert Fingerprints(new).of("trees/train").of != before
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.yaml").write_text(yaml.safe_dump(dict(new.written)))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # and back on the laptop
    back = with_engines(plain, RunFolder(tmp_path / "new"))
    assert back.models["base"].engine == "vllm", "which says that vLLM is needed, instead of mixing"
    other = build_recipe(written(folder.parent / "tiny.gguf"))
    assert with_engines(other, RunFolder(tmp_path / "new")).models["base"].engine is None, "other weights"


def test_verbs_without_a_recipe_take_it_too(
    folder: Path, faults: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, out = KeptOutput(), tmp_path / "e"
    options: dict[str, Any] = {"engine": "vllm", "engine_args": ["dtype=float32"], "output": output}
    for _ in range(2):
        scores = evaluate_model(str(folder), "letters", limit=2, max_tokens=8, out=out, **options)
    (start,) = fake_vllm.starts(faults)
    assert start["args"]["dtype"] == "float32", "and the second call had nothing left to ask"
    assert scores.tokens.completion > 0 and (out / "vllm-tiny-0.log").is_file()
    assert output.lines[0] == "tiny: served by vLLM"

    words = ["decode", "Which?", "--boxed", "--rollouts", "2", "--model", str(folder)]
    words += ["--engine", "vllm", "--engine-arg", "max_model_len=4096"]
    monkeypatch.setattr(sys, "argv", ["cotree", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert [each["args"]["max_model_len"] for each in fake_vllm.starts(faults)] == [None, 4096]
    assert not any(runs(pid) for each in fake_vllm.starts(faults) for pid in each["pids"])
