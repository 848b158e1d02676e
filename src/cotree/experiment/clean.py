"""`cotree clean`: delete content of a run that its recipe no longer uses, and report the freed space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cotree.base.atomic import remove
from cotree.base.lock import locked
from cotree.base.run_folder import KINDS, RunFolder
from cotree.base.shards import shards_of
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.hub import offline
from cotree.experiment.recipe import load_recipe
from cotree.experiment.state import states_of


@dataclass(frozen=True)
class Removed:
    """Unused content of a run; `path` is relative to the run folder."""

    path: Path
    bytes: int


def unused_content(run: RunFolder) -> list[Removed]:
    """Find unused content: of settings other than the recipe's, of removed nodes and cells, and drafts of killed runs.

    Keeps all content of a node whose fingerprint cannot be computed because inputs are missing.

    Raises:
        UsageError: the folder is not a run.
    """
    recipe = load_recipe(run.path)
    with offline():
        states = states_of(run, Fingerprints(recipe, run=run.path), recipe.nodes)
    wanted = {run.node(s.node.id, s.model).path.relative_to(run.path): s.fingerprint for s in states}
    found: list[Path] = []
    for part in (run, *shards_of(run)):
        older = part.path / "older"
        found += [part.path / place for place in _places(part.path) if place not in wanted]
        found += [older / place for place in _places(older) if place not in wanted]
        for place, fingerprint in wanted.items():
            if fingerprint is not None and not (older / place / "moving.json").exists():
                found += [kept for kept in (older / place).glob("*") if kept.name != fingerprint.base]
    found += [path for path in run.path.rglob(".*.draft") if not {*path.parents} & {*found}]
    found += run.path.glob(".taken")
    return [Removed(path.relative_to(run.path), _bytes(path)) for path in sorted(found)]


def clean(run: RunFolder) -> list[Removed]:
    """Delete unused content; the journal of completions stays.

    Raises:
        UsageError: the folder is not a run, or another process works in it.
    """
    with locked(run.path):
        found = unused_content(run)
        for path in (run.path / each.path for each in found):
            remove(path)
            with suppress(OSError):  # not empty
                while (path := path.parent) != run.path:
                    path.rmdir()
    return found


def removed_lines(found: Sequence[Removed], dry_run: bool) -> list[str]:
    """A line for each item that was (or would be) deleted, and the freed space."""
    lines = [f"{each.path}: {each.bytes / 1e6:.1f} MB" for each in found]
    total = sum(each.bytes for each in found) / 1e6
    return [*lines, f"{len(found)} removed, {total:.1f} MB freed" if not dry_run else f"{total:.1f} MB could be freed"]


def _places(root: Path) -> Iterator[Path]:
    """The folders of nodes and evaluation cells below a folder, relative to it."""
    for kind in KINDS:
        for path in (root / kind).glob("*/*" if kind == "evaluations" else "*"):
            if path.is_dir() and path.name != ".references":
                yield path.relative_to(root)


def _bytes(path: Path) -> int:
    """The bytes that deleting a path would free; hard links to files of another run (--from) count 0."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file() and not each.is_symlink()]
    return sum(each.stat().st_size for each in files if each.stat().st_nlink == 1)
