"""The cache folder: files that are made once and found again (converted weights), and the hashes of files.

What is made here is there whole or not at all, so that a kill leaves nothing that the next run would take for good.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from cotree.base.atomic import write_json
from cotree.base.errors import CotreeError

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
    known = _known_hashes().get(name)
    if known is not None and known[:2] == version:
        return str(known[2])
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
        kept = {other: entry for other, entry in _known_hashes().items() if os.path.exists(other)}
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
