"""Writing that a kill cannot tear, and that says in one line why it failed.

Invariant: what stands at a path was written whole: it was made beside its place and renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cotree.errors import CotreeError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft path: the file or folder made there becomes `path` when the block ends, and vanishes when it fails.

    A file that is there is replaced.

    Raises:
        CotreeError: writing failed (disk full, no permission), in one line.
    """
    draft = path.with_name(f"{path.name}.draft")
    try:
        with writing(path):
            shutil.rmtree(draft, ignore_errors=True)  # what a killed process left; a file would be overwritten
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
            draft.rename(path)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write (for which safetensors has a name of its own) into one line.

    Raises:
        CotreeError: in place of OSError or SafetensorError.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CotreeError(
            f"could not write {path}: {reason}; free some space and run the same command again"
        ) from error
