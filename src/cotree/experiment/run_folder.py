"""A run folder: everything of one run in one place, and the memory that makes re-running resume.

Invariants: the folder belongs to one recipe (another one is an error that says how to resume or rename); one process
works in it at a time; `manifest.json` and every other JSON here appear whole or not at all; seconds add up over
interruptions.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cotree.base.atomic import write_json, write_text, writing
from cotree.base.errors import UsageError
from cotree.experiment.recipe import Recipe, load_recipe, recipe_hash, recipe_yaml

_BEAT_SECONDS = 5.0
_PACKAGES = ("cotree", "torch", "transformers", "xllamacpp", "aiohttp", "trl")


class RunFolder:
    """`runs/NAME/` of one recipe."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe
        # Called while a stage works: keeps its seconds, so that a kill loses a few of them at most.
        self.beat: Callable[[], None] = lambda: None
        self.manifest: dict[str, Any] = read_json(path / "manifest.json") or {
            "recipe_hash": recipe_hash(recipe),
            "created": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": machine(),
            "versions": _versions(),
            "git": _git(),
            "seed": recipe.seed,
            "stages": {},
        }

    @property
    def trees(self) -> Path:
        """The tree store."""
        return self.path / "trees.db"

    @property
    def data(self) -> Path:
        """The datasets."""
        return self.path / "data"

    def checkpoint(self, name: str) -> Path:
        """The folder of `base`, `sft`, `control` or `dpo`."""
        return self.path / "checkpoints" / name

    def done(self, stage: str) -> bool:
        """Whether a stage has finished."""
        return bool(self.manifest["stages"].get(stage, {}).get("done"))

    def result(self, stage: str) -> dict[str, Any]:
        """What a finished stage left for the summary."""
        result: dict[str, Any] = self.manifest["stages"].get(stage, {}).get("result", {})
        return result

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Work on a stage: fill the yielded result; the stage is done when the block ends without an error."""
        entry = self.manifest["stages"].setdefault(name, {"seconds": 0.0, "done": False, "result": {}})
        before, started, saved = entry["seconds"], time.monotonic(), time.monotonic()
        result: dict[str, Any] = {}

        def beat() -> None:
            nonlocal saved
            if time.monotonic() - saved >= _BEAT_SECONDS:
                saved = time.monotonic()
                entry["seconds"] = round(before + saved - started, 1)
                self.save()

        self.beat = beat
        try:
            yield result
            entry["result"], entry["done"] = result, True
        finally:
            self.beat = lambda: None
            entry["seconds"] = round(before + time.monotonic() - started, 1)
            self.save()

    def save(self) -> None:
        """Write the manifest."""
        write_json(self.path / "manifest.json", self.manifest)


def find_run(runs_dir: Path, recipe: Recipe) -> RunFolder:
    """The run as it stands, or as it would begin; nothing is written.

    Raises:
        UsageError: the folder holds another recipe, or something else.
    """
    if runs_dir.exists() and not runs_dir.is_dir():
        raise UsageError(f"--runs-dir {runs_dir} is a file; name a folder, or one to be made")
    path = runs_dir / recipe.name
    if (path / "recipe.yaml").is_file():
        changed = changed_keys(path, recipe)
        if changed:
            raise UsageError(
                f"{path} was made with another recipe (different: {', '.join(changed)}); to resume it run "
                f"`cotree run {path / 'recipe.yaml'}`, to start a new run add name=NEW_NAME"
            )
    elif path.exists() and any(entry.name != ".lock" for entry in path.iterdir()):
        raise UsageError(f"{path} exists and is no run folder; choose another name= or move it away")
    return RunFolder(path, recipe)


@contextmanager
def open_run(runs_dir: Path, recipe: Recipe) -> Iterator[RunFolder]:
    """Create the run's folder, or go on in it.

    Raises:
        UsageError: the folder holds another recipe, something else, or another process works in it.
        CotreeError: it cannot be written.
    """
    path = find_run(runs_dir, recipe).path
    with locked(path):
        write_text(path / "recipe.yaml", recipe_yaml(recipe))
        run = RunFolder(path, recipe)
        run.save()
        yield run


@contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Have a run folder for oneself, or share it with others that change nothing (`fcntl.LOCK_SH`).

    Raises:
        UsageError: another process works in it.
        CotreeError: it cannot be made.
    """
    with writing(path, "set --runs-dir"):
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a")
    with lock:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another cotree works in {path}; wait for it, or choose another name=") from None
        yield


def changed_keys(path: Path, recipe: Recipe) -> list[str]:
    """What of a recipe is different (`a.b`) in that of the run folder `path`, in order.

    Raises:
        UsageError: the folder's recipe cannot be read.
    """
    try:
        theirs = load_recipe(path / "recipe.yaml").model_dump()
    except UsageError as error:
        raise UsageError(f"{error}; move {path} away, or choose another name=") from None
    return sorted(_differences(theirs, recipe.model_dump()))


def _differences(a: Any, b: Any, at: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: set[str] = set()
        for key in a.keys() | b.keys():
            found |= _differences(a.get(key), b.get(key), f"{at}.{key}" if at else str(key))
        return found
    return set() if a == b else {at}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when there is no such file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}); move {path.parent} away to start anew") from None
    return content


def machine() -> dict[str, Any]:
    """The class of this machine, for tables: nothing that names it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    return {"cpu": _cpu(), "cores": os.cpu_count() or 1, "memory_gb": round(memory, 1)}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git() -> str | None:
    """The commit of cotree's own checkout, where it is one."""
    here = Path(__file__).resolve().parent
    if not (here.parents[1] / "pyproject.toml").is_file():
        return None  # installed: the repository around it, if any, is the user's
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
