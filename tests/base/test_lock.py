"""One process at a time has a folder; who only reads shares it and leaves nothing there."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from cotree.base.errors import UsageError
from cotree.base.lock import locked


def refused(path: Path, mode: int) -> str:
    with pytest.raises(UsageError) as raised, locked(path, mode, other="take another"):
        pass
    return str(raised.value)


def test_a_folder_is_had_by_one_or_shared_by_many(tmp_path: Path) -> None:
    path = tmp_path / "new"
    message = f"another cotree works in {path}; wait for it, or take another"
    with locked(path):
        assert refused(path, fcntl.LOCK_EX) == refused(path, fcntl.LOCK_SH) == message
    with locked(path, fcntl.LOCK_SH), locked(path, fcntl.LOCK_SH):
        assert refused(path, fcntl.LOCK_EX) == message
    with locked(path):
        assert [entry.name for entry in path.iterdir()] == [".lock"]


def test_who_shares_makes_nothing(tmp_path: Path) -> None:
    with locked(tmp_path, fcntl.LOCK_SH), locked(tmp_path / "none", fcntl.LOCK_SH):
        assert not [*tmp_path.iterdir()]
