"""What lets a training run be interrupted: whose folder it is, and which of its checkpoints are whole.

Invariant: a checkpoint counts once its marker file is there, so a kill at any moment leaves the last whole one; and a
folder belongs to one set of inputs, so a resume never mixes two.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path

from cotree.config import Optimizer
from cotree.durable import whole
from cotree.errors import UsageError

_MARKER = "complete"


def claim(out: Path, rows: Path, student: Path, settings: Optimizer, seed: int, max_tokens: int) -> None:
    """Make `out` the folder of a run on these inputs, or find that it is already.

    Raises:
        UsageError: `out` holds a run on other inputs, which a resume would mix with these.
        CotreeError: `out` cannot be written.
    """
    inputs = {
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "max_tokens": max_tokens,
        "rows": _sha256(rows),
        "student": weights_hash(student),
    }
    path = out / "inputs.json"
    if path.exists():
        found = json.loads(path.read_text())
        changed = [name for name, value in inputs.items() if found.get(name) != value]
        if changed:
            raise UsageError(f"{out} was begun with other {', '.join(changed)}: delete it, or choose another folder")
        return
    with whole(path) as draft:
        draft.write_text(json.dumps(inputs))


def seal_checkpoint(checkpoint: Path, best: int | None) -> None:
    """Say that a checkpoint is whole, and delete the older ones, which it replaces, but not that of step `best`."""
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


def clear(folder: Path) -> None:
    """Delete the checkpoints of a finished run; what reporters wrote beside them stays."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with suppress(OSError):
        folder.rmdir()


def weights_hash(model: Path) -> str:
    """A hash of what a model folder computes: its weights and its config, an adapter's with the name of its base."""
    configs = [file for name in ("config.json", "adapter_config.json") if (file := model / name).exists()]
    files = [*sorted(model.glob("*.safetensors")), *configs]
    return hashlib.sha256(" ".join(_sha256(file) for file in files).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
