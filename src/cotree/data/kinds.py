"""What columns a kind of row has: for Parquet, and for a check that names each fault.

Invariant: the same rows give the same bytes; a Parquet file carries the hash of the chat template whose tokens were
counted, and a trainer can refuse another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model

from cotree.base.atomic import whole
from cotree.base.errors import UsageError
from cotree.base.rows import BATCH, Row, read_metadata, read_rows
from cotree.models.encode import template_hash

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_FAULTS_SHOWN = 20
# No half of a surrogate pair either, which JSON can hold and no tokenizer reads.
Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Count = Annotated[int, Field(ge=0)]


class Message(BaseModel):
    """One message of a conversation, as every trainer takes it."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "user", "assistant", "tool"]
    content: Words


def _asks(messages: list[Message]) -> list[Message]:
    if messages[-1].role == "assistant":
        raise ValueError("must not end with the assistant's message")
    return messages


def _answers(messages: list[Message]) -> list[Message]:
    if [message.role for message in messages] != ["assistant"]:
        raise ValueError("must be exactly one assistant message")
    return messages


_Prompt = Annotated[list[Message], Field(min_length=1), AfterValidator(_asks)]
_Reply = Annotated[list[Message], AfterValidator(_answers)]
_COMMON = {"tree_id": str, "task": str, "question_id": str, "pass_rate": float}
_SFT = {
    "prompt": _Prompt, "completion": _Reply, "leaf_id": Count, "length_tokens": Count, "length_rank": Count,
    "pattern": str, "reward": float, "value": float, **_COMMON,
}  # fmt: skip
_DPO = {
    "prompt": _Prompt, "chosen": _Reply, "rejected": _Reply, "chosen_leaf": Count, "rejected_leaf": Count,
    "prefix_tokens": Count, "chosen_tokens": Count, "rejected_tokens": Count, "rejected_finished": bool, **_COMMON,
}  # fmt: skip
# TRL's types: conversational prompt-completion and preference, and stepwise supervision; the other columns go along.
COLUMNS: Mapping[str, Mapping[str, Any]] = {
    "sft": _SFT,
    "control": _SFT,
    "dpo": _DPO,
    "step_pairs": {
        **_DPO, "step_type": str, "prefix": str, "chosen_step": str, "rejected_step": str, "chosen_value": float,
        "rejected_value": float, "chosen_visits": Count, "rejected_visits": Count,
    },
    "stepwise": {
        "prompt": Words, "completions": Annotated[list[str], Field(min_length=1)], "labels": list[bool],
        "values": list[float], "visits": list[Count], "leaf_id": Count, **_COMMON,
    },
}  # fmt: skip
# What a file must have to be of a type, whoever wrote it; of the other columns it may have any.
_NEEDED = {
    "sft": ("prompt", "completion"),
    "dpo": ("prompt", "chosen", "rejected"),
    "stepwise": ("prompt", "completions", "labels"),
}


def _check_of(kind: str) -> type[BaseModel]:
    columns = COLUMNS["step_pairs" if kind == "dpo" else kind]  # a step pair is a pair with more columns
    fields: dict[str, Any] = {
        name: (of, ...) if name in _NEEDED[kind] else (of | None, None) for name, of in columns.items()
    }
    return create_model(kind, __config__=ConfigDict(strict=True), **fields)


_CHECKS = {kind: _check_of(kind) for kind in _NEEDED}


def write_parquet(path: Path, kind: str, rows: Iterable[Row], metadata: Mapping[str, Any]) -> int:
    """Write rows of a kind, whole or not at all; returns how many."""
    noted = {"cotree": json.dumps({**metadata, "kind": kind}, sort_keys=True)}
    return write_columns(path, COLUMNS[kind], rows, noted)


def write_columns(path: Path, columns: Mapping[str, Any], rows: Iterable[Row], noted: Mapping[str, str]) -> int:
    """Write rows of these columns (name -> type) as Parquet, whole or not at all; returns how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, _arrow(of)) for name, of in columns.items()], metadata=noted)
    left, written = iter(rows), 0
    with whole(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        # Row groups of a fixed size, so that they never depend on how rows were made.
        while batch := list(islice(left, BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            written += len(batch)
    return written


def _arrow(of: Any) -> pa.DataType:
    """The Arrow type of a column's type; of a class, a struct of its fields."""
    import pyarrow as pa

    plain = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    origin, arguments = get_origin(of), get_args(of)
    if of in plain:
        return plain[of]
    if origin is list:
        return pa.list_(_arrow(arguments[0]))
    if origin in (Annotated, UnionType):  # constrained, or None
        return _arrow(arguments[0])
    if origin is Literal:
        return pa.string()
    fields = get_type_hints(Message if origin is dict else of)
    return pa.struct([(name, _arrow(of)) for name, of in fields.items()])


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
    kind, count, faults = None, 0, list[str]()
    for count, row in enumerate(read_rows(path), 1):
        kind = kind or kind_of(row)
        if kind is None:
            types = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in _NEEDED.items())
            raise UsageError(f"{path}: row 0 has the columns of no type that is trained on ({types})")
        faults += [f"row {count - 1}, {fault}" for fault in faults_of(row, kind)]
    if kind is None:
        raise UsageError(f"{path} has no rows")
    if faults:
        more = f"; and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise UsageError(f"{path}: {'; '.join(faults[:_FAULTS_SHOWN])}{more}")
    return kind, count


def faults_of(row: Row, kind: str) -> list[str]:
    """What keeps a row from being of a kind (sft, dpo or stepwise), with the column's name."""
    try:
        _CHECKS[kind].model_validate(row)
    except ValidationError as error:
        return [
            f"column {'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}, "
            f"not {str(fault['input'])[:60]!a}"
            for fault in error.errors(include_url=False)
        ]
    if kind == "stepwise":
        steps = len(row["completions"])
        return [
            f"column {name}: has {len(row[name])} entries for {steps} completions"
            for name in ("labels", "values", "visits")
            if row.get(name) is not None and len(row[name]) != steps
        ]
    if kind == "dpo" and row["chosen"] == row["rejected"]:
        return ["column rejected: is the same as chosen"]
    sizes = [row[name] for name in ("chosen_tokens", "rejected_tokens") if row.get(name) is not None]
    if sizes and (row.get("prefix_tokens") or 0) > min(sizes):
        return [f"column prefix_tokens: {row['prefix_tokens']} are more than the shorter side has ({min(sizes)})"]
    return []
