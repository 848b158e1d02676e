"""Several processes give what one gives, started by cotree, torchrun or accelerate, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.support.experiment import changed_recipe, small, tiny_student
from tests.support.fake_server import FakeServerThread
from tests.support.knowing import knowing_reply
from tests.support.tiny_student import distance, weights
from tests.train.test_verb import Recorder

from cotree.base.errors import CotreeError, UsageError
from cotree.base.progress import Update
from cotree.base.run_folder import RunFolder
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import run
from cotree.train.processes import process_count
from cotree.train.run import train
from cotree.train.settings import DPO
from cotree.train.trainer import training_arguments
from cotree.train.verb import train_rows

SETTINGS = DPO(batch_size=5, pack_tokens=150, epochs=1.0, learning_rate=1e-3, save_steps=1, precision="fp32")
CHILD = """
import os
import sys
from pathlib import Path
from cotree.train.settings import DPO
from cotree.train.run import train
from cotree.train.trainer import is_sharded
if __name__ == "__main__":
    rows, student, out, settings = sys.argv[1:]
    settings = DPO.model_validate_json(settings)
    train("dpo", Path(rows), Path(student), Path(out), settings=settings, seed=0)
    said = "processes, sharded" if is_sharded(settings) else "processes"
    os.write(1, f"{os.environ['WORLD_SIZE']} {said}\\n".encode())  # whole: the other process writes to the same pipe
"""
CLUSTER = Path(__file__).parents[2] / "recipes" / "cluster"
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2"],
    "ddp": ["accelerate.commands.launch", "--num_processes=2", f"--config_file={CLUSTER / 'ddp.yaml'}"],
    "fsdp2": ["accelerate.commands.launch", "--num_processes=2", f"--config_file={CLUSTER / 'fsdp2.yaml'}"],
}


def launch(launcher: list[str], dpo_rows: Path, student: Path, out: Path, port: int) -> str:
    out.mkdir()
    (out / "child.py").write_text(CHILD)
    option = "--master-port" if "torch" in launcher[0] else "--main_process_port"
    command = [sys.executable, "-m", *launcher, f"{option}={port}", str(out / "child.py"), str(dpo_rows), str(student)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [*command, str(out / "run"), SETTINGS.model_dump_json()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_are_one(launcher: str, student: Path, dpo_rows: Path, tmp_path: Path, free_port: int) -> None:
    train("dpo", dpo_rows, student, tmp_path / "alone", settings=SETTINGS, seed=0)
    said = launch(LAUNCHERS[launcher], dpo_rows, student, tmp_path / "two", free_port)
    assert said.count("2 processes, sharded" if launcher == "fsdp2" else "2 processes\n") == 2
    alone, two = (tmp_path / name for name in ("alone", "two/run"))
    assert sorted(path.name for path in two.iterdir()) == ["log.jsonl", "model", "result.json"]
    left, right = weights(alone), weights(two)
    assert distance(left, right) < 1e-5
    assert distance(left, dict(load_file(student / "model.safetensors"))) > 1e-4
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (alone, two)]
    for one, both in zip(*logs, strict=True):
        for name in one.keys() - {"seconds"}:
            assert both[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    assert torch.isfinite(torch.cat([values.flatten() for values in right.values()])).all()


class Shown(Recorder):
    """Calls `at` with each step that is shown."""

    def __init__(self, at: Callable[[int], None]) -> None:
        super().__init__()
        self.at = at

    @contextmanager
    def progress(self, title: str) -> Iterator[Update]:
        with super().progress(title) as update:

            def both(done: int, total: int, remark: str) -> None:
                update(done, total, remark)
                self.at(done)

            yield both


def workers(out: Path) -> dict[int, str]:
    """The processes that train in a folder: pid -> rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f'"out": "{out}"'.encode() in (process / "cmdline").read_bytes():
                variables = (process / "environ").read_text().split("\0")
                found[int(process.name)] = next(each[5:] for each in variables if each.startswith("RANK="))
    return found


def wait_until(ready: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_student_of_a_recipe_trains_in_two_processes_as_in_one(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    written: dict[str, Any] = {
        "name": "own",
        "models": {"tiny": {"weights": str(student)}},
        "datasets": {"chains": {"file": str(sft_rows), "rows": "sft"}},
        "students": {
            "one": {"from": "tiny", "method": "sft", "data": "chains", "batch_size": 4, "learning_rate": 1e-3}
            | {"precision": "fp32"},
            "two": {"like": "one", "gpus": 2},
        },
    }
    with pytest.raises(UsageError, match=r"^gpus is 5, and a step has 4 rows; set gpus to at most that$"):
        run(build_recipe(changed_recipe(written, ("students.two.gpus", 5))), tmp_path)
    assert not (tmp_path / "own").exists(), "found before any work"
    shown = Recorder()
    run(build_recipe(written), tmp_path, output=shown)
    one, two = (tmp_path / "own" / "students" / name for name in ("one", "two"))
    assert shown.steps == [1, 2, 3, 1, 2, 3], "of both, the second told by its processes"
    assert {path.name for path in (two / "processes").glob("rank*")} == {"rank0.log", "rank1.log"}
    assert not (one / "processes").exists()
    assert weights(one).keys() == weights(two).keys() and distance(weights(two), weights(one)) < 1e-6
    assert distance(weights(one), dict(load_file(student / "model.safetensors"))) > 1e-4
    assert not workers(two)


@pytest.mark.slow
def test_a_sharded_student_goes_on_after_a_process_was_killed(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    """FSDP2 over two gloo processes, with an adapter and probes, in bf16: the student of one process."""
    settings = ["batch_size=4", "epochs=2", "learning_rate=1e-3", "save_steps=1", "pack_tokens=60", "lora.rank=4"]
    settings += ["precision=bf16", "probe.every=2", "probe.questions=1", "probe.max_tokens=4", "probe.keep=best"]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = train_rows("sft", student, sft_rows, one, overrides=settings)

    def kill(step: int) -> None:
        if step == 3:
            os.kill(next(pid for pid, rank in workers(two).items() if rank == "1"), signal.SIGKILL)

    with pytest.raises(CotreeError) as error:
        train_rows("sft", student, sft_rows, two, overrides=[*settings, "gpus=2", "shard=true"], output=Shown(kill))
    log = two / "processes" / "rank1.log"
    assert str(error.value) == (
        f"process 1 of the 2 that trained ended by signal 9; its log is {log}; "
        "the same command goes on from the last checkpoint"
    )
    assert log.is_file() and not workers(two)
    assert sorted(path.name for path in (two / "trainer/checkpoint-2/optimizer_0").glob("*.distcp")) == [
        "__0_0.distcp", "__1_0.distcp",
    ], "a part of each process"  # fmt: skip
    with pytest.raises(
        UsageError,
        match=r"checkpoint-\d was written in shards and now the model is whole .*; set `gpus` and `shard` back, or del",
    ):
        train_rows("sft", student, sft_rows, two, overrides=settings)
    shown = Recorder()
    result = train_rows("sft", student, sft_rows, two, overrides=[*settings, "gpus=2", "shard=true"], output=shown)
    assert shown.steps[0] in (3, 4) and shown.steps[-1] == 6
    assert (result.steps, result.kept) == (alone.steps, alone.kept)
    assert weights(one).keys() == weights(two).keys() and distance(weights(two), weights(one)) < 1e-5
    assert distance(weights(one), dict(load_file(student / "model.safetensors"))) > 1e-4


@pytest.mark.slow
def test_what_ends_a_process_with_a_reason_ends_the_command_with_it(
    student: Path, sft_rows: Path, tmp_path: Path
) -> None:
    settings = ["gpus=2", "batch_size=4", "learning_rate=1e30", "epochs=4"]
    with pytest.raises(CotreeError, match=r"^the loss became \w+ at step \d: lower learning_rate, or look for broken"):
        train_rows("sft", student, sft_rows, tmp_path / "out", overrides=settings)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_command(stop: signal.Signals, student: Path, sft_rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cotree.cli", "train", "sft", "--student", str(student), "--data", str(sft_rows)]
    command += ["-o", str(out), "gpus=2", "epochs=9999"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until((out / "log.jsonl").exists, 120)
            assert sorted(workers(out).values()) == ["0", "1"]
            process.send_signal(stop)
            process.wait(timeout=30)
            wait_until(lambda: not workers(out), 10)
        finally:
            process.kill()


@pytest.mark.slow
def test_a_whole_recipe_runs_under_torchrun(tmp_path: Path, free_port: int) -> None:
    """The first process asks the server and evaluates; the others only train."""
    content = {}
    for name in ("one", "torchrun"):
        with FakeServerThread(chat_only=True, reply=knowing_reply) as server:
            written = small(server.url, tiny_student(tmp_path))
            del written["students"]["masked"]
            written["evaluations"]["test"]["models"] = ["sft", "joint"]
            (tmp_path / "r.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
            cotree = [sys.executable, "-m", "cotree.cli", "run", "r.yaml", f"name={name}"]
            torchrun = [sys.executable, "-m", *LAUNCHERS["torchrun"], f"--master-port={free_port}", "--no-python"]
            done = subprocess.run(
                [*torchrun, *cotree] if name == "torchrun" else cotree,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                cwd=tmp_path,
                text=True,
                stdout=subprocess.PIPE,
                timeout=280,
                check=True,
            )
            lines = done.stdout.splitlines()
            assert sum("trees/train: begins" in line for line in lines) == 1, "only the first one speaks"
            run_folder = tmp_path / "runs" / name
            records = RunFolder(run_folder).nodes()
            assert records and all(record.done for record in records.values())
            content[name] = server.calls, weights(run_folder / "students/sft"), weights(run_folder / "students/joint")
    (calls, *students), (calls_of_many, *students_of_many) = content.values()
    assert calls == calls_of_many
    for left, right in zip(students_of_many, students, strict=True):
        assert distance(left, right) < 1e-5


def test_what_cannot_be_started_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [process_count(DPO(batch_size=size)) for size in (8, 3)] == [4, 3]
    with pytest.raises(UsageError, match=r"^gpus is 5, but 4 are here; set gpus=4 or gpus=all$"):
        process_count(DPO(gpus=5))
    with pytest.raises(UsageError, match=r"^gpus is 4, and a step has 3 rows; set gpus to at most that$"):
        process_count(DPO(gpus=4, batch_size=3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [process_count(DPO()), process_count(DPO(gpus=5, batch_size=5))] == [1, 5]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"^DeepSpeed cannot train here, .*; set shard=true \(FSDP2\)$"):
        training_arguments(tmp_path, DPO(), 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert process_count(DPO(batch_size=3)) == 1, "nothing was started: there is no rank"
    for name, value in {"RANK": "0", "MASTER_PORT": "9", "MASTER_ADDR": "127.0.0.1"}.items():
        assert process_count(DPO(batch_size=3)) == 1, f"{name} is not set"
        monkeypatch.setenv(name, value)
    assert process_count(DPO(gpus=2)) == 4
    with pytest.raises(UsageError, match=r"^4 processes were started, and a step has 3 rows; set batch_size to 4 at "):
        process_count(DPO(batch_size=3))
