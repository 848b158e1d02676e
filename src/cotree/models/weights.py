"""Models by name: where their weights are, each as GGUF of a type, and what identifies them.

Teacher and student are served by one engine, in llama.cpp at one GGUF type, so that a comparison is fair. A packaged
model's file is checked against its sha256. Two models of one identity are one model: fingerprints and the keys of
journalled completions are made of it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

import yaml

from cotree.base.atomic import atomic_draft, content_sha256, damage, sums_of, write_json, write_sums
from cotree.base.errors import CotreeError, UsageError
from cotree.base.settings import Section, apply_override, parse_section
from cotree.models.settings import SPEED_ARGS, Engine, GGUFType, Model
from cotree.models.vllm import visible_gpus, vllm_program


class PackagedModel(Section):
    """A model inside installed packages.

    file: its name. parts: (package, path in it), joined in this order. install: what installs them. about: for lists.
    hub: the repository that has the same file, asked where the packages are not installed.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    install: str
    about: str
    hub: str | None = None


_SHIPPED = yaml.safe_load((files("cotree.models") / "packaged.yaml").read_text("utf-8"))
PACKAGED = {name: PackagedModel.model_validate(model) for name, model in _SHIPPED.items()}

# A model of the hub: `OWNER/NAME`, a revision of it (`OWNER/NAME@REVISION`), or a GGUF file in it
# (`OWNER/NAME:FILE.gguf`, `OWNER/NAME@REVISION:FILE.gguf`).
HUB_WEIGHTS = re.compile(
    r"(?![^:]*\.gguf$)(?P<repo>\w[\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>.+\.gguf))?"
)
_FORMS = (
    f"a packaged model ({', '.join(PACKAGED)}), a .gguf file, a transformers folder, or a model of the hub "
    "(OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME:FILE.gguf)"
)
# What decides the text of a transformers folder; the rest is cards, logs and the like.
_TOKENIZER_FILES = ("token*", "*.model", "special_tokens*", "added_tokens*", "vocab*", "merges*", "chat_template*")
_MODEL_FILES = ("model*.safetensors", "adapter_model*.safetensors", "config.json", *_TOKENIZER_FILES)
# What to do when the cache folder's disk is full.
_OTHER_DISK = "set XDG_CACHE_HOME to another disk"
# A file that was written so lately may be written again within the same tick of the file system's clock.
_SETTLED_NS = 1_000_000_000


def locate(name: str) -> Path:
    """The GGUF file or transformers folder of a name: a packaged model, a path, or a model of the hub (`HUB_WEIGHTS`).

    A packaged file that comes in parts is joined in the cache folder, once; what is on the hub is downloaded, once,
    into the hub client's own cache. What is here comes before the hub.

    Raises:
        UsageError: nothing of that name is here or on the hub, or it is damaged or not whole.
        CotreeError: the cache folder cannot be written.
    """
    if name in PACKAGED:
        return _packaged_file(name, PACKAGED[name])
    path = Path(name)
    if path.is_dir():
        return _whole_folder(path, name)
    if name.endswith(".gguf") and path.is_file():
        return path
    if (on_hub := HUB_WEIGHTS.fullmatch(name)) and not path.exists():
        repo, revision, file = on_hub["repo"], on_hub["revision"], on_hub["file"]
        return _hub_file(repo, file, revision) if file else _whole_folder(_hub_folder(repo, revision), name)
    raise UsageError(f"no weights `{name}` are here; {_did_you_mean(name)}give {_FORMS}")


def _did_you_mean(name: str) -> str:
    """The packaged model whose name is nearly this one, as a part of an error."""
    near = difflib.get_close_matches(name, PACKAGED, n=1)
    return f"did you mean `{near[0]}`? Else " if near else ""


def _whole_folder(path: Path, name: str) -> Path:
    """A transformers folder, looked at for what it must hold: a config, all files of its weights, and a tokenizer;
    `name` is named in errors."""
    from cotree.models.gguf_files import weight_files
    from cotree.models.tokenizer import check_has_tokenizer

    if (path / "config.json").is_file() and (files := weight_files(path)):
        if missing := [file.name for file in files if not file.is_file()]:
            raise UsageError(f"{name} lacks {missing[0]} ({len(missing)} of {len(files)} files); copy it again")
        check_has_tokenizer(path)
        return path
    check_weights(path)
    fix = f"give {path / 'model'}" if (path / "model").is_dir() else "give a transformers folder"
    raise UsageError(f"{name} has no config.json with model.safetensors or model.safetensors.index.json; {fix}")


def packaged_models() -> str:
    """The packaged models, a line each: name, what it is, whether it is installed. Asks no hub."""
    lines, width = [], max(map(len, PACKAGED))
    for name, model in PACKAGED.items():
        here = _installed_parts(model) or _in_hub_cache(model) or (cache_folder() / model.file).is_file()
        lines.append(f"{name:{width}}  {model.about}{'' if here else f'; not installed: {model.install}'}")
    return "\n".join(lines)


def is_url(word: str) -> bool:
    """Whether a model's word is the address of a server."""
    return word.casefold().startswith(("http://", "https://"))


def parse_model(
    word: str,
    *,
    served: str = "default",
    tokenizer: str | None = None,
    chat: bool = False,
    api_key_env: str | None = None,
    max_in_flight: int = 16,
    engine: str | None = None,
    engine_args: Sequence[str] | None = None,
) -> Model:
    """The model, as a recipe would have it, that one word on the command line or in Python names: a server's URL, or
    weights as `locate` knows them.

    Args:
        served: a server's name for the model.
        tokenizer: hub id or folder that renders a server's prompts. chat: the server renders them instead.
        api_key_env: the environment variable that holds a server's key.
        max_in_flight: requests at once.
        engine, engine_args: of weights, as in a recipe's model; each argument as `key=value`.

    Raises:
        UsageError: the word names nothing, or an option does not go with it.
    """
    shared: dict[str, Any] = {"tokenizer": tokenizer, "max_in_flight": max_in_flight, "engine": engine}
    for argument in engine_args or ():
        apply_override(shared.setdefault("engine_args", {}), argument, "max_model_len=8192")
    if is_url(word):
        shared |= {"mode": "chat" if chat or tokenizer is None else "completions", "api_key_env": api_key_env}
        model = parse_section(Model, {"url": word, "model": served, **shared}, "")
        if tokenizer is None and not chat:
            raise UsageError(f"give --tokenizer (hub id or folder) for {word}, or --chat: its server renders then")
        return model
    if chat or api_key_env:
        raise UsageError("--chat and --api-key-env are for servers; weights in this process continue text exactly")
    if not word or (word not in PACKAGED and not HUB_WEIGHTS.fullmatch(word) and not Path(word).exists()):
        raise UsageError(f"nothing at `{word}`; {_did_you_mean(word)}give a server's URL, {_FORMS}")
    return parse_section(Model, {"weights": word, **shared}, "")


def gguf_file(model: Model, kind: GGUFType) -> Path:
    """The weights of a model as a GGUF file of a type; made once and kept in the cache folder where it is another's.

    Raises:
        UsageError: the weights are not here, or cannot be written as GGUF.
        CotreeError: the cache folder cannot be written.
    """
    if model.weights is None:
        raise UsageError(f"model `{model.model}` is on a server; only `weights` have a GGUF file")
    source = locate(model.weights)
    if not source.is_dir():
        return gguf_at_type(source, kind)
    from cotree.models.gguf_export import export_gguf

    cached = cache_folder() / f"{source.resolve().name}-{folder_sha256(source)[:12]}-{kind}.gguf"
    if not is_whole(cached):
        check_weights(source)
        export_gguf(source, cached, kind)
    return cached


def gguf_at_type(source: Path, kind: GGUFType) -> Path:
    """A GGUF file of the same weights at a type: itself, or a conversion that is kept in the cache folder.

    Q8_0 is the default because it is the fastest on a CPU: `python benchmarks/embedded.py` compares the types.
    """
    from cotree.models.gguf_files import FILE_TYPES, GGUF, write_gguf

    file = GGUF(source)
    if file.get("general.file_type") == FILE_TYPES[kind]:
        return source
    cached = cache_folder() / f"{source.stem.rsplit('.', 1)[0]}-{file_sha256(source)[:12]}-{kind}.gguf"
    if not is_whole(cached):
        check_weights(source)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        with atomic_draft(cached, _OTHER_DISK) as draft:
            write_gguf(draft, file.fields, kind, shapes=shapes, read=file.array, alignment=file.alignment)
        write_sums(sums_of(cached), [cached])
    return cached


def engine_of(model: Model) -> Engine:
    """What serves a model's weights: what it says, else vLLM where it and a GPU are here and the weights are a
    transformers folder, else llama.cpp.

    Raises:
        UsageError: the weights are not here, or are a GGUF file that vLLM is to serve.
    """
    wanted = model.engine or ("vllm" if vllm_program() and visible_gpus() else "llama.cpp")
    if wanted == "llama.cpp" or locate(str(model.weights)).is_dir():
        return wanted
    if model.engine is None:
        return "llama.cpp"
    raise UsageError(f"`engine: vllm` serves transformers folders; {model.weights} is a GGUF file, for llama.cpp")


def context_length(source: Path) -> int | None:
    """The most tokens that weights, a GGUF file or a transformers folder, were made for; None where they do not say."""
    from cotree.models.gguf_files import GGUF

    if source.is_dir():
        found = json.loads((source / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    else:
        file = GGUF(source)
        found = file.get(f"{file['general.architecture']}.context_length")
    return found if isinstance(found, int) else None


def tokenizer_source(model: Model) -> str | Path | None:
    """Where a model's tokenizer is: a hub id, a folder or a GGUF file; None where the server renders prompts.

    Raises:
        UsageError: the weights that carry it are not here.
    """
    if model.weights is None or model.tokenizer is not None:
        return model.tokenizer
    return locate(model.weights)


def parameter_count(source: Path) -> int:
    """The number of weights in a GGUF file or a transformers folder."""
    from cotree.models.gguf_files import GGUF, stored_tensors

    tensors = stored_tensors(source) if source.is_dir() else GGUF(source).tensors
    return sum(prod(tensor.shape) for tensor in tensors.values())


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/cotree`, by default `~/.cache/cotree`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotree"


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hex; remembered in the cache folder until its size or mtime changes.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    name, status = str(path.resolve()), path.stat()
    version = [status.st_size, status.st_mtime_ns]
    known = _known_hashes()
    if known.get(name, [])[:2] == version:
        return str(known[name][2])
    found = content_sha256(path)
    if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
        kept = {other: entry for other, entry in known.items() if os.path.exists(other)}
        with suppress(CotreeError):  # without a cache the file is hashed again, that is all
            write_json(cache_folder() / "sha256.json", {**kept, name: [*version, found]})
    return found


def _known_hashes() -> dict[str, list[object]]:
    """File -> [size, mtime in ns, sha256]; empty where the file of hashes is missing or damaged."""
    try:
        found = json.loads((cache_folder() / "sha256.json").read_text(encoding="utf-8"))
        return {str(name): [*entry] for name, entry in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def is_whole(path: Path) -> bool:
    """Whether a file or folder is there, with the content that its sums say, if it has any."""
    return path.exists() and (not sums_of(path).is_file() or damage(sums_of(path)) is None)


def check_weights(path: Path) -> None:
    """Read weights, a file or a transformers folder, and compare them with their sums.

    Those that cotree did not make have no sums: they are compared with what is remembered of them (`file_sha256`).

    Raises:
        UsageError: they are damaged.
    """
    if sums_of(path).is_file():
        if fault := damage(sums_of(path)):
            raise UsageError(f"{path} is damaged ({fault}); delete it and run again what made it")
        return
    known = _known_hashes()
    for file in _model_files(path) or filter(Path.is_file, [path]):
        *version, remembered = known.get(str(file.resolve()), [None])
        status = file.stat()
        if version == [status.st_size, status.st_mtime_ns] and remembered != content_sha256(file):
            raise UsageError(f"{file} is damaged (other content, but the same size and date as before); fetch it again")


def _model_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()})


def folder_sha256(folder: Path) -> str:
    """One hash of a transformers folder's weights, config and tokenizer, whatever else is in it."""
    lines = [f"{path.name} {file_sha256(path)}" for path in _model_files(folder)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def identity(model: Model, gguf: GGUFType | None = None) -> dict[str, Any]:
    """What decides the text that a model writes, as plain data; never its address or its name in a recipe.

    Weights: `{"weights": sha256}` with what `serving` says, and a `tokenizer` that is not their own. A served model:
    `{"model": name, "tokenizer": hub id or sha256}`, and its `mode` where it is not asked for completions of rendered
    prompts, and what `omit` keeps from it.

    Args:
        gguf: the type at which weights are served, by default the model's own.

    Raises:
        UsageError: the weights are not here.
    """
    tokenizer = model.tokenizer
    if tokenizer is not None and Path(tokenizer).exists():  # by its content, so that it may be moved
        tokenizer = _content_sha256(Path(tokenizer))
    if model.weights is None:
        served: dict[str, Any] = {"model": model.model, "tokenizer": tokenizer}
        served |= {} if model.mode == "completions" else {"mode": model.mode}
        return served | ({"omit": sorted(model.omit)} if model.omit else {})
    found: dict[str, Any] = {"weights": _content_sha256(locate(model.weights))}
    if tokenizer is not None:
        found["tokenizer"] = tokenizer
    return found | serving(model, gguf)


def serving(model: Model, gguf: GGUFType | None = None) -> dict[str, Any]:
    """What decides text of how weights are served: `{"gguf": type}` in llama.cpp, else `{"engine": "vllm"}` and the
    `engine_args` that are no matter of place, memory or speed alone.

    Raises:
        UsageError: as `engine_of`.
    """
    if engine_of(model) == "llama.cpp":
        return {"gguf": gguf or model.gguf}
    content = {name: value for name, value in model.engine_args.items() if name not in SPEED_ARGS}
    return {"engine": "vllm"} | ({"engine_args": content} if content else {})


def identity_text(model: Model) -> str:
    """`identity` as one line of JSON; equal models give equal lines."""
    return json.dumps(identity(model), sort_keys=True, separators=(",", ":"))


def _content_sha256(path: Path) -> str:
    return folder_sha256(path) if path.is_dir() else file_sha256(path)


def _packaged_file(name: str, model: PackagedModel) -> Path:
    joined = cache_folder() / model.file
    if len(model.parts) > 1 and joined.is_file() and file_sha256(joined) == model.sha256:
        return joined
    parts = _installed_parts(model)
    if not parts:
        return _file_from_hub(name, model)
    if len(parts) == 1:
        return _undamaged(parts[0], model)
    with atomic_draft(joined, _OTHER_DISK) as draft:
        with draft.open("wb") as joining:
            for part in filter(Path.is_file, parts):
                joining.write(part.read_bytes())
        _undamaged(draft, model)
    return joined


def _installed_parts(model: PackagedModel) -> list[Path]:
    """The parts of a packaged model; none where a package is missing."""
    parts = []
    for package, file in model.parts:
        # A package's own imports may need a compiled dependency that cotree has no use for, so it is never imported.
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return []
        parts.append(Path(spec.origin).parent / file)
    return parts


def _file_from_hub(name: str, model: PackagedModel) -> Path:
    """A packaged model's file from its repository on the hub, or from the hub client's own cache."""
    if model.hub is None:
        raise UsageError(f"model `{name}` is not installed; run {model.install}")
    try:
        path = _in_hub_cache(model) or _hub_file(model.hub, model.file)
    except UsageError as error:
        fault = f"model `{name}` is not installed and cannot be fetched from the hub"
        raise UsageError(f"{fault}; run {model.install}") from error
    if file_sha256(path) != model.sha256:
        fault = f"{model.file} of {model.hub} is damaged (its sha256 is not {model.sha256[:12]}...)"
        raise UsageError(f"{fault}; delete {path.resolve()} or run {model.install}")
    return path


def _in_hub_cache(model: PackagedModel) -> Path | None:
    """A packaged model's file in the cache of the hub's client; asks nobody."""
    if model.hub is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.hub, model.file)
    return Path(found) if isinstance(found, str) else None


def _undamaged(path: Path, model: PackagedModel) -> Path:
    """The path, after a check of its sha256."""
    if not path.is_file() or file_sha256(path) != model.sha256:
        packages = ", ".join(package.replace("_", "-") for package, _ in model.parts)
        raise UsageError(f"{model.file} is damaged (its sha256 is not {model.sha256[:12]}...); reinstall {packages}")
    return path


def _hub_file(repo: str, file: str, revision: str | None = None) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(f"{file} of {repo}"):
        return Path(hf_hub_download(repo, file, revision=revision))


def _hub_folder(repo: str, revision: str | None) -> Path:
    """A model of the hub as a folder in the hub client's cache; only what a transformers folder is made of."""
    from huggingface_hub import snapshot_download

    wanted = [*_MODEL_FILES, "model.safetensors.index.json", "generation_config.json"]
    with _hub_errors(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the hub client raises a dozen unrelated types
        from huggingface_hub import is_offline_mode
        from huggingface_hub.errors import RepositoryNotFoundError

        if is_offline_mode():
            raise UsageError(f"{what} is not here, and the hub is not asked now (offline)") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        if isinstance(error, RepositoryNotFoundError) and status == 404:
            reason = "there is no such model; correct the name"
        elif status in (401, 403):
            reason = "access is refused; accept its licence on its page there, then run `hf auth login`"
        elif "ConnectError" in reason or "ConnectTimeout" in reason:
            reason = "it is not reached; check the network"
        raise UsageError(f"{what} is not here, and cannot be got from the hub: {reason}, or give a path") from None
