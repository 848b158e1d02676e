"""The checkpoints of an interrupted run: which are whole, and which are deleted.

Invariant: a checkpoint counts once its marker file is there, so a kill at any moment leaves the last whole one.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

_MARKER = "complete"


def complete_checkpoint(checkpoint: Path, best: int | None) -> None:
    """Mark a checkpoint as whole, and delete the older ones, which it replaces, but not that of step `best`."""
    (checkpoint / _MARKER).touch()
    for other in checkpoint.parent.glob("checkpoint-*"):
        if other not in (checkpoint, checkpoint.with_name(f"checkpoint-{best}")):
            shutil.rmtree(other)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; deletes the torn ones that a kill left."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / _MARKER).exists():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def remove_checkpoints(folder: Path) -> None:
    """Delete what a resume of a finished run would have needed; what reporters wrote beside it stays."""
    for left in (*folder.glob("checkpoint-*"), folder / "reference"):
        shutil.rmtree(left, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()
