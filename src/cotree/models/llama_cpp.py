"""llama.cpp in this process (xllamacpp), serving a GGUF file on loopback as an OpenAI-compatible server."""

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
        slots: sequences decoded in parallel.
        context: maximum tokens per sequence.
        shared: unified KV cache, in which the `n` samples of a request share their prompt (for search); else one per
            slot, which is faster for unrelated prompts (for evaluation).

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
    # The default prompt cache would take 8 GiB.
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = usable_cores()
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.verbosity = -1
    # Turn off llama.cpp's default truncation of unlikely tokens, so that temperature means the same at all servers.
    # top_k 256 is close to the whole vocabulary, which would take a quarter more time to sort per token.
    params.sampling.top_k, params.sampling.min_p = 256, 0.0

    def start() -> xllamacpp.Server:
        server = xllamacpp.Server(params)
        _warm_up(server.listening_address)
        return server

    # Start in a thread, which Ctrl-C does not interrupt: a server closed before its loop starts never ends.
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
    """Wait until the server generates one token."""
    body = json.dumps({"prompt": "Hi", "n_predict": 1, "cache_prompt": False}).encode()
    request = urllib.request.Request(f"{url}/completion", body, {"Content-Type": "application/json"})  # noqa: S310
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
    with direct.open(request, timeout=120) as reply:
        reply.read()
