"""SHA-256 hashes of model weights, to identify them and detect damage.

Files that cotree wrote have checksum files beside them; hashes of other files are kept in the cache folder.
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

# Files of a transformers folder that affect its output; the rest is cards, logs and the like.
_TOKENIZER_FILES = ("token*", "*.model", "special_tokens*", "added_tokens*", "vocab*", "merges*", "chat_template*")
MODEL_FILES = ("model*.safetensors", "adapter_model*.safetensors", "config.json", *_TOKENIZER_FILES)
# Advice for a full disk.
OTHER_DISK = "set XDG_CACHE_HOME to another disk"
# Seconds; a newer file could be rewritten without a change of its mtime.
_SETTLED_NS = 1_000_000_000


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/cotree`, by default `~/.cache/cotree`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotree"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hex; cached until its size or mtime changes.

    Raises:
        OSError: the file is missing or unreadable.
    """
    name, status = str(path.resolve()), path.stat()
    version = [status.st_size, status.st_mtime_ns]
    known = _known_hashes()
    if known.get(name, [])[:2] == version:
        return str(known[name][2])
    found = content_sha256(path)
    if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
        kept = {other: entry for other, entry in known.items() if os.path.exists(other)}
        with suppress(CotreeError):  # without a cache the file is hashed again next time
            write_json(cache_folder() / "sha256.json", {**kept, name: [*version, found]})
    return found


def _known_hashes() -> dict[str, list[object]]:
    """The cache {file: [size, mtime in ns, sha256]}; empty if missing or damaged."""
    try:
        found = json.loads((cache_folder() / "sha256.json").read_text(encoding="utf-8"))
        return {str(name): [*entry] for name, entry in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def is_whole(path: Path) -> bool:
    """Whether a file or folder exists and matches its checksum file, if it has one."""
    return path.exists() and (not sums_of(path).is_file() or damage(sums_of(path)) is None)


def check_weights(path: Path) -> None:
    """Check weights, a file or a transformers folder, against their checksum file, or the cached hash (`file_sha256`).

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
    """One hash over a transformers folder's weights, config and tokenizer; ignores other files."""
    lines = [f"{path.name} {file_sha256(path)}" for path in _model_files(folder)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def path_sha256(path: Path) -> str:
    """The hash of a weights file, or of a transformers folder (`folder_sha256`)."""
    return folder_sha256(path) if path.is_dir() else file_sha256(path)
