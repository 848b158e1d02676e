"""`cotree merge`: merge several tree stores, or several journals, into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cotree.base.errors import CotreeError, UsageError
from cotree.base.run_folder import NodeFolder, changed_keys
from cotree.search.journal import Journal
from cotree.search.merge import merge_journals, merge_stores
from cotree.search.store import TreeStore

_STORE = "trees.db"


def merge(sources: Sequence[str | Path], out: str | Path) -> str:
    """Merge several tree stores (or journals) into one; returns a report line.

    Idempotent, and resumes after a kill. Sources are not changed.

    Args:
        sources: files, or folders with a `trees.db`: those of shards are runs/NAME/shards/K-of-N/trees/NODE.
        out: the target store, created if missing; its content stays.

    Raises:
        UsageError: before anything is written: a source is missing or not a store, or its trees have other search
            settings than those of the other sources or `out` (the questions may differ).
        CotreeError: a tree or completion is damaged; what was copied before stays.
    """
    paths, target = [_file(Path(source)) for source in sources], _file(Path(out))
    if target in paths:
        raise UsageError(f"{target} is a source too; name another -o")
    journals = [path for path in paths if _is_journal(path)]
    if journals and len(journals) < len(paths):
        other = next(path for path in paths if path not in journals)
        raise UsageError(f"{journals[0]} is a journal and {other} a store of trees; merge each kind by itself")
    there = [target] if target.exists() else []
    if not journals:
        _check_settings([*there, *paths])
    elif there and not _is_journal(target):
        raise UsageError(f"{target} is a store of trees, and {journals[0]} a journal; name another -o")
    try:
        new = (merge_journals if journals else merge_stores)(paths, target)
    except UsageError as error:
        raise CotreeError(str(error)) from None
    what = "completions" if journals else "trees"
    return f"{target}: {new:,} {what} copied from {len(paths)} files"


def _file(path: Path) -> Path:
    """The store at a path, or inside the folder at that path."""
    return path / _STORE if path.is_dir() else path


def _is_journal(path: Path) -> bool:
    """Whether a file is a journal.

    Raises:
        UsageError: it is neither a journal nor a tree store.
    """
    if not path.is_file():
        raise UsageError(f"{path} is missing; name a store of trees, the folder of its `trees.db`, or a `journal.db`")
    try:
        with TreeStore(path, reading=True):
            return False
    except UsageError as error:
        try:
            with Journal(path, reading=True):
                return True
        except UsageError:
            raise error from None


def _check_settings(paths: Sequence[Path]) -> None:
    """Raise UsageError if the stores' trees have different search settings."""
    first: tuple[Path, str] | None = None
    for path in paths:
        with TreeStore(path, reading=True) as store:
            for (config,) in store.execute("SELECT DISTINCT config FROM trees"):
                first = first or (path, config)
                if config != first[1]:
                    records = [NodeFolder(each.parent).record() for each in (first[0], path)]
                    parts = [record.parts if record is not None else {} for record in records]
                    keys = [key for key in changed_keys(*parts) if key != "questions"] if all(parts) else []
                    changed = f" (changed: {', '.join(keys)})" if keys else ""
                    raise UsageError(
                        f"the trees of {path} were grown under other settings than those of {first[0]}{changed}; "
                        "merge those of the same settings"
                    )
