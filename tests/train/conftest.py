"""Fixtures of the training tests: a tiny student on disk, and rows for it."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.support.tiny_student import dpo_row, sft_row, tiny_model
from transformers import PreTrainedTokenizerFast

from cotree.train import trainer

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True, scope="module")
def tiny_runs_are_fast() -> Iterator[None]:
    """Without this each run would look three times for garbage in all that was ever imported."""
    gc.collect()
    gc.freeze()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    """Tiny models gain nothing from threads, and lose much to them on a busy machine."""
    torch.set_num_threads(THREADS if "real" in request.keywords else 1)


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    """`precision: auto` is fp32 on every CPU: what is compared here is compared to the last digits."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "cpu_has_bf16", lambda: False)
        yield


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A transformers folder of a tiny random Llama."""
    folder = tmp_path_factory.mktemp("student") / "tiny"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sft_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "sft.parquet"
    pq.write_table(pa.Table.from_pylist([sft_row(index) for index in range(11)]), path)
    return path


@pytest.fixture(scope="session")
def dpo_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "dpo.parquet"
    pq.write_table(pa.Table.from_pylist([dpo_row(index) for index in range(10)]), path)
    return path


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
