"""The rows that can still be read of a damaged SQLite file and of its `-wal`, and whether a `-wal` is damaged.

SQLite gives up at the first damaged page. Here each page is read for itself, as https://sqlite.org/fileformat2.html
describes them, so a row is found although the pages that lead to it are lost.
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
# Where the places of a page's rows begin, by its kind: an interior page of an index (or of a table without rowid), a
# leaf of such, a leaf of a table.
_PLACES = {2: 12, 10: 8, 13: 8}
_SIZES = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)  # of a value that is no text, by its type
_PAGE = 4096  # bytes, as SQLite makes new files
_LONGEST = 1 << 27  # bytes of a row; more is damage


def readable_rows(path: Path) -> Iterator[list[Value]]:
    """All rows, of tables and indices alike, the newest version of one first: it may come several times."""
    frames = _frames(_content(path, "-wal"))
    logged = [(int.from_bytes(frame[:4]), frame[24:]) for frame in frames if frame[8:16] == frames[0][8:16]]
    newest = dict(logged)
    with path.open("rb") as file:

        def page_in_file(number: int) -> bytes:
            with suppress(OSError):  # of a damaged disk, or far behind the end
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
    """Whether a `-wal` was cut or damaged after a kill, so that SQLite would leave out commits of it without a word."""
    before = None
    while True:  # what a process changes at this moment may look like damage, but not twice
        index, log = _content(path, "-shm"), _content(path, "-wal")
        if not _lacks_frames(log, index):
            return False
        if before == (index, log):
            return True
        before = index, log
        time.sleep(0.1)


def _lacks_frames(log: bytes, index: bytes) -> bool:
    """Whether a log has fewer whole frames than the index beside it counts, and these are not all in the file yet."""
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
    """The frames of a log: a page's number, 4 bytes that end a commit, 8 that all since its last reset share, the sums
    of all so far, and the page."""
    size = 24 + _PAGE
    return [log[at : at + size] for at in range(32, len(log) - size + 1, size)]


def _content(path: Path, end: str) -> bytes:
    with suppress(OSError):
        return Path(f"{path}{end}").read_bytes()
    return b""


def _row(page: bytes, kind: int, at: int, page_at: Callable[[int], bytes]) -> list[Value]:
    """The row at a place of a page; what does not fit into the page is in a chain of others."""
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
    """The values of a record: their types, then their bytes."""
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
    """A number of 1 to 9 bytes, and where it ends."""
    value = 0
    for end in range(at, at + 8):
        value = value << 7 | data[end] & 0x7F
        if data[end] < 0x80:
            return value, end + 1
    return value << 8 | data[at + 8], at + 9
