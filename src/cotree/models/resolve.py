"""Resolve an entry of a recipe's `models` to its engine, GGUF file, tokenizer and identity.

Teacher and student use the same engine, in llama.cpp the same GGUF type, so that comparisons are fair. Models with
equal identity are the same model: it goes into fingerprints and journal keys.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotree.base.atomic import atomic_draft, sums_of, write_sums
from cotree.base.errors import UsageError
from cotree.base.settings import apply_override, parse_section
from cotree.models.checksums import (
    OTHER_DISK,
    cache_folder,
    check_weights,
    file_sha256,
    folder_sha256,
    is_whole,
    path_sha256,
)
from cotree.models.settings import SPEED_ARGS, Engine, GGUFType, Model
from cotree.models.vllm import visible_gpus, vllm_program
from cotree.models.weights import FORMS, HUB_WEIGHTS, PACKAGED, did_you_mean, locate


def is_url(word: str) -> bool:
    """Whether a model argument is a server's URL."""
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
    """Parse a model given on the command line or in Python: a server's URL, or weights (`locate`).

    Args:
        served: the model's name at the server.
        tokenizer: hub id or folder that renders a server's prompts. chat: the server renders them instead.
        api_key_env: the environment variable with a server's key.
        max_in_flight: concurrent requests.
        engine, engine_args: for weights, as in a recipe's model; arguments as `key=value`.

    Raises:
        UsageError: no such model, or an option that does not apply to it.
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
        raise UsageError(f"nothing at `{word}`; {did_you_mean(word)}give a server's URL, {FORMS}")
    return parse_section(Model, {"weights": word, **shared}, "")


def engine_of(model: Model) -> Engine:
    """The engine of a model's weights: as set, else vLLM if it is installed, a GPU is present and the weights are a
    transformers folder, else llama.cpp.

    Raises:
        UsageError: the weights are missing, or a GGUF file with `engine: vllm`.
    """
    wanted = model.engine or ("vllm" if vllm_program() and visible_gpus() else "llama.cpp")
    if wanted == "llama.cpp" or locate(str(model.weights)).is_dir():
        return wanted
    if model.engine is None:
        return "llama.cpp"
    raise UsageError(f"`engine: vllm` serves transformers folders; {model.weights} is a GGUF file, for llama.cpp")


def gguf_file(model: Model, kind: GGUFType) -> Path:
    """A model's weights as a GGUF file of a type; conversions are cached.

    Raises:
        UsageError: the weights are missing, or cannot be converted to GGUF.
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
    """Requantize a GGUF file, cached; returns the file itself if it already has the type.

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
        with atomic_draft(cached, OTHER_DISK) as draft:
            write_gguf(draft, file.fields, kind, shapes=shapes, read=file.array, alignment=file.alignment)
        write_sums(sums_of(cached), [cached])
    return cached


def tokenizer_source(model: Model) -> str | Path | None:
    """The source of a model's tokenizer: a hub id, folder or GGUF file; None if the server renders prompts.

    Raises:
        UsageError: the weights with the tokenizer are missing.
    """
    if model.weights is None or model.tokenizer is not None:
        return model.tokenizer
    return locate(model.weights)


def identity(model: Model, gguf: GGUFType | None = None) -> dict[str, Any]:
    """Everything that affects a model's output, as plain data, without its address and its name in a recipe.

    Weights: `{"weights": sha256}`, `serving`, and `tokenizer` if not their own. Servers: `{"model": name, "tokenizer":
    hub id or sha256}`, `mode` if not `completions`, and `omit`.

    Args:
        gguf: type at which weights are served, by default the model's own.

    Raises:
        UsageError: the weights are missing.
    """
    tokenizer = model.tokenizer
    if tokenizer is not None and Path(tokenizer).exists():  # by content, so that it may move
        tokenizer = path_sha256(Path(tokenizer))
    if model.weights is None:
        served: dict[str, Any] = {"model": model.model, "tokenizer": tokenizer}
        served |= {} if model.mode == "completions" else {"mode": model.mode}
        return served | ({"omit": sorted(model.omit)} if model.omit else {})
    found: dict[str, Any] = {"weights": path_sha256(locate(model.weights))}
    if tokenizer is not None:
        found["tokenizer"] = tokenizer
    return found | serving(model, gguf)


def serving(model: Model, gguf: GGUFType | None = None) -> dict[str, Any]:
    """The serving settings that affect output: `{"gguf": type}` for llama.cpp, else `{"engine": "vllm"}` and the
    `engine_args` that change more than placement, memory or speed.

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
