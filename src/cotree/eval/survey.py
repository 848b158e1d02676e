"""`cotree diagnose`: formalistic thinking in a file of long chains, by source and language, worst first.

Invariant: every row is read once and counted under one source and one language.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.rows import read_rows
from cotree.data.gates import main_script
from cotree.eval.journal import JOURNAL
from cotree.models.wire import one_line
from cotree.tasks.diagnosis import diagnose
from cotree.tasks.loading import HUB_ID

_FLAGS = ("loop", "over_reflection", "instruction_failure", "no_answer")
_TEXTS = ("completion", "response", "text", "output", "chosen", "solution")
_IDS = ("id", "question_id", "tree_id")
_SOURCES = ("source", "task", "model", "benchmark")


def diagnose_file(where: str | Path, field: str | None = None, shown: int = 3) -> Iterator[str]:
    """Lines of a report over a Parquet or JSON-lines file, a data set on the hub, an evaluation or a whole run; of
    lm-eval's sample files every response counts once.

    field: the column that holds the text (a string, or messages whose last is read); by default the first that a row
        has of completion, response, text, output, chosen, solution, messages, conversations.

    Raises:
        UsageError: there is nothing of that name, or a row has no text.
    """
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    worst: list[tuple[int, float, int, str, str, str]] = []
    for index, (file, number, row) in enumerate(_rows(where)):
        text = _text(row, field, f"{where}: row {number}")
        found = diagnose(text, finish_reason=str(row.get("finish_reason") or "stop"), answered=_answered(row))
        source = next((str(row[name]) for name in _SOURCES if isinstance(row.get(name), str)), file)
        if Path(where).is_dir():  # several models or data sets
            source = f"{file}: {source}"
        group = counts[source, str(row.get("language") or main_script(text))]
        group.update(["rows"], characters=len(text))
        flags = [flag for flag in _FLAGS if getattr(found, flag)]
        group.update(flags)
        id_ = next((row[name] for name in _IDS if row.get(name) is not None), None)
        named = f"{file}, row {number}" + (f", {one_line(str(id_))}" if id_ is not None else "")
        badness = (len(flags), found.evidence["duplicate_4grams"], -index)
        heapq.heappush(worst, (*badness, named, ", ".join(flags), text))
        if len(worst) > shown:
            heapq.heappop(worst)
    yield f"{'source':30} {'language':8} {'rows':>6} {'characters':>10} " + " ".join(f"{flag:>19}" for flag in _FLAGS)
    for (source, language), n in sorted(counts.items()):
        shares = " ".join(f"{n[flag]:>10} ({n[flag] / n['rows']:6.1%})" for flag in _FLAGS)
        said = f"{one_line(source)[:30]:30} {one_line(language):8}"
        yield f"{said} {n['rows']:>6} {n['characters'] / n['rows']:>10.0f} {shares}"
    for *_, named, flagged, text in sorted(worst, reverse=True):
        if flagged:
            yield f"\n{named}: {flagged}; {len(text)} characters, ends: ...{text[-160:]!r}"


def _rows(where: str | Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Rows, each with the name of what it stands in and its number there."""
    path = Path(where)
    if path.is_dir():
        files = sorted([*path.glob(JOURNAL), *path.glob("eval/samples_*.jsonl"), *path.glob("data/*/train.parquet")])
        if not files:
            raise UsageError(f"{path} is neither a run nor an evaluation; name a file in it")
        for file in files:
            name = f"data/{file.parent.name}" if file.suffix == ".parquet" else file.stem.removeprefix("samples_")
            yield from _numbered(name, read_rows(file))
    elif not path.exists() and HUB_ID.fullmatch(str(where)) and not path.suffix:
        from datasets import load_dataset

        try:
            splits = load_dataset(str(where), streaming=True)
            for split, rows in splits.items():
                yield from _numbered(f"{where}/{split}", rows)
        except Exception as error:  # noqa: BLE001 - the hub client and `datasets` raise dozens of unrelated types
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UsageError(f"cannot load {where} from the hub: {reason}") from None
    else:
        yield from _numbered(path.stem, read_rows(path))


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """lm-eval has all samples of a question in one row, and that row once for each filter."""
    first = None
    for number, row in enumerate(rows):
        if not isinstance(row.get("resps"), list):
            yield name, number, row
            continue
        first = row.get("filter") if first is None else first
        if row.get("filter") != first:
            continue
        own, doc = row.get("cotree") or {}, row.get("doc") or {}
        texts = [text for found in row["resps"] for text in (found if isinstance(found, list) else [found])]
        reasons, verdicts = own.get("finish_reasons") or repeat("stop"), own.get("verdicts") or repeat(None)
        for text, reason, verdict in zip(texts, reasons, verdicts, strict=False):
            about = {"id": doc.get("id", row.get("doc_id")), "task": doc.get("task")}
            yield name, number, {"response": text, "finish_reason": reason, "verdict": verdict, **about}


def _text(row: dict[str, Any], field: str | None, where: str) -> str:
    names = (field,) if field is not None else (*_TEXTS, "messages", "conversations")
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content", value[-1].get("value"))
    if not isinstance(value, str):
        raise UsageError(f"{where} has no text in {', '.join(names)}; name its column with --field")
    return value


def _answered(row: dict[str, Any]) -> bool | None:
    """What a judge said, in evaluation samples."""
    verdict = row.get("verdict") or row.get("kind")
    return verdict != "no_answer" if verdict in ("correct", "wrong", "no_answer") else None
