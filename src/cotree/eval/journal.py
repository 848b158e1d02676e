"""The journal of an evaluation, a line a sample: its memory, and what every number is computed from.

A line is written whole or not at all, so what was asked before a kill is asked once. Lines are only ever appended; of
several about one sample (judged again by newer code, or asked again because its question was changed) the last counts.
Each ends with its checksum, `crc32`; an older cotree's have none.
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
SampleKey = tuple[str, str, int, int]  # task, question id, turn, number of the sample


@dataclass(frozen=True, slots=True)
class EvalSample:
    """A model's reply to one question, and the verdict on it.

    prompt_tokens: of its request, counted with the request's first sample; 0 with the others.
    seconds: wall time of the request or search that brought it, while others ran; None in an older cotree's journals.
    verdict, lenient_verdict: under strict and lenient extraction. answer: what strict extraction found.
    prompt_hash: sha256 of the conversation before any chat template, so it is the same for all models.
    decoding: the search that chose the reply, "" for plain sampling.
    tree_answers, tree_correct: of a tree the answer of each of its chains, in the order in which they ended, and
        whether it is correct (None: it could not be judged).
    verdict_version, reference_hash: the version of the code that judged, and the hash of the reference answer (and what
        else of the question a verdict depends on) that it judged by.
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
        """What names a sample in its evaluation."""
        return self.task, self.id, self.turn, self.sample

    @property
    def task_turn(self) -> str:
        """The row of the table in which it counts: its task, and apart each later turn of a conversation, so that a
        row has the same number of samples for every question."""
        return f"{self.task}, turn {self.turn + 1}" if self.turn else self.task


_SAMPLE = TypeAdapter(EvalSample)
_CHECKSUM = re.compile(rb', "crc32": (\d+)}$')  # of the line without it


def read_samples(path: Path) -> list[EvalSample]:
    """The samples of a journal, each once, as its last line has it; none where there is no file.

    Raises:
        UsageError: it is another file.
    """
    samples, damaged = read_all_lines(path)
    if damaged and not samples:
        raise UsageError(f"{path} holds no samples of an evaluation; {HAVE_JOURNALS}")
    return list({sample.key: sample for sample in samples}.values())


def read_all_lines(path: Path) -> tuple[list[EvalSample], int]:
    """All samples of a journal in the order of its lines, also those that a later line replaces; and how many lines are
    damaged."""
    return read_lines(path, _SAMPLE.validate_python)


def read_lines(path: Path, parse: Callable[[Any], T]) -> tuple[list[T], int]:
    """What a file of JSON lines holds, nothing where there is no file, and how many of its lines are damaged: no JSON,
    not as their checksum says, or refused by `parse` with a ValueError. A last line that a kill cut in half is left out
    and not counted."""
    found, damaged = [], 0
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            found.append(parse(json.loads(_checked(line))))
        except (ValueError, RecursionError):
            damaged += 1
    return found, damaged


def take_samples(sources: Iterable[Path], journal: Path, questions: Collection[tuple[str, str]]) -> None:
    """Append to a journal what others have of these questions (task, id): replies to prompts that it has none to."""
    there = {(sample.key, sample.prompt_hash) for sample in read_all_lines(journal)[0]}
    for path in sources:
        for sample in read_all_lines(path)[0]:
            if (sample.task, sample.id) in questions and (sample.key, sample.prompt_hash) not in there:
                append_line(journal, asdict(sample))
                there.add((sample.key, sample.prompt_hash))


def _checked(line: bytes) -> bytes:
    """A line without its checksum, if it has one.

    Raises:
        ValueError: it is not as it was written.
    """
    kept = _CHECKSUM.search(line)
    if kept is None:
        return line
    line = line[: kept.start()] + b"}"
    if zlib.crc32(line) != int(kept[1]):
        raise ValueError("not as it was written")
    return line


def damaged_lines(count: int) -> str:
    """How many lines are damaged, in words; "" where none is."""
    return f"{count} damaged line{'s' * (count > 1)}" if count else ""


def by_task_turn(samples: Iterable[EvalSample]) -> dict[str, dict[str, list[EvalSample]]]:
    """The samples of each row of the table (`EvalSample.task_turn`), by question id."""
    found: dict[str, dict[str, list[EvalSample]]] = {}
    for sample in samples:
        found.setdefault(sample.task_turn, {}).setdefault(sample.id, []).append(sample)
    return found


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line with its checksum, whole or not at all; half a line that a kill left at the end is removed.

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
            # A nearly full disk takes a part of the bytes and shows it only by their count.
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def content_hash(content: Any) -> str:
    """The sha256 of a text, or of plain data as JSON, in hex."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
