"""`cotree diagnose`: the share of texts in a file, evaluation or run with formalistic thinking, and the worst texts.

Each row is read once and counted under one source and one language.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

from cotree.base.errors import UsageError
from cotree.base.progress import one_line
from cotree.base.rows import read_rows
from cotree.data.gates import main_script
from cotree.eval.journal import JOURNAL, damaged_lines, read_all_lines, read_samples
from cotree.tasks.base import VerdictKind
from cotree.tasks.diagnosis import diagnose
from cotree.tasks.loading import HUB_ID

_FLAGS = ("loop", "over_reflection", "instruction_failure", "no_answer")
# Possible text columns, in order of preference.
_TEXTS = ("completion", "response", "text", "output", "chosen", "solution", "messages", "conversations")
_IDS = ("id", "question_id", "tree_id")
_SOURCES = ("source", "task", "model", "benchmark")
# (file name, row number, row)
NumberedRow = tuple[str, int, Mapping[str, Any]]


def diagnose_file(where: str | Path, field: str | None = None, shown: int = 3) -> Iterator[str]:
    """Diagnose all texts; yields report lines: a table by source and language, then the worst texts.

    Args:
        where: a Parquet or JSON-lines file, a hub dataset, an evaluation, or a whole run; in lm-eval's sample files
            each response counts once.
        field: the text column (a string, or messages, of which the last is used); by default the first existing of
            completion, response, text, output, chosen, solution, messages, conversations.
        shown: number of worst texts to show.

    Raises:
        UsageError: nothing of that name, or a row has no text.
    """
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    worst: list[tuple[int, float, int, str, str, str]] = []
    damaged: dict[Path, int] = {}
    for index, (file, number, row) in enumerate(_rows(where, damaged)):
        text = _text(row, field, f"{where}: row {number}")
        verdict = row.get("verdict")  # None or another value without a verifier
        answered = verdict != "no_answer" if verdict in get_args(VerdictKind) else None
        found = diagnose(text, finish_reason=str(row.get("finish_reason") or "stop"), answered=answered)
        source = next((str(row[name]) for name in _SOURCES if isinstance(row.get(name), str)), file)
        if Path(where).is_dir():  # several models or datasets
            source = f"{file}: {source}"
        flags = [flag for flag in _FLAGS if getattr(found, flag)]
        language = str(row.get("language") or main_script(text))
        counts[source, language].update(["rows", *flags], characters=len(text))
        id_ = next((f", {one_line(str(row[name]))}" for name in _IDS if row.get(name) is not None), "")
        place = f"{file}, row {number}{id_}"
        bad = (len(flags), found.evidence.duplicate_4grams, -index, place, ", ".join(flags), text)
        worst = sorted([*worst, bad], reverse=True)[:shown]
    if not counts:
        raise UsageError(f"{where} has no rows{''.join(f'; {damaged_lines(lines)}' for lines in damaged.values())}")
    yield f"{'source':30} {'language':8} {'rows':>6} {'characters':>10} " + " ".join(f"{flag:>19}" for flag in _FLAGS)
    for (source, language), n in sorted(counts.items()):
        shares = " ".join(f"{n[flag]:>10} ({n[flag] / n['rows']:6.1%})" for flag in _FLAGS)
        group_name = f"{one_line(source)[:30]:30} {one_line(language):8}"
        yield f"{group_name} {n['rows']:>6} {n['characters'] / n['rows']:>10.0f} {shares}"
    for journal, lines in damaged.items():
        yield f"{journal}: {damaged_lines(lines)} left out"
    for *_, name, flagged, text in worst:
        if flagged:
            yield f"\n{name}: {flagged}; {len(text)} characters, ends: ...{text[-160:]!r}"


def _rows(where: str | Path, damaged: dict[Path, int]) -> Iterator[NumberedRow]:
    """Iterate over the rows of a file, a folder (an evaluation or a run), or a hub dataset.

    damaged: filled with {journal: unreadable lines}.
    """
    path = Path(where)
    if path.is_dir():
        patterns = (JOURNAL, f"evaluations/*/*/{JOURNAL}", "datasets/*/train.parquet")
        files = [file for pattern in patterns for file in sorted(path.glob(pattern))]
        if not files:
            raise UsageError(f"{path} has no replies of an evaluation and no rows of a dataset; name a file of texts")
        for file in files:
            node = unquote(file.parent.relative_to(path).as_posix()).removeprefix("evaluations/")
            yield from _rows_of_file(file, node if file.parent != path else path.resolve().name, damaged)
    elif not path.exists() and HUB_ID.fullmatch(str(where)) and not path.suffix:
        yield from _hub_rows(str(where))
    else:
        yield from _rows_of_file(path, path.stem, damaged)


def _rows_of_file(file: Path, name: str, damaged: dict[Path, int]) -> Iterator[NumberedRow]:
    """The rows of one file; for a journal, its current samples."""
    if file.name == JOURNAL and (lines := read_all_lines(file)[1]):
        damaged[file] = lines
    yield from _one_response_a_row(name, map(asdict, read_samples(file)) if file.name == JOURNAL else read_rows(file))


def _hub_rows(id_: str) -> Iterator[NumberedRow]:
    """Stream the rows of all splits of a hub dataset.

    Raises:
        UsageError: it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        for split, rows in load_dataset(id_, streaming=True).items():
            yield from _one_response_a_row(f"{id_}/{split}", rows)
    except Exception as error:  # noqa: BLE001 - the hub client and `datasets` raise dozens of unrelated types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"cannot load {id_} from the hub: {reason}") from None


def _one_response_a_row(name: str, rows: Iterable[Any]) -> Iterator[NumberedRow]:
    """Split lm-eval's rows, which hold all samples of a question once per filter, to one response per row."""
    first_filter = None
    for number, row in enumerate(rows):
        if not isinstance(row.get("resps"), list):
            yield name, number, row
            continue
        first_filter = first_filter or row.get("filter")
        if row.get("filter") != first_filter:
            continue
        own, doc = row.get("cotree") or {}, row.get("doc") or {}
        texts = [text for found in row["resps"] for text in (found if isinstance(found, list) else [found])]
        reasons, verdicts = own.get("finish_reasons") or repeat("stop"), own.get("verdicts") or repeat(None)
        for text, reason, verdict in zip(texts, reasons, verdicts, strict=False):
            about = {"id": doc.get("id", row.get("doc_id")), "task": doc.get("task")}
            yield name, number, {"response": text, "finish_reason": reason, "verdict": verdict, **about}


def _text(row: Mapping[str, Any], field: str | None, where: str) -> str:
    """The text of a row, from column `field` or the first known text column; the last of several messages."""
    names = (field,) if field is not None else _TEXTS
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content", value[-1].get("value"))
    if not isinstance(value, str):
        raise UsageError(f"{where} has no text in {', '.join(names)}; name its column with --field")
    return value
