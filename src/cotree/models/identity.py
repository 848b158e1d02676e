"""What decides the text that a model writes: its weights, or its name at a server; never its address or recipe name.

Two entries of one identity are one model: fingerprints and the keys of journalled completions are made of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cotree.models.cache import file_sha256
from cotree.models.settings import GGUFType, Model
from cotree.models.weights import folder_sha256, locate

__all__ = ["file_sha256", "identity", "identity_text"]


def identity(model: Model, gguf: GGUFType | None = None) -> dict[str, Any]:
    """The content that a model's text depends on, as plain data.

    Weights: `{"weights": sha256, "gguf": type}`, with the sha256 of the `base` of a transformers folder, and a
    `tokenizer` that is not the weights' own. A served model: `{"model": name, "tokenizer": hub id or sha256}`, and its
    `mode` where it is not asked for completions of rendered prompts.

    Args:
        gguf: the type at which weights are served, by default the model's own.

    Raises:
        UsageError: the weights are not here.
    """
    if model.weights is not None:
        source = locate(model.weights)
        found: dict[str, Any] = {"weights": folder_sha256(source) if source.is_dir() else file_sha256(source)}
        if source.is_dir():
            found["base"] = file_sha256(locate(model.base))
        if model.tokenizer is not None:
            found["tokenizer"] = _tokenizer_identity(model.tokenizer)
        return {**found, "gguf": gguf or model.gguf}
    served = {"model": model.model, "tokenizer": _tokenizer_identity(model.tokenizer)}
    return served if model.mode == "completions" else {**served, "mode": model.mode}


def identity_text(model: Model) -> str:
    """`identity` as one line of JSON; equal models give equal lines."""
    return json.dumps(identity(model), sort_keys=True, separators=(",", ":"))


def _tokenizer_identity(source: str | None) -> str | None:
    """A hub id as it is; a file or folder by its content, so that it may be moved."""
    if source is None or not Path(source).exists():
        return source
    return folder_sha256(Path(source)) if Path(source).is_dir() else file_sha256(Path(source))
