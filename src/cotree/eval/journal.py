"""What a model said, a line a sample: the memory of an evaluation, and what every number is computed from.

Invariant: a line is whole or not there, so whatever was asked before a kill is asked once.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotree.base.errors import CotreeError, UsageError
from cotree.tasks.base import VerdictKind

JOURNAL = "journal.jsonl"  # in the folder of an evaluation
SAMPLES_ARE = "give a folder of `cotree eval`, or a run's eval/samples_NAME.jsonl"


@dataclass(frozen=True, slots=True)
class EvalSample:
    """What a model said to one question, and the verdict.

    kind, lenient: the verdicts under strict and lenient extraction. prompt_tokens: of its request, told with the
    request's first sample. prompt_hash: of the conversation before any chat template, so it is the same for all models.
    decoding: the search that chose it, "" for plain sampling. tree: of a tree, whether each of its chains is correct,
    in the order in which they ended.
    """

    task: str
    id: str
    response: str
    finish_reason: str
    tokens: int
    prompt_tokens: int
    kind: VerdictKind
    answer: str | None
    gold: str
    turn: int = 0
    sample: int = 0
    lenient: VerdictKind | None = None
    detail: str = ""
    family: str = ""
    prompt_hash: str = ""
    max_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    decoding: str = ""
    tree: list[bool] | None = None

    @property
    def part(self) -> str:
        """The row of the table that it counts in: its task, and each later turn of a conversation apart, so that a
        row has the same number of samples for every question."""
        return f"{self.task}, turn {self.turn + 1}" if self.turn else self.task


def read_samples(path: Path) -> list[EvalSample]:
    """The samples of a journal.

    Raises:
        UsageError: it is another file.
    """
    try:
        return [EvalSample(**line) for line in read_lines(path)]
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} holds no samples of an evaluation ({error}); {SAMPLES_ARE}") from None


def read_lines(path: Path) -> list[Any]:
    """What JSON lines hold, nothing where there is no file; a last line that a kill cut in half is none.

    Raises:
        ValueError: another line is no JSON; its number is named.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number}: no JSON: {error}") from None
    return found


def by_part(samples: Iterable[EvalSample]) -> dict[str, dict[str, list[EvalSample]]]:
    """The samples of each row of the table, by question."""
    found: dict[str, dict[str, list[EvalSample]]] = {}
    for sample in samples:
        found.setdefault(sample.part, {}).setdefault(sample.id, []).append(sample)
    return found


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            if before and os.pread(descriptor, 1, before - 1) != b"\n":  # a kill cut the last line in half
                before = path.read_bytes().rfind(b"\n") + 1
                os.ftruncate(descriptor, before)
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
            # A nearly full disk takes a part and says so only by the count.
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        fix = "free some space, then re-run the same command to resume"
        raise CotreeError(f"cannot write {path}: {error.strerror}; {fix}") from None
