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

from cotree.base.atomic import whole
from cotree.base.errors import UsageError
from cotree.experiment.recipe import Optimizer

_MARKER = "complete"


def claim(out: Path, rows: Path, student: Path, settings: Optimizer, seed: int, max_tokens: int, template: str) -> None:
    """Make `out` the folder of a run on these inputs (of the chat template its hash), or find that it is already.

    Raises:
        UsageError: `out` holds a run on other inputs, which a resume would mix with these.
        CotreeError: `out` cannot be written.
    """
    inputs = {
        **{f"settings.{name}": value for name, value in settings.model_dump(mode="json").items()},
        "seed": seed,
        "max_tokens": max_tokens,
        "rows": _sha256(rows),
        "student": weights_hash(student),
        "template": template,
    }
    path = out / "inputs.json"
    if path.exists():
        found = json.loads(path.read_text())
        changed = [name for name, value in inputs.items() if found.get(name) != value]
        if changed:
            names = ", ".join(changed[:4]) + ", ..." * (len(changed) > 4)
            raise UsageError(f"{out} was begun with other {names}: delete it, or choose another folder")
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
    """A hash of what a model folder computes: its weights and its config, and those of an adapter's base.

    A base that is no folder is known by its name.
    """
    names = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
    parts = [_sha256(file) for name in names for file in sorted(model.glob(name))]
    if (adapter := model / "adapter_config.json").exists():
        base = Path(json.loads(adapter.read_text())["base_model_name_or_path"])
        parts += [weights_hash(base)] if base.is_dir() else []
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
