"""What an entry of a recipe's `models` comes to: its engine, its GGUF file, its tokenizer, and what identifies it.

Teacher and student are served by one engine, in llama.cpp at one GGUF type, so that a comparison is fair. Two models of
one identity are one model: fingerprints and the keys of journalled completions are made of it.
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
        raise UsageError(f"nothing at `{word}`; {did_you_mean(word)}give a server's URL, {FORMS}")
    return parse_section(Model, {"weights": word, **shared}, "")


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
        with atomic_draft(cached, OTHER_DISK) as draft:
            write_gguf(draft, file.fields, kind, shapes=shapes, read=file.array, alignment=file.alignment)
        write_sums(sums_of(cached), [cached])
    return cached


def tokenizer_source(model: Model) -> str | Path | None:
    """Where a model's tokenizer is: a hub id, a folder or a GGUF file; None where the server renders prompts.

    Raises:
        UsageError: the weights that carry it are not here.
    """
    if model.weights is None or model.tokenizer is not None:
        return model.tokenizer
    return locate(model.weights)


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
