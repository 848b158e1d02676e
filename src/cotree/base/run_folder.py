"""A run folder as it stands on disk: which nodes have content, of which fingerprint, and where it is.

    runs/NAME/recipe.yaml  journal.db  summary.json  report.html  log.jsonl
    runs/NAME/trees/NODE/{node.json, trees.db}            runs/NAME/datasets/NODE/{node.json, train.parquet, README.md}
    runs/NAME/students/NODE/{node.json, model/, log.jsonl}
    runs/NAME/evaluations/NODE/MODEL/{node.json, journal.jsonl, results_*.json, samples_*.jsonl}
    runs/NAME/older/...     content of other fingerprints, by the same paths and then the fingerprint

A `node.json` is written whole or not at all; content that another fingerprint replaces is moved to `older/`, and moved
back when that fingerprint is wanted again.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote, unquote

from cotree.base.atomic import remove, write_json
from cotree.base.errors import UsageError

Kind = Literal["trees", "datasets", "students", "evaluations"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_BEAT_SECONDS = 5.0
_PACKAGES = ("cotree", "torch", "transformers", "xllamacpp", "aiohttp", "trl")


@dataclass(frozen=True)
class NodeRecord:
    """`node.json`: what is in a node's folder (of an evaluation: in the folder of one model, a cell).

    fingerprint: of the whole content. base: of the content without the set of questions; while it is the same, what was
        grown or answered before is kept, by question.
    parts: what the fingerprint was made of, `a.b` -> value, to say which key changed.
    reads: the nodes that it reads, by their ids ("trees/train").
    done: the content is complete. seconds: of work, over all interruptions.
    result: the numbers that the node left for tables (counts, tokens, ...), as its package defines them.
    resolved: what `auto` settings became, so that an unfinished node goes on with them.
    files: what must be there for the content to be whole, relative to the folder.
    origin: the run that it was taken from (`--from`), "" if it was made here.
    outdated: the run's recipe has other settings now, so the numbers of this content are in no table.
    """

    fingerprint: str
    base: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    done: bool = False
    seconds: float = 0.0
    result: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    origin: str = ""
    outdated: bool = False
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)


class NodeFolder:
    """The folder of one node (or cell), with the place where its older contents are kept."""

    def __init__(self, path: Path, older: Path | None = None) -> None:
        """`older` is by default a folder in `path` itself."""
        self.path, self.older = path, older or path / "older"

    def record(self) -> NodeRecord | None:
        """What is there now; None where nothing is.

        Raises:
            UsageError: its node.json cannot be read.
        """
        return _read_record(self.path)

    def complete(self, fingerprint: str) -> bool:
        """Whether the content of this fingerprint is there, finished and with all its files."""
        record = self.record()
        if record is None or not record.done or record.fingerprint != fingerprint:
            return False
        if (self.older / "moving.json").exists():  # a kill left a part of it there
            return False
        return all((self.path / name).exists() for name in record.files)

    def older_record(self, base: str) -> NodeRecord | None:
        """The record of older content of this base fingerprint, None where none is kept."""
        return _read_record(self.older / base)

    def begin(self, record: NodeRecord) -> NodeRecord:
        """Make the folder that of `record`'s fingerprint; returns the record to go on with.

        Content of another base fingerprint moves to `older/`; content of this one moves back. Seconds and resolved
        values of the same base go on.
        """
        self._finish_move()
        now = self.record()
        if now is not None and now.base != record.base:
            self._move(now.base, away=True)
            now = None
        if now is None and (self.older / record.base).is_dir():
            self._move(record.base, away=False)
            now = self.record()
        if now is not None:
            same = now.fingerprint == record.fingerprint
            resolved = {**record.resolved, **now.resolved}
            origin = now.origin if same else ""
            record = replace(record, seconds=now.seconds, resolved=resolved, created=now.created, origin=origin)
            if same and self.complete(record.fingerprint):
                record = replace(record, done=True, result=now.result, files=now.files)
            elif same and now.done:  # some of its files are gone, and the others are no whole without them
                for name in now.files:
                    remove(self.path / name)
        else:
            record = replace(record, created=datetime.now(UTC).strftime("%Y-%m-%d"))
        record = replace(record, versions=_versions(), machine=_machine())
        self.write(record)
        return record

    def _move(self, base: str, *, away: bool) -> None:
        """Move the content to `older/BASE`, or back, one entry after the other: `older` may be in the folder itself."""
        write_json(self.older / "moving.json", {"base": base, "away": away})
        self._finish_move()

    def _finish_move(self) -> None:
        """Go on with a move that a kill interrupted, so that the contents of two fingerprints never mix."""
        moving = read_json(self.older / "moving.json")
        if moving is None:
            return
        kept = self.older / moving["base"]
        source, target = (self.path, kept) if moving["away"] else (kept, self.path)
        target.mkdir(parents=True, exist_ok=True)
        for entry in list(source.glob("*")):
            if entry != self.older:
                remove(target / entry.name)
                entry.rename(target / entry.name)
        if not moving["away"]:
            remove(source)
        (self.older / "moving.json").unlink()

    def mark_outdated(self, outdated: bool) -> None:
        """Note whether the run's recipe still has the settings of what is there."""
        record = self.record()
        if record is not None and record.outdated != outdated:
            self.write(replace(record, outdated=outdated))

    def write(self, record: NodeRecord) -> None:
        """Write `node.json`."""
        write_json(self.path / "node.json", asdict(record))

    @contextmanager
    def working(self, record: NodeRecord) -> Iterator[Work]:
        """Work on the node: fill the yielded `Work`; the node is done when the block ends without an error.

        The seconds of work are kept on the way (`Work.save_periodically`), so that a kill loses a few of them at most.
        """
        work = Work(self, record)
        try:
            yield work
            work.record = replace(record, done=True, result=work.result, files=tuple(work.files))
        finally:
            work.save()


class Work:
    """What a node's work leaves behind: its result, its files, and how long it took."""

    def __init__(self, folder: NodeFolder, record: NodeRecord) -> None:
        self.path = folder.path
        self.result: dict[str, Any] = {}
        self.files: list[str] = []
        self.resolved = dict(record.resolved)
        self.record, self._folder = record, folder
        self._started = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of work on this node, earlier attempts included."""
        return round(self.record.seconds + time.monotonic() - self._started, 1)

    def save(self) -> None:
        """Write the record with the seconds and resolved values so far."""
        self._saved = time.monotonic()
        self._folder.write(replace(self.record, seconds=self.seconds, resolved=self.resolved))

    def save_periodically(self) -> None:
        """Save every few seconds, so that a kill loses no more of them."""
        if time.monotonic() - self._saved >= _BEAT_SECONDS:
            self.save()


class RunFolder:
    """`runs/NAME/`, for reading; `experiment.run` fills it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def node(self, node: str, model: str | None = None) -> NodeFolder:
        """The folder of a node by its id ("students/dpo"); of an evaluation, that of one model's cell."""
        kind, _, name = node.partition("/")
        place = Path(kind) / folder_name(name)
        if model is not None:
            place /= folder_name(model)
        return NodeFolder(self.path / place, self.path / "older" / place)

    def nodes(self) -> dict[str, NodeRecord]:
        """The records of all trees, datasets and students that have content, by id, kind after kind."""
        found = (item for kind in KINDS for item in self._records(f"{kind}/*/node.json").items())
        return {f"{folder.parent.name}/{unquote(folder.name)}": record for folder, record in found}

    def cells(self) -> dict[tuple[str, str], NodeRecord]:
        """The records of all evaluated cells, by (evaluation, model)."""
        found = self._records("evaluations/*/*/node.json")
        return {(unquote(folder.parent.name), unquote(folder.name)): record for folder, record in found.items()}

    def _records(self, pattern: str) -> dict[Path, NodeRecord]:
        """The records in the files of a pattern, by their folders."""
        found = {path.parent: _read_record(path.parent) for path in sorted(self.path.glob(pattern))}
        return {folder: record for folder, record in found.items() if record is not None}


def folder_name(name: str) -> str:
    """A node's name as a folder's: a slash in a swept value must not make a folder of its own."""
    return quote(name, safe="@=,+ []{}\"'")


def find_run(path: Path) -> RunFolder:
    """The run folder at `path`.

    Raises:
        UsageError: there is none, or one of an older cotree.
    """
    if (path / "manifest.json").is_file():
        fix = "run its recipe in the new form under another name (docs/migration.md)"
        raise UsageError(f"{path} is a run of an older cotree, whose files have another form; {fix}")
    if not (path / "recipe.yaml").is_file():
        raise UsageError(f"{path} is no run folder (it has no recipe.yaml); give one that `cotree run` made")
    return RunFolder(path)


def _read_record(path: Path) -> NodeRecord | None:
    content = read_json(path / "node.json")
    if content is None:
        return None
    try:
        content = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        return NodeRecord(**content)
    except TypeError as error:
        raise UsageError(f"{path / 'node.json'} is of another version ({error}); move {path} away") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when there is no such file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}); move {path.parent} away to start anew") from None
    return content


def _machine() -> dict[str, Any]:
    """The class of this machine, for tables: nothing that names it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    return {"cpu": _cpu(), "cores": os.cpu_count() or 1, "memory_gb": round(memory, 1)}


def _cpu() -> str:
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE):
            return found[1].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if commit := _git():
        found["git"] = commit
    return found


def _git() -> str:
    """The commit of cotree's own checkout, "" where it is none."""
    here = Path(__file__).resolve().parent
    if not (here.parents[2] / "pyproject.toml").is_file():
        return ""  # installed: the repository around it, if any, is the user's
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    return ""
