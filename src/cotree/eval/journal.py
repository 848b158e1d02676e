"""The journal of an evaluation: one JSON line per sample, from which all scores are computed.

Lines are appended atomically, so samples survive a kill. Of several lines of a sample (judged again by newer code, or
requested again after its prompt changed) the last counts. Each line ends with its checksum, `crc32`; older versions
wrote none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from cotree.base.atomic import explain_write_errors
from cotree.base.errors import UsageError
from cotree.tasks.base import VerdictKind

JOURNAL = "journal.jsonl"  # in the folder of an evaluation
HAVE_JOURNALS = "give a folder of `cotree eval`, or a run's evaluations/NODE/MODEL"
T = TypeVar("T")
SampleKey = tuple[str, str, int, int]  # (task, question id, turn, sample number)


@dataclass(frozen=True, slots=True)
class EvalSample:
    """A model's reply to one question, and its verdict.

    prompt_tokens: of its request, stored with the request's first sample; 0 for the others.
    seconds: wall time of its request or search, with others in flight; None in journals of older versions.
    verdict, lenient_verdict: with strict and lenient extraction. answer: from strict extraction.
    prompt_hash: SHA-256 of the conversation before the chat template, so it is equal for all models.
    decoding: the search strategy; "" for plain sampling.
    tree_answers, tree_correct: the answers of a search's chains, in the order in which they ended, and whether each is
        correct (None: undecided).
    verdict_version, reference_hash: version of the judging code, and hash of the reference answer and other inputs of
        the verdict.
    """

    task: str
    id: str
    response: str
    finish_reason: str
    tokens: int
    prompt_tokens: int
    verdict: VerdictKind = "no_answer"
    answer: str | None = None
    gold: str = ""
    turn: int = 0
    sample: int = 0
    lenient_verdict: VerdictKind | None = None
    detail: str = ""
    family: str = ""
    prompt_hash: str = ""
    max_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    decoding: str = ""
    seconds: float | None = field(default=None, compare=False)
    tree_answers: Sequence[str | None] | None = None
    tree_correct: Sequence[bool | None] | None = None
    verdict_version: int = 0
    reference_hash: str = ""

    @property
    def key(self) -> SampleKey:
        """The sample's key within its evaluation."""
        return self.task, self.id, self.turn, self.sample

    @property
    def task_turn(self) -> str:
        """Its row of the table: the task, or task and turn for later turns of a conversation, so that each row has
        equally many samples for every question."""
        return f"{self.task}, turn {self.turn + 1}" if self.turn else self.task


_SAMPLE = TypeAdapter(EvalSample)
_CHECKSUM = re.compile(rb', "crc32": (\d+)}$')  # checksum of the line without it


def read_samples(path: Path) -> list[EvalSample]:
    """The samples of a journal, by each one's last line; empty if the file is missing.

    Raises:
        UsageError: not a journal.
    """
    samples, damaged = read_all_lines(path)
    if damaged and not samples:
        raise UsageError(f"{path} holds no samples of an evaluation; {HAVE_JOURNALS}")
    return list({sample.key: sample for sample in samples}.values())


def read_all_lines(path: Path) -> tuple[list[EvalSample], int]:
    """The samples of all lines of a journal in order, including replaced ones, and the number of damaged lines."""
    return read_lines(path, _SAMPLE.validate_python)


def read_lines(path: Path, parse: Callable[[Any], T]) -> tuple[list[T], int]:
    """Parse a file of JSON lines (empty if missing); also returns the number of damaged lines: invalid JSON, a checksum
    mismatch, or a ValueError from `parse`. An incomplete last line after a kill is skipped and not counted."""
    found, damaged = [], 0
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            found.append(parse(json.loads(_checked(line))))
        except (ValueError, RecursionError):
            damaged += 1
    return found, damaged


def take_samples(sources: Iterable[Path], journal: Path, questions: Collection[tuple[str, str]]) -> None:
    """Append samples of these questions (task, id) from other journals, for prompts without samples here."""
    there = {(sample.key, sample.prompt_hash) for sample in read_all_lines(journal)[0]}
    for path in sources:
        for sample in read_all_lines(path)[0]:
            if (sample.task, sample.id) in questions and (sample.key, sample.prompt_hash) not in there:
                append_line(journal, asdict(sample))
                there.add((sample.key, sample.prompt_hash))


def _checked(line: bytes) -> bytes:
    """Verify and remove a line's checksum, if it has one.

    Raises:
        ValueError: the checksum does not match.
    """
    kept = _CHECKSUM.search(line)
    if kept is None:
        return line
    line = line[: kept.start()] + b"}"
    if zlib.crc32(line) != int(kept[1]):
        raise ValueError("not as it was written")
    return line


def damaged_lines(count: int) -> str:
    """A message about damaged lines; "" if there are none."""
    return f"{count} damaged line{'s' * (count > 1)}" if count else ""


def by_task_turn(samples: Iterable[EvalSample]) -> dict[str, dict[str, list[EvalSample]]]:
    """Group samples: {row of the table (`EvalSample.task_turn`): {question id: samples}}."""
    found: dict[str, dict[str, list[EvalSample]]] = {}
    for sample in samples:
        found.setdefault(sample.task_turn, {}).setdefault(sample.id, []).append(sample)
    return found


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line with its checksum, atomically, after removing an incomplete last line of a killed process.

    Raises:
        CotreeError: it cannot be written (disk full, no permission).
    """
    content = json.dumps(row, ensure_ascii=False).encode()
    line = content[:-1] + f', "crc32": {zlib.crc32(content)}}}\n'.encode()
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            end = file.tell()
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                end = path.read_bytes().rfind(b"\n") + 1
                file.truncate(end)
            # A nearly full disk writes fewer bytes without an error.
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def content_hash(content: Any) -> str:
    """SHA-256 in hex of a text, or of plain data as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
