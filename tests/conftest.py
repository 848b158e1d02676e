"""Fixtures of several packages' tests: a tiny tokenizer, and the engine to serve GGUF files."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.tiny_student import Post
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from tests.support.tiny_student import tiny_tokenizer

    return tiny_tokenizer()


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
