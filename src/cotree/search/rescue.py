"""Recover rows from a damaged SQLite file and its `-wal`, and detect a damaged `-wal`.

SQLite gives up at the first damaged page. This module parses every page by itself (format:
https://sqlite.org/fileformat2.html), so rows are found even if the pages that point to them are lost.
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

Value = None | int | float | str | bytes
# Offset of a page's cell pointers by page type: interior index page (or WITHOUT ROWID table), index leaf, table leaf.
_PLACES = {2: 12, 10: 8, 13: 8}
_SIZES = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)  # bytes of a value by serial type, below 12 (blob or text)
_PAGE = 4096  # bytes, SQLite's default page size
_LONGEST = 1 << 27  # bytes; a longer row is taken for damage


def readable_rows(path: Path) -> Iterator[list[Value]]:
    """Yield all readable rows of tables and indices; a row may come several times, its newest version first."""
    frames = _frames(_content(path, "-wal"))
    logged = [(int.from_bytes(frame[:4]), frame[24:]) for frame in frames if frame[8:16] == frames[0][8:16]]
    newest = dict(logged)
    with path.open("rb") as file:

        def page_in_file(number: int) -> bytes:
            with suppress(OSError):  # damaged disk, or offset far beyond the end
                file.seek((number - 1) * _PAGE)
                return file.read(_PAGE)
            return b""

        in_file = ((number, page_in_file(number)) for number in range(1, path.stat().st_size // _PAGE + 2))
        for number, page in chain(reversed(logged), in_file):
            head = 100 if number == 1 else 0
            kind = page[head] if len(page) > head else 0
            count = int.from_bytes(page[head + 3 : head + 5]) if kind in _PLACES else 0
            for place in range(head + _PLACES.get(kind, 0), len(page), 2)[:count]:
                with suppress(IndexError, ValueError, struct.error):  # of a damaged row
                    at = int.from_bytes(page[place : place + 2])
                    yield _row(page, kind, at, lambda number: newest.get(number) or page_in_file(number))


def commits_are_lost(path: Path) -> bool:
    """Whether a `-wal` is truncated or damaged, so that SQLite would silently ignore some of its commits."""
    before = None
    while True:  # a concurrent write may look like damage once, but not twice
        index, log = _content(path, "-shm"), _content(path, "-wal")
        if not _lacks_frames(log, index):
            return False
        if before == (index, log):
            return True
        before = index, log
        time.sleep(0.1)


def _lacks_frames(log: bytes, index: bytes) -> bool:
    """Whether a WAL has fewer valid frames than its `-shm` index counts, and not all are checkpointed."""
    counted, moved = (int.from_bytes(index[at : at + 4], sys.byteorder) for at in (16, 96))
    if moved >= counted:
        return False
    words = struct.Struct(">II" if log[3:4] == b"\x83" else "<II")
    first = second = 0
    frames = [(log[:24], log[24:32]), *((frame[:8] + frame[24:], frame[16:24]) for frame in _frames(log))]
    for data, sums in frames[: counted + 1]:
        for x, y in words.iter_unpack(data):
            first = first + x + second & 0xFFFFFFFF
            second = second + y + first & 0xFFFFFFFF
        if struct.pack(">II", first, second) != sums:
            return True
    return len(frames) <= counted


def _frames(log: bytes) -> list[bytes]:
    """Split a WAL into frames: page number, 4 bytes of commit size, 8 of salt, 8 of cumulative checksum, the page."""
    size = 24 + _PAGE
    return [log[at : at + size] for at in range(32, len(log) - size + 1, size)]


def _content(path: Path, end: str) -> bytes:
    with suppress(OSError):
        return Path(f"{path}{end}").read_bytes()
    return b""


def _row(page: bytes, kind: int, at: int, page_at: Callable[[int], bytes]) -> list[Value]:
    """Parse the row at an offset of a page, following its overflow pages."""
    length, at = _varint(page, at + 4 if kind == 2 else at)
    if kind == 13:
        _, at = _varint(page, at)  # the rowid
    usable = len(page) - 4
    least = (usable - 8) * 32 // 255 - 23
    most = usable - 31 if kind == 13 else (usable - 8) * 64 // 255 - 23
    here = length
    if length > most:
        here = least + (length - least) % usable
        here = here if here <= most else least
    row = page[at : at + here]
    following = page[at + here : at + here + 4] if length > most else b""
    if length > _LONGEST:
        raise ValueError("no row is that long")
    parts, left = [row], length - len(row)
    while left > 0:
        beyond = page_at(int.from_bytes(following))
        following, part = beyond[:4], beyond[4 : 4 + left]
        if not part:
            raise ValueError("its chain of pages breaks off")
        parts.append(part)
        left -= len(part)
    return _values(b"".join(parts))


def _values(record: bytes) -> list[Value]:
    """Decode a record: a header of serial types, then the values."""
    end, at = _varint(record, 0)
    values: list[Value] = []
    place = end
    while at < end:
        kind, at = _varint(record, at)
        raw = record[place : (place := place + (_SIZES[kind] if kind < 12 else (kind - 12) // 2))]
        if place > len(record):
            raise ValueError("a value breaks off")
        if kind >= 12:
            values.append(raw.decode() if kind % 2 else raw)
        elif kind == 7:
            values.append(struct.unpack(">d", raw)[0])
        else:
            values.append(None if not kind else kind - 8 if kind > 7 else int.from_bytes(raw, signed=True))
    return values


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode a varint of 1 to 9 bytes; returns its value and the offset after it."""
    value = 0
    for end in range(at, at + 8):
        value = value << 7 | data[end] & 0x7F
        if data[end] < 0x80:
            return value, end + 1
    return value << 8 | data[at + 8], at + 9
