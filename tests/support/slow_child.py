"""A training run in a process of its own, slow enough to be killed in the middle."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from cotree.experiment.recipe import TrainDPO, TrainSFT
from cotree.train.dpo import train_dpo
from cotree.train.sft import train_sft
from cotree.train.trainer import StepLog


def train_slowly(
    rows: Path, student: Path, out: Path, settings: TrainSFT | TrainDPO, pause: float, steps: Connection
) -> None:
    """Train; send each step's number when it is done, and then wait for so many seconds."""
    torch.set_num_threads(1)  # as the tests do (`conftest`), else sums round differently

    def on_step(log: StepLog) -> None:
        steps.send(log.step)
        time.sleep(pause)

    if isinstance(settings, TrainSFT):
        train_sft(rows, student, out, settings, 0, 512, on_step)
    else:
        train_dpo(rows, student, out, settings, 0, 512, on_step)
