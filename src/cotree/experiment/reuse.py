"""A new run that begins with the finished stages of another: other training on the same trees, another evaluation.

Invariant: a stage is taken over only if everything that it and the stages before it read of the recipe is equal, and
the new folder appears whole or not at all. Files are linked where the file system can; the tree store is copied.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from cotree.base.atomic import whole, write_text
from cotree.base.errors import UsageError
from cotree.experiment.recipe import Recipe, recipe_yaml
from cotree.experiment.run_folder import RunFolder, changed_keys, locked

# What each stage reads of a recipe beside what the stages before it read, and what it leaves.
_STAGES = {
    "search": (("seed", "models", "roles", "tasks.train", "search"), ("trees.db",)),
    "build": (("build", "tasks", "train.student", "eval.control"), ("data", "samples.json")),
    "train_sft": (("train.sft",), tuple(f"checkpoints/{name}" for name in ("base", "sft", "control", "reference"))),
    "train_dpo": (("train.dpo",), ("checkpoints/dpo",)),
}


def reusable(source: Path, recipe: Recipe) -> list[str]:
    """The stages of the run at `source` that a run of `recipe` would do in the same way; at least one.

    Raises:
        UsageError: `source` is no run, or has no such stage.
    """
    if not (source / "recipe.yaml").is_file():
        raise UsageError(f"--from {source}: no run folder there (it has no recipe.yaml)")
    run, changed = RunFolder(source, recipe), changed_keys(source, recipe)
    found: list[str] = []
    for stage, (read, _) in _STAGES.items():
        differ = [key for key in changed if any(f"{key}.".startswith(f"{part}.") for part in read)]
        if differ or not run.done(stage):
            break
        found.append(stage)
    if not found:
        own = f"; its own recipe is {source / 'recipe.yaml'}"
        why = f"different: {', '.join(differ)}{own}" if differ else "its search has not finished"
        raise UsageError(f"--from {source}: no stage of it can be taken over ({why})")
    return found


def start_from(source: Path, path: Path, recipe: Recipe, stages: list[str]) -> None:
    """Make the run folder `path`, in which these stages of the run at `source` are done.

    Where the evaluations are the same, so is what models of equal weights answered in it: llama.cpp would not say quite
    the same again, and a comparison of two runs should not move for that.

    Raises:
        UsageError: another process works in `source`.
        CotreeError: it cannot be written.
    """
    with whole(path) as draft, locked(source, fcntl.LOCK_SH):
        for name in (name for stage in stages for name in _STAGES[stage][1]):
            _take(source / name, draft / name)
        run = RunFolder(draft, recipe)
        answered = _evaluated(source, recipe, stages)
        for name in answered:
            _take(source / "eval" / f"samples_{name}.jsonl", draft / "eval" / f"samples_{name}.jsonl")
        entries = RunFolder(source, recipe).manifest["stages"]
        run.manifest["stages"] = {stage: entries[stage] | {"from": source.name} for stage in stages}
        run.manifest["answered"] = answered
        run.save()
        write_text(draft / "recipe.yaml", recipe_yaml(recipe))
        if path.is_dir():  # empty but for a lock, else it were another run
            (path / ".lock").unlink(missing_ok=True)


def _evaluated(source: Path, recipe: Recipe, stages: list[str]) -> list[str]:
    """The models that a run of `recipe` would ask what they were asked in the run at `source`, to its end."""
    changed = changed_keys(source, recipe)
    if any(f"{key}.".startswith(("eval.", "tasks.eval.", "tasks.dev.", "train.student.")) for key in changed):
        return []
    if not RunFolder(source, recipe).done("eval"):
        return []
    trained = {"train_sft": ["sft", "control"], "train_dpo": ["dpo"]}
    return ["base", "base+examples", *(name for stage in stages for name in trained.get(stage, ()))]


def _take(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    elif source.suffix == ".db":  # its last changes may still be in a file beside it
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
            old.backup(new)
    elif source.exists():
        _link(str(source), str(target))


def _link(source: str, target: str) -> None:
    if not source.endswith(".jsonl"):  # those are appended to
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)
