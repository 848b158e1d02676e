"""Two processes give what one gives, started by torchrun or by accelerate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.tiny_student import distance, weights

from cotree.train.run import train
from cotree.train.settings import DPO

SETTINGS = DPO(batch_size=5, pack_tokens=150, epochs=1.0, learning_rate=1e-3, save_steps=1)
CHILD = """
import sys
from pathlib import Path
from cotree.train.settings import DPO
from cotree.train.run import train
if __name__ == "__main__":
    rows, student, out, settings = sys.argv[1:]
    settings = DPO.model_validate_json(settings)
    train("dpo", Path(rows), Path(student), Path(out), settings=settings, seed=0)
"""
SHARDED = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer
from cotree.train.settings import DPO
from cotree.train.dpo import PairTrainer
from cotree.train.model import load_model
from cotree.train.trainer import training_arguments
from cotree.train.rows import encode_file
rows, student, out, settings = sys.argv[1:]
settings = DPO.model_validate_json(settings)
pairs = encode_file(Path(rows), AutoTokenizer.from_pretrained(student), settings).rows
step = [replace(pair, reference=(-9.0, -11.0)) for pair in pairs]
arguments = training_arguments(Path(out), settings, 1, 0)
model = load_model(Path(student))
if arguments.world_size > 1:
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    for part in (*norms, model.model.norm, *model.model.layers, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
trainer = PairTrainer(model, [step], arguments, settings)
assert len(trainer.packs(step)) > 2
loss = trainer.training_step(model, step)
gradients = {name: values.grad for name, values in model.named_parameters()}
if arguments.world_size > 1:
    assert all(values.to_local().numel() < values.numel() for values in gradients.values())
    gradients = {name: values.full_tensor() for name, values in gradients.items()}
if arguments.process_index == 0:
    torch.save({"loss": loss, **gradients}, f"{out}.pt")
# A process that ends while the other still sends to it is aborted by a thread of gloo.
trainer.accelerator.state.destroy_process_group()
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2"],
    "accelerate": [
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ],
}


def launch(launcher: list[str], dpo_rows: Path, student: Path, out: Path, port: int, child: str = CHILD) -> None:
    out.mkdir()
    (out / "child.py").write_text(child)
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


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_processes_are_one(launcher: str, student: Path, dpo_rows: Path, tmp_path: Path, free_port: int) -> None:
    train("dpo", dpo_rows, student, tmp_path / "alone", settings=SETTINGS, seed=0)
    launch(LAUNCHERS[launcher], dpo_rows, student, tmp_path / "two", free_port)
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


@pytest.mark.slow
def test_a_step_of_a_sharded_student_has_the_same_gradient(
    student: Path, dpo_rows: Path, tmp_path: Path, free_port: int
) -> None:
    """torch's FSDP2 by itself: accelerate gives it to accelerators only."""
    two = LAUNCHERS["torchrun"]
    one = [each.replace("=2", "=1") for each in two]
    for name, launcher in (("one", one), ("two", two)):
        launch(launcher, dpo_rows, student, tmp_path / name, free_port, SHARDED)
    alone, sharded = (torch.load(tmp_path / name / "run.pt") for name in ("one", "two"))
    assert sharded.pop("loss").item() == pytest.approx(alone.pop("loss").item(), rel=1e-6)
    assert distance(sharded, alone) < 1e-5
