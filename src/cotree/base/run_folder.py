"""The run folder on disk: the files of each node, and its record (`node.json`) with fingerprint and results.

    runs/NAME/recipe.yaml  journal.db  annotations.db  summary.json  report.html  log.jsonl
    runs/NAME/trees/NODE/{node.json, trees.db, trees_index.db}
    runs/NAME/datasets/NODE/{node.json, train.parquet, README.md}
    runs/NAME/students/NODE/{node.json, model/, log.jsonl}
    runs/NAME/evaluations/NODE/MODEL/{node.json, journal.jsonl, results_*.json, samples_*.jsonl}
    runs/NAME/older/...     content of other fingerprints, by the same paths and then the fingerprint

A `node.json` is written atomically; replaced content of another fingerprint moves to `older/`, and back when that
fingerprint is wanted again. A node with a damaged `node.json` is not done, and resumes from the rest of its folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote, unquote

from pydantic import TypeAdapter, ValidationError

from cotree.base.atomic import content_sha256, data_sha256, remove, write_json
from cotree.base.errors import UsageError
from cotree.base.machine import machine_class, versions

Kind = Literal["trees", "datasets", "students", "evaluations"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_BEAT_SECONDS = 5.0
# Files whose SHA-256 is in the record; weights and stores have their own checksums.
_HASHED = (".parquet", ".json", ".jsonl", ".md")


@dataclass(frozen=True)
class NodeRecord:
    """`node.json`: the record of a node's content, or of one model's cell of an evaluation.

    fingerprint: of the content. base: of the settings without the questions; while it is equal, existing trees and
        samples are kept, by question.
    parts: the hashed values, {`a.b`: value}, to report which key changed.
    reads: the ids of the nodes that it reads ("trees/train").
    done: the content is complete. seconds: of work, summed over resumes.
    result: the node's numbers for tables (counts, tokens, ...), as its package defines them.
    resolved: resolved `auto` settings, so that a resume uses the same.
    files: {path relative to the folder: SHA-256, or "" if not recorded} of all files of complete content, including
        shards' stores that hold some of the trees ("../../shards/...") and Parquet files of trees (absolute paths).
    origin: the run that it was copied from (`--from`), or "".
    progress: (done, total) at the last write: trees, samples or steps.
    outdated: the run's recipe has other settings now, so tables skip this content.
    """

    fingerprint: str
    base: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    done: bool = False
    seconds: float = 0.0
    result: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""
    outdated: bool = False
    progress: tuple[int, int] = (0, 0)
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)


_RECORD = TypeAdapter(NodeRecord)


class NodeFolder:
    """The folder of a node (or cell), and that of its older contents."""

    def __init__(self, path: Path, older: Path | None = None) -> None:
        """older: by default a subfolder of `path`."""
        self.path, self.older = path, older or path / "older"

    def record(self) -> NodeRecord | None:
        """Read node.json; None if it is missing or damaged."""
        return _read_record(self.path)

    def check_owned(self, *contents: str, other: str) -> None:
        """Refuse a folder with foreign files, because they would move to `older/` with the node's content.

        Args:
            contents: files that mark a node's folder, besides its record and older contents.
            other: advice on using another folder, for errors.

        Raises:
            UsageError: the path is a file, or has foreign files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; {other}")
        known = any((self.path / name).exists() for name in ("node.json", "older", *contents))
        if not known and any(self.path.glob("[!.]*")):
            raise UsageError(f"{self.path} holds other files; {other}")

    def without_record(self) -> str:
        """Why content has no record: "node.json is damaged" or "is gone"; "" with a record or without content."""
        if self.record() is not None or not self._entries(self.path):
            return ""
        return f"node.json is {'damaged' if (self.path / 'node.json').exists() else 'gone'}"

    def explain_missing_record(self, record: NodeRecord, what: str) -> str:
        """A line about what `begin(record)` does with content without a record; "" if there is none."""
        lost, place = self.without_record(), self.older / record.base
        return lost and f"{self.path}: {lost}; {'moved to older/unknown' if place.is_dir() else f'taken for {what}'}"

    def complete(self, fingerprint: str) -> bool:
        """Whether finished content of this fingerprint exists with all files intact."""
        record = self.record()
        if record is None or not record.done or record.fingerprint != fingerprint:
            return False
        if (self.older / "moving.json").exists():  # a killed move left some files there
            return False
        return not self.faults(record)

    def faults(self, record: NodeRecord) -> list[str]:
        """Messages about missing or damaged files of a record: "train.parquet is damaged"."""
        states = {name: _state_of(self.path / name, sha256) for name, sha256 in record.files.items()}
        return [f"{name} is {state}" for name, state in states.items() if state]

    def older_record(self, base: str) -> NodeRecord | None:
        """The record of older content with this base fingerprint, or None."""
        return _read_record(self.older / base)

    def begin(self, record: NodeRecord) -> NodeRecord:
        """Prepare the folder for `record`'s fingerprint; returns the record to continue with.

        Content of another base fingerprint moves to `older/`, content of this one moves back. Seconds and resolved
        values of the same base are kept.
        """
        self._finish_move()
        now = self.record()
        if now is not None and now.base != record.base:
            self._move(now.base, away=True)
            now = None
        if now is None and (self.older / record.base).is_dir():
            if self.without_record():
                self._move("unknown", away=True)
            self._move(record.base, away=False)
            now = self.record()
        if now is not None:
            same = now.fingerprint == record.fingerprint
            resolved = {**record.resolved, **now.resolved}
            origin = now.origin if same else ""
            record = replace(record, seconds=now.seconds, resolved=resolved, created=now.created, origin=origin)
            if same and self.complete(record.fingerprint):
                record = replace(record, done=True, result=now.result, files=now.files)
            elif same and now.done:  # a folder without some of its files is taken for a whole one
                for top in {name.partition("/")[0] for name in now.files} - {"..", ""}:
                    if (self.path / top).is_dir():
                        remove(self.path / top)
        else:
            record = replace(record, created=datetime.now(UTC).strftime("%Y-%m-%d"))
        record = replace(record, versions=versions(), machine=machine_class())
        self.write(record)
        return record

    def _move(self, base: str, *, away: bool) -> None:
        """Move the content to `older/BASE`, or back, entry by entry, because `older` may be inside the folder."""
        write_json(self.older / "moving.json", {"base": base, "away": away})
        self._finish_move()

    def _finish_move(self) -> None:
        """Finish a move that was killed, so that contents of two fingerprints never mix."""
        moving = read_json(self.older / "moving.json")
        if moving is None:
            return
        kept = self.older / moving["base"]
        source, target = (self.path, kept) if moving["away"] else (kept, self.path)
        target.mkdir(parents=True, exist_ok=True)
        for entry in self._entries(source):
            remove(target / entry.name)
            entry.rename(target / entry.name)
        if not moving["away"]:
            remove(source)
        (self.older / "moving.json").unlink()

    def _entries(self, path: Path) -> list[Path]:
        """The files of a node in a folder: all but its older contents and the lock."""
        return [entry for entry in path.glob("*") if entry != self.older and entry.name != ".lock"]

    def mark_outdated(self, outdated: bool) -> None:
        """Record whether the content's settings differ from the run's recipe."""
        record = self.record()
        if record is not None and record.outdated != outdated:
            self.write(replace(record, outdated=outdated))

    def write(self, record: NodeRecord) -> None:
        """Write `node.json`."""
        content = json.loads(json.dumps(asdict(record)))  # as read back: JSON turns keys into strings
        write_json(self.path / "node.json", {**content, "sha256": data_sha256(content)})

    @contextmanager
    def working(self, record: NodeRecord) -> Iterator[Work]:
        """Work on the node: fill the yielded `Work`; the node is done when the block ends without an error.

        `Work.save_periodically` saves the elapsed seconds.
        """
        work = Work(self, record)
        try:
            yield work
            files = {name: "" if "/" in name else _hash_of(self.path / name) for name in work.files}
            work.record = replace(record, done=True, result=work.result, files=files)
        finally:
            work.save()


class Work:
    """The output of work on a node: result, files and elapsed time."""

    def __init__(self, folder: NodeFolder, record: NodeRecord) -> None:
        self.path = folder.path
        self.result: dict[str, Any] = {}
        self.files: list[str] = []
        self.resolved = dict(record.resolved)
        self.seconds_of_shards, self.progress = 0.0, record.progress
        self.record, self._folder = record, folder
        self._started = self._saved = time.monotonic()

    def add_files(self, *patterns: str) -> None:
        """Record the files that match these patterns as parts of the content."""
        found = (path for pattern in patterns for path in sorted(self.path.glob(pattern)))
        self.files += [str(path.relative_to(self.path)) for path in found]

    @property
    def seconds(self) -> float:
        """Seconds of work on this node, including earlier attempts and shards."""
        counted = float(self.record.resolved.get("seconds_of_shards", 0))  # in the record's seconds already
        new = max(0.0, self.seconds_of_shards - counted)
        return round(self.record.seconds + new + time.monotonic() - self._started, 1)

    def save(self) -> None:
        """Write the record with the seconds and resolved values so far."""
        self._saved = time.monotonic()
        if self.seconds_of_shards:
            self.resolved["seconds_of_shards"] = self.seconds_of_shards
        record = replace(self.record, seconds=self.seconds, resolved=self.resolved, progress=self.progress)
        self._folder.write(record)

    def save_periodically(self, done: int, wanted: int) -> None:
        """Save elapsed time and progress every few seconds, for resumes and for other processes."""
        self.progress = done, wanted
        if time.monotonic() - self._saved >= _BEAT_SECONDS:
            self.save()


class RunFolder:
    """`runs/NAME/`, for reading; `experiment.run` writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def node(self, node: str, model: str | None = None) -> NodeFolder:
        """The folder of a node by its id ("students/dpo"), or of one model's cell of an evaluation."""
        kind, _, name = node.partition("/")
        place = Path(kind) / folder_name(name)
        if model is not None:
            place /= folder_name(model)
        return NodeFolder(self.path / place, self.path / "older" / place)

    def nodes(self) -> dict[str, NodeRecord]:
        """{id: record} of all trees, datasets and students with content, ordered by kind."""
        found = (item for kind in KINDS for item in self._records(f"{kind}/*/node.json").items())
        return {f"{folder.parent.name}/{unquote(folder.name)}": record for folder, record in found}

    def cells(self) -> dict[tuple[str, str], NodeRecord]:
        """{(evaluation, model): record} of all evaluation cells."""
        found = self._records("evaluations/*/*/node.json")
        return {(unquote(folder.parent.name), unquote(folder.name)): record for folder, record in found.items()}

    def damaged(self) -> list[str]:
        """The nodes and cells with a damaged node.json ("evaluations/test/dpo"), which the other methods skip."""
        folders = (path.parent for kind in KINDS for path in sorted((self.path / kind).rglob("node.json")))
        return [unquote(str(path.relative_to(self.path))) for path in folders if _read_record(path) is None]

    def _records(self, pattern: str) -> dict[Path, NodeRecord]:
        """{folder: record} of all record files that match a pattern."""
        found = {path.parent: _read_record(path.parent) for path in sorted(self.path.glob(pattern))}
        return {folder: record for folder, record in found.items() if record is not None}


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The parts of two fingerprints (`NodeRecord.parts`) that differ, sorted."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != json.loads(json.dumps(now.get(key))))


def folder_name(name: str) -> str:
    """A node's name as a folder name, with slashes of swept values escaped."""
    return quote(name, safe="@=,+ []{}\"'")


def find_run(path: Path) -> RunFolder:
    """The run folder at `path`.

    Raises:
        UsageError: not a run, or one of an older version.
    """
    if (path / "manifest.json").is_file():
        fix = "run its recipe in the new form under another name (docs/migration.md)"
        raise UsageError(f"{path} is a run of an older cotree, whose files have another form; {fix}")
    if not (path / "recipe.yaml").is_file():
        raise UsageError(f"{path} is no run folder (it has no recipe.yaml); give one that `cotree run` made")
    return RunFolder(path)


def _read_record(path: Path) -> NodeRecord | None:
    with suppress(UsageError, ValidationError):
        content = read_json(path / "node.json")
        if content is None or content.pop("sha256", None) not in (None, data_sha256(content)):
            return None
        if isinstance(files := content.get("files"), list):  # older versions recorded no hashes
            content["files"] = dict.fromkeys(files, "")
        return _RECORD.validate_python(content)
    return None


def check_against_record(path: Path) -> None:
    """Check a file against the SHA-256 in its node's record.

    Raises:
        UsageError: the file was damaged or replaced.
    """
    record = _read_record(path.parent)
    if record is not None and _state_of(path, record.files.get(path.name, "")) == "damaged":
        raise UsageError(f"{path} is damaged (it is not as it was written); the command that wrote it makes it again")


def _state_of(path: Path, sha256: str) -> str:
    """Check a file or folder against a SHA-256: "gone", "damaged", or "" if intact."""
    if not path.exists():
        return "gone"
    empty = path.is_file() and not path.stat().st_size
    return "damaged" if empty or (sha256 and _hash_of(path) != sha256) else ""


def _hash_of(path: Path) -> str:
    """SHA-256 of a file; "" for folders and kinds of files that are not recorded."""
    if path.suffix not in _HASHED or not path.is_file():
        return ""
    status = path.stat()
    return _file_hash(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _file_hash(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, cached in this process by size and mtime."""
    return content_sha256(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file; None if the file is missing.

    Raises:
        UsageError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        fix = "the command that wrote it makes it again; if it does not, move the file away first"
        raise UsageError(f"{path} is damaged ({error}); {fix}") from None
    return content
