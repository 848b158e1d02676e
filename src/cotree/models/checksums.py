"""The content of weights: hashes by which they are known, and whether they are as they were written.

Files that cotree made have their sums beside them; of others the hashes are remembered in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from cotree.base.atomic import content_sha256, damage, sums_of, write_json
from cotree.base.errors import CotreeError, UsageError

# What decides the text of a transformers folder; the rest is cards, logs and the like.
_TOKENIZER_FILES = ("token*", "*.model", "special_tokens*", "added_tokens*", "vocab*", "merges*", "chat_template*")
MODEL_FILES = ("model*.safetensors", "adapter_model*.safetensors", "config.json", *_TOKENIZER_FILES)
# What to do when the cache folder's disk is full.
OTHER_DISK = "set XDG_CACHE_HOME to another disk"
# A file that was written so lately may be written again within the same tick of the file system's clock.
_SETTLED_NS = 1_000_000_000


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
    return sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})


def folder_sha256(folder: Path) -> str:
    """One hash of a transformers folder's weights, config and tokenizer, whatever else is in it."""
    lines = [f"{path.name} {file_sha256(path)}" for path in _model_files(folder)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def path_sha256(path: Path) -> str:
    """The hash of weights: of a file, or of a transformers folder as `folder_sha256`."""
    return folder_sha256(path) if path.is_dir() else file_sha256(path)
