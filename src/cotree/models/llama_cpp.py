"""llama.cpp in this process (xllamacpp), serving a GGUF file on loopback as an OpenAI-compatible server.

Nothing else in cotree needs to know whether a model runs here or elsewhere.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cotree.base.errors import UsageError
from cotree.base.machine import usable_cores
from cotree.models.checksums import check_weights


@contextmanager
def serve(path: Path, *, slots: int = 16, context: int = 2048, shared: bool = False) -> Iterator[str]:
    """Serve a GGUF file on a free loopback port while the block runs; yields the base URL.

    Args:
        slots: sequences that are decoded at once.
        context: tokens that a sequence may have.
        shared: one KV cache for all slots, in which the `n` samples of a request share their prompt (search); else each
            slot has its own, which is faster for unrelated prompts (evaluation).

    Raises:
        UsageError: xllamacpp is not installed, the file is damaged, or llama.cpp cannot load it.
    """
    try:
        import xllamacpp
    except ImportError:
        raise UsageError("weights in this process need xllamacpp: pip install 'cotree[local]'") from None

    check_weights(path)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx, params.kv_unified = slots, slots * context, shared
    # The default prompt cache takes 8 GiB.
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = usable_cores()
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.verbosity = -1
    # By default llama.cpp cuts unlikely tokens, which other servers do not: a temperature should mean one thing. 256 is
    # near enough to the whole vocabulary, which would take a quarter more time to sort for every token.
    params.sampling.top_k, params.sampling.min_p = 256, 0.0

    def start() -> xllamacpp.Server:
        server = xllamacpp.Server(params)
        _warm_up(server.listening_address)
        return server

    # In a thread, which Ctrl-C does not reach: a server that is closed before its loop has begun never ends.
    with ThreadPoolExecutor(1) as pool:
        try:
            server = pool.submit(start).result()
        except RuntimeError as error:
            raise UsageError(f"llama.cpp cannot load {path}: {error}; is it a GGUF of a supported model?") from None
    try:
        yield server.listening_address
    finally:
        del server


def _warm_up(url: str) -> None:
    """Wait until the server generates: have it write one token."""
    body = json.dumps({"prompt": "Hi", "n_predict": 1, "cache_prompt": False}).encode()
    request = urllib.request.Request(f"{url}/completion", body, {"Content-Type": "application/json"})  # noqa: S310
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
    with direct.open(request, timeout=120) as reply:
        reply.read()
