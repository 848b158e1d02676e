"""A training run in a process of its own, slow enough to be killed in the middle."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from cotree.train import dpo, sft  # noqa: F401 - imported before the process is forked
from cotree.train.callback import StepLog
from cotree.train.run import train
from cotree.train.settings import DPO, SFT


def train_slowly(
    method: str, rows: Path, student: Path, out: Path, settings: SFT | DPO, pause: float, steps: Connection
) -> None:
    """Train; send each step's number when it is done, and then wait for so many seconds."""
    torch.set_num_threads(1)  # as the tests do (`conftest`), else sums round differently

    def on_step(log: StepLog) -> None:
        steps.send(log.step)
        time.sleep(pause)

    train(method, rows, student, out, settings=settings, seed=0, on_step=on_step)
