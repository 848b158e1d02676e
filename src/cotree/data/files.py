"""Dataset files: what columns a kind of row has, Parquet and JSON lines in and out, and a check that names each fault.

Invariant: rows stream, so a file of any size needs the memory of a batch; the same rows give the same bytes; a Parquet
file carries the hash of the chat template whose tokens were counted, and a trainer can refuse another.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.errors import CotreeError, UsageError
from cotree.train.encode import template_hash

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
_BATCH = 1_024
_FAULTS_SHOWN = 20


def _columns(spec: str) -> dict[str, str]:
    """Column name -> type, from `type: names; type: names`."""
    parts = (part.split(":") for part in spec.split(";"))
    return {name: kind.strip() for kind, names in parts for name in names.split()}


_COMMON = "; string: tree_id task question_id; double: pass_rate"
_SFT = "messages: prompt completion; int64: leaf_id length_tokens length_rank; string: pattern; double: reward value"
_DPO = (
    "messages: prompt chosen rejected; int64: chosen_leaf rejected_leaf prefix_tokens chosen_tokens rejected_tokens"
    "; bool: rejected_finished"
)
_STEP = (
    "; string: step_type prefix chosen_step rejected_step; double: chosen_value rejected_value; int64: chosen_visits"
)
_REWARDS = "string: prompt; list<string>: completions; list<bool>: labels; list<double>: values; list<int64>: visits"
# TRL's types: conversational prompt-completion and preference, and stepwise supervision; the other columns go along.
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "sft": _columns(_SFT + _COMMON),
    "control": _columns(_SFT + _COMMON),
    "dpo": _columns(_DPO + _COMMON),
    "step_pairs": _columns(_DPO + _COMMON + _STEP + " rejected_visits"),
    "stepwise": _columns(_REWARDS + "; int64: leaf_id" + _COMMON),
}
_PLAIN: Mapping[str, tuple[Any, str]] = {
    "int64": (int, "a number from 0"),
    "double": (int | float, "a number"),
    "bool": (bool, "true or false"),
    "string": (str, "text"),
}
# What a file must have to be of a type, whoever wrote it.
_NEEDED = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"),
           "stepwise": ("prompt", "completions", "labels")}  # fmt: skip


def write_parquet(path: Path, kind: str, rows: Iterable[Row], metadata: Mapping[str, Any]) -> int:
    """Write rows of a kind, whole or not at all; returns how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, _arrow(kind)) for name, kind in COLUMNS[kind].items()])
    schema = schema.with_metadata({"cotree": json.dumps({**metadata, "kind": kind}, sort_keys=True)})
    written = 0
    with whole(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for batch in batches(rows):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            written += len(batch)
    return written


def write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON lines, whole or not at all; returns how many."""
    with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        return sum(1 for row in rows if file.write(json.dumps(row, ensure_ascii=False) + "\n"))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A partial file beside `path` that takes its place when the block ends well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"cannot write {path}: a part of its path is a file, no folder; choose another") from None
    except OSError as error:
        fix = "; free some space, then re-run the same command to resume" if error.errno == errno.ENOSPC else ""
        raise CotreeError(f"cannot write {path}: {error.strerror or error}{fix}") from None
    finally:
        with suppress(NotADirectoryError):
            partial.unlink(missing_ok=True)


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists of a fixed size, so that row groups never depend on how rows were made."""
    left = iter(rows)
    while batch := list(islice(left, _BATCH)):
        yield batch


def _arrow(kind: str) -> pa.DataType:
    import pyarrow as pa

    if kind == "messages":
        return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    if kind.startswith("list<"):
        return pa.list_(_arrow(kind[5:-1]))
    return pa.bool_() if kind == "bool" else pa.type_for_alias(kind)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet, JSON-lines (also .gz) or JSON-array file, one at a time.

    Raises:
        UsageError: there is no such file, or it is damaged; the line is named.
    """
    if not path.is_file():
        raise UsageError(f"no file at {path}")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_BATCH):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:  # damaged pages are an OSError
            raise UsageError(f"{path} is no Parquet file: {str(error).splitlines()[0]}") from None
        return
    number = 1
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            if path.suffix == ".json":
                found = json.load(lines)
                if not isinstance(found, list):
                    raise ValueError("a .json file must be an array of rows")
                yield from found
                return
            for line in lines:
                if line.strip():
                    yield json.loads(line)
                number += 1
    except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
        raise UsageError(f"{path}: line {number}: not JSON ({error})") from None


def read_metadata(path: Path) -> dict[str, Any]:
    """What cotree noted in a Parquet file; empty for files of others."""
    if path.suffix != ".parquet":
        return {}
    import pyarrow.parquet as pq

    noted: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {}).get(b"cotree", b"{}"))
    return noted


def check_template(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse rows that were selected by the token counts of another chat template than the student's.

    Raises:
        UsageError: the file names another template. One that names none (not built by cotree) passes.
    """
    noted = read_metadata(path).get("template")
    if noted is not None and noted != template_hash(tokenizer):
        raise UsageError(
            f"{path} was built for another tokenizer or chat template ({noted}, this student's is "
            f"{template_hash(tokenizer)}); build it again for this student"
        )


def kind_of(row: Row) -> str | None:
    """sft, dpo or stepwise by the columns that a row has; None for anything else."""
    return next((kind for kind, needed in _NEEDED.items() if all(name in row for name in needed)), None)


def check_file(path: Path) -> tuple[str, int]:
    """Check every row of a dataset file; returns its kind and the number of rows.

    Raises:
        UsageError: names row and column of the first faults, and how many there are.
    """
    kind, count, faults = "", 0, list[str]()
    for count, row in enumerate(read_rows(path), 1):
        found = kind_of(row) if isinstance(row, dict) else None
        if not kind:
            if found is None:
                types = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in _NEEDED.items())
                raise UsageError(f"{path}: row 0 has the columns of no type that is trained on ({types})")
            kind = found
        if found != kind:
            faults.append(f"row {count - 1}: is no {kind} row; columns are missing")
        else:
            faults += [f"row {count - 1}, column {column}: {fault}" for column, fault in _faults(row, kind)]
    if not count:
        raise UsageError(f"{path} has no rows")
    if faults:
        more = f"; and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise UsageError(f"{path}: {'; '.join(faults[:_FAULTS_SHOWN])}{more}")
    return kind, count


def _faults(row: Row, kind: str) -> Iterator[tuple[str, str]]:
    if kind == "stepwise":
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            yield "prompt", "must be text"
        steps = row["completions"]
        if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
            yield "completions", "must be a list of texts"
            return
        for column, entry in (("labels", bool), ("values", int | float), ("visits", int)):
            found = row.get(column, None if column == "labels" else [0] * len(steps))
            if not isinstance(found, list) or not all(isinstance(one, entry) for one in found):
                yield column, f"must be a list of {'true and false' if column == 'labels' else 'numbers'}"
            elif len(found) != len(steps):
                yield column, f"has {len(found)} entries for {len(steps)} completions"
        yield from _plain_faults(row, COLUMNS[kind])
        return
    sides = [column for column in ("completion", "chosen", "rejected") if column in row]
    for column in ("prompt", *sides):
        fault = _messages_fault(row[column], column == "prompt")
        if fault:
            yield column, fault
    if kind == "dpo" and row["chosen"] == row["rejected"]:
        yield "rejected", "is the same as chosen"
    faults = list(_plain_faults(row, COLUMNS["step_pairs" if kind == "dpo" else kind]))
    yield from faults
    sizes = [row[name] for name in ("chosen_tokens", "rejected_tokens") if row.get(name) is not None]
    if kind == "dpo" and not faults and sizes and (row.get("prefix_tokens") or 0) > min(sizes):
        yield "prefix_tokens", f"{row['prefix_tokens']} are more than the shorter side has ({min(sizes)})"


def _plain_faults(row: Row, columns: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Faults of the columns that hold one value; a missing or empty one is none, for files of others have fewer."""
    for column, kind in columns.items():
        value = row.get(column)
        if value is None or kind not in _PLAIN or column == "prompt":
            continue
        wanted, name = _PLAIN[kind]
        wrong = not isinstance(value, wanted) or (kind != "bool" and isinstance(value, bool))
        if wrong or (kind == "int64" and value < 0):
            yield column, f"must be {name}, not {value!r}"


def is_text(words: str) -> bool:
    """Whether words can be written as UTF-8; JSON can hold halves of surrogate pairs, which cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in words) if not words.isascii() else True


def _messages_fault(messages: Any, is_prompt: bool) -> str | None:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        return "must be a list of messages ({role, content})"
    for at, message in enumerate(messages):
        if message.get("role") not in ("system", "user", "assistant", "tool"):
            return f"message {at}: unknown role {message.get('role')!r}"
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            return f"message {at}: has no content"
        if not is_text(message["content"]):
            return f"message {at}: has half of a surrogate pair, which no tokenizer reads"
    if is_prompt:
        return None if messages[-1]["role"] != "assistant" else "must not end with the assistant's message"
    return None if [m["role"] for m in messages] == ["assistant"] else "must be exactly one assistant message"
