"""Fixtures of the training tests: a tiny student on disk, rows for it, and the engine to serve GGUF files."""

from __future__ import annotations

import gc
import json
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.support.tiny_student import Post, dpo_row, sft_row, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


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
def serve(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[Path], Post]]:
    """Serve GGUF files with llama.cpp on loopback; a call gives a function that posts to the server."""
    import xllamacpp

    servers = []

    def start(path: Path) -> Post:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.cache_ram_mib, params.n_gpu_layers = 512, 1, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.port, params.verbosity, params.warmup = 0, -1, False
        server = xllamacpp.Server(params)
        servers.append(server)

        def post(route: str, body: dict[str, Any]) -> dict[str, Any]:
            request = urllib.request.Request(
                server.listening_address + route, json.dumps(body).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                answer: dict[str, Any] = json.load(response)
                return answer

        return post

    yield start
    servers.clear()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
