"""What a disk damages is told in one line: a checkpoint gives way to the one before it, a student is made anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.tiny_student import same, tiny_model, tiny_tokenizer, weights, write_tiny_gguf

from cotree.base.atomic import write_sums
from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.models.gguf_export import export_gguf
from cotree.models.resolve import gguf_file
from cotree.models.settings import Model
from cotree.train.callback import StepLog
from cotree.train.run import train
from cotree.train.settings import DPO, SFT, Optimizer, Probe
from cotree.train.student import student_folder
from cotree.train.verb import train_rows

CHAINS = SFT(batch_size=4, pack_tokens=150, epochs=2.0, learning_rate=1e-3, save_steps=2)  # six steps
Damage = Callable[[Path], object]


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def halved(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flipped(file: Path) -> None:
    """One bit, as a disk does it: size and mtime stay."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


class Recorder(Output):
    """Keeps what is printed."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def print(self, line: object = "") -> None:
        self.lines.append(str(line))


def stopped(rows: Path, student: Path, out: Path, step: int, settings: Optimizer = CHAINS) -> Path:
    """A training that was stopped after a step; returns the folder of its checkpoints."""

    def stop(log: StepLog) -> None:
        if log.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings.row_kind, rows, student, out, settings=settings, seed=0, on_step=stop)
    return out / "trainer"


def resumed(rows: Path, student: Path, out: Path, settings: Optimizer = CHAINS) -> tuple[list[int], list[str]]:
    """Go on: the steps that are made, and what is printed."""
    steps: list[int] = []
    output = Recorder()

    def on_step(log: StepLog) -> None:
        steps.append(log.step)

    train(settings.row_kind, rows, student, out, settings=settings, seed=0, on_step=on_step, output=output)
    return steps, output.lines


@pytest.fixture(scope="module")
def interrupted(student: Path, sft_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    stopped(sft_rows, student, out, 5)
    return out


@pytest.fixture(scope="module")
def whole(student: Path, sft_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train("sft", sft_rows, student, out, settings=CHAINS, seed=0)
    return out


@pytest.mark.parametrize("harm", [emptied, halved, flipped, Path.unlink])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "trainer_state.json", "model.safetensors", "rng_state.pth", "scheduler.pt"]
)
def test_a_damaged_checkpoint_is_named_once_and_the_one_before_it_is_used(
    name: str, harm: Damage, interrupted: Path, whole: Path, student: Path, sft_rows: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(interrupted, tmp_path / "run"))
    harm(out / "trainer" / "checkpoint-4" / name)
    steps, lines = resumed(sft_rows, student, out)
    assert steps == [3, 4, 5, 6]
    (line,) = lines
    assert line.startswith(f"{out / 'trainer' / 'checkpoint-4'} is damaged (checkpoint-4/{name}")
    assert line.endswith(") and was deleted; training goes on from checkpoint-2")
    assert same(weights(out), weights(whole))


def test_training_starts_over_where_every_checkpoint_is_damaged(
    interrupted: Path, whole: Path, student: Path, sft_rows: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(interrupted, tmp_path / "run"))
    halved(out / "trainer" / "checkpoint-4" / "complete")
    (out / "trainer" / "checkpoint-2" / "config.json").unlink()
    steps, lines = resumed(sft_rows, student, out)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [line.rpartition(";")[2] for line in lines] == [
        " training goes on from checkpoint-2",
        " training starts over",
    ]
    assert same(weights(out), weights(whole))


def test_a_checkpoint_of_an_older_cotree_whose_marker_is_empty_is_used(
    interrupted: Path, student: Path, sft_rows: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(interrupted, tmp_path / "run"))
    emptied(out / "trainer" / "checkpoint-4" / "complete")
    (out / "trainer" / "checkpoint-of-mine").mkdir()
    assert resumed(sft_rows, student, out) == ([5, 6], [])


def test_the_disk_holds_a_checkpoint_before_its_marker_is_there(
    student: Path, sft_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a student before it is at its place."""
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(str(path.relative_to(tmp_path)) if path.is_relative_to(tmp_path) else str(path))
        fsync(descriptor)
        assert not list((tmp_path / "run" / "trainer").glob("checkpoint-2/complete")) or marked(synced)
        assert not (tmp_path / "run" / "model").exists() or any(".model." in path for path in synced)

    def marked(synced: list[str]) -> bool:
        return any("checkpoint-2/.complete." in path for path in synced)

    monkeypatch.setattr(os, "fsync", record)
    trainer = stopped(sft_rows, student, tmp_path / "run", 3)
    before = synced[: next(at for at, path in enumerate(synced) if "checkpoint-2/.complete." in path)]
    listed = json.loads((trainer / "checkpoint-2" / "complete").read_text())
    there = {path.name for path in (trainer / "checkpoint-2").iterdir()}
    assert {*listed} == there - {"complete"}
    assert {f"run/trainer/checkpoint-2/{name}" for name in listed} <= {*before}
    assert "run/trainer" in synced, "and that the folder has it"
    train("sft", sft_rows, student, tmp_path / "run", settings=CHAINS, seed=0)
    assert any(path.endswith("draft/model.safetensors") for path in synced)


def test_a_run_goes_back_to_before_the_best_checkpoint_where_that_is_damaged(
    student: Path, sft_rows: Path, tmp_path: Path
) -> None:
    settings = CHAINS.model_copy(update={"save_steps": 1, "probe": Probe(every=1, questions=1, max_tokens=2)})
    best = settings.model_copy(update={"probe": Probe(every=1, questions=1, max_tokens=2, keep="best")})
    # Nothing is answered within two tokens, so every step is as good as the ones before it, and the last is the best.
    train("sft", sft_rows, student, tmp_path / "last", settings=settings, seed=0)
    out = tmp_path / "best"
    trainer = stopped(sft_rows, student, out, 5, best)
    there = {path.name for path in trainer.iterdir()}
    assert {"checkpoint-3", "checkpoint-4"} <= there and len(there) <= 3
    state = json.loads((trainer / "checkpoint-4" / "trainer_state.json").read_text())
    state["best_global_step"] = 3
    marker = json.loads((trainer / "checkpoint-4" / "complete").read_text())
    (trainer / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    write_sums(trainer / "checkpoint-4" / "complete", [trainer / "checkpoint-4" / name for name in marker])
    flipped(trainer / "checkpoint-3" / "model.safetensors")
    steps, lines = resumed(sft_rows, student, out, best)
    assert steps[0] < 4
    assert "checkpoint-4 is damaged (checkpoint-3/model.safetensors has other content" in lines[0]
    assert "checkpoint-3 is damaged (checkpoint-3/model.safetensors has other content" in lines[1]
    assert same(weights(out), weights(tmp_path / "last"))


@pytest.mark.parametrize("harm", [emptied, halved, flipped])
def test_a_damaged_reference_is_computed_again(harm: Damage, student: Path, dpo_rows: Path, tmp_path: Path) -> None:
    settings = DPO(batch_size=4, epochs=0.5, learning_rate=1e-3)
    shared, logs = tmp_path / "shared", list[StepLog]()
    train("dpo", dpo_rows, student, tmp_path / "one", settings=settings, seed=0, references=shared)
    (file,) = shared.iterdir()
    content = file.read_text()
    changed = content.replace('"logps": [[-', '"logps": [[-1')
    assert changed != content
    file.write_text(changed)
    if harm is not flipped:
        harm(file)
    train("dpo", dpo_rows, student, tmp_path / "two", settings=settings, seed=0, references=shared, on_step=logs.append)
    assert logs[0].loss == pytest.approx(logs[0].metrics["dpo_loss"] + logs[0].metrics["sft_loss"])
    assert abs(logs[0].metrics["margin"]) < 1e-5
    assert file.read_text() == content


@pytest.fixture
def trained(student: Path, sft_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "trained"
    train_rows("sft", student, sft_rows, out, overrides=["batch_size=11"])
    return out


@pytest.mark.parametrize("harm", [emptied, halved, flipped, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_student_is_one_line_wherever_it_is_read(
    name: str, harm: Damage, trained: Path, student: Path, sft_rows: Path, tmp_path: Path
) -> None:
    file = trained / "model" / name
    kept = file.read_bytes()
    harm(file)
    fault = rf"trained/model is damaged \({name}.*\); delete it and run again what made it"
    with pytest.raises(UsageError, match=fault):
        train_rows("sft", trained / "model", sft_rows, tmp_path / "child")
    with pytest.raises(UsageError, match=fault):
        gguf_file(Model(weights=str(trained / "model")), "F32")
    if harm not in (Path.unlink, emptied) or name != "model.safetensors":  # lost weights are trained again at once
        with pytest.raises(UsageError, match=fault):
            train_rows("sft", student, sft_rows, trained, overrides=["batch_size=11"])
        shutil.rmtree(trained / "model")
    train_rows("sft", student, sft_rows, trained, overrides=["batch_size=11"])
    assert (trained / "model" / name).read_bytes() == kept


def test_a_student_that_is_trained_anew_leaves_no_gguf_of_the_one_before(
    trained: Path, student: Path, sft_rows: Path
) -> None:
    export_gguf(trained / "model", trained / "student-F32.gguf", "F32")
    shutil.rmtree(trained / "model")
    train_rows("sft", student, sft_rows, trained, overrides=["batch_size=11"])
    assert sorted(path.name for path in trained.glob("[!.]*")) == ["log.jsonl", "model", "node.json", "result.json"]


def test_a_damaged_result_beside_a_model_is_one_line(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    settings = CHAINS.model_copy(update={"epochs": 0.4})
    train("sft", sft_rows, student, tmp_path / "run", settings=settings, seed=0)
    halved(tmp_path / "run" / "result.json")
    with pytest.raises(UsageError, match=r"result.json is damaged \(.*; if it does not, move the file away"):
        train("sft", sft_rows, student, tmp_path / "run", settings=settings, seed=0)
    (tmp_path / "run" / "result.json").unlink()
    assert train("sft", sft_rows, student, tmp_path / "run", settings=settings, seed=0).rows == 11


def test_a_student_that_was_made_of_a_gguf_is_made_again_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    folder = student_folder(str(file))
    content = (folder / "model.safetensors").read_bytes()
    flipped(folder / "model.safetensors")
    assert student_folder(str(file)) == folder
    assert (folder / "model.safetensors").read_bytes() == content
