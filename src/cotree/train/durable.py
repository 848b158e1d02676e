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
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft folder that becomes `folder` when the block ends, and vanishes when it fails.

    Raises:
        CotreeError: writing failed (disk full, no permission), in one line.
    """
    draft = folder.with_name(f"{folder.name}.draft")
    try:
        with writing(folder):
            shutil.rmtree(draft, ignore_errors=True)  # what a killed process left
            draft.mkdir(parents=True)
            yield draft
            draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


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


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft path whose file becomes `path` when the block ends, and vanishes when it fails; replaces what is there.

    Raises:
        CotreeError: as `whole_folder`.
    """
    draft = path.with_name(f"{path.name}.draft")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
            draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
