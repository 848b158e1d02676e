"""Files that are written whole or not at all: what a place that takes none makes of a write."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cotree.base.atomic import atomic_draft
from cotree.base.errors import CotreeError


def test_a_read_only_file_system_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(CotreeError, match=r"cannot write .*: Read-only file system; "), atomic_draft(tmp_path / "x"):
        refuse()
