"""Column schemas of each kind of dataset row; writes rows as Parquet and validates dataset files.

Invariant: the same rows give the same bytes; a Parquet file records the hash of the chat template used for its token
counts, so that a trainer can refuse another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, Field, StringConstraints, ValidationError, ValidationInfo, create_model

from cotree.base.atomic import atomic_draft
from cotree.base.errors import UsageError
from cotree.base.rows import ROWS_PER_BATCH, Row, read_metadata, read_rows
from cotree.models.encode import special_words, template_hash

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from transformers import PreTrainedTokenizerBase

_FAULTS_SHOWN = 20
# Rejects lone surrogates, which JSON allows and tokenizers reject.
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Count = Annotated[int, Field(ge=0)]


class Message(BaseModel, strict=True):
    """A chat message: role and content."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text


def _waits_for_reply(messages: list[Message]) -> list[Message]:
    if messages[-1].role == "assistant":
        raise ValueError("must not end with the assistant's message")
    return messages


def _is_one_reply(messages: list[Message], row: ValidationInfo) -> list[Message]:
    if [message.role for message in messages] != ["assistant"]:
        raise ValueError("must be exactly one assistant message")
    if row.field_name == "rejected" and messages == row.data.get("chosen"):
        raise ValueError("is the same as chosen")
    return messages


def _has_one_a_step(values: list[Any], row: ValidationInfo) -> list[Any]:
    steps = len(row.data.get("completions", values))
    if len(values) != steps:
        raise ValueError(f"has {len(values)} entries for {steps} completions")
    return values


_Prompt = Annotated[list[Message], Field(min_length=1), AfterValidator(_waits_for_reply)]
_Reply = Annotated[list[Message], AfterValidator(_is_one_reply)]
_Steps = Annotated[list[str], Field(min_length=1)]
_OneAStep = AfterValidator(_has_one_a_step)
_Types = dict[str, Any]  # {column: type}
# Required columns per kind, as in TRL: conversational prompt-completion, preference, and stepwise supervision.
_TRL: Mapping[str, _Types] = {
    "sft": {"prompt": _Prompt, "completion": _Reply},
    "dpo": {"prompt": _Prompt, "chosen": _Reply, "rejected": _Reply},
    "stepwise": {"prompt": Text, "completions": _Steps, "labels": Annotated[list[bool], _OneAStep]},
}
# Optional columns; files from elsewhere may have any of them.
_COMMON: _Types = {"tree_id": str, "task": str, "question_id": str, "pass_rate": float}
_CHAIN: _Types = {"leaf_id": Count, "length_tokens": Count, "length_rank": Count, "pattern": str, "reward": float}
_PAIR: _Types = {
    **dict.fromkeys(("chosen_leaf", "rejected_leaf", "chosen_tokens", "rejected_tokens", "prefix_tokens"), Count),
    "rejected_finished": bool,
}
_SIBLINGS: _Types = {
    **dict.fromkeys(("step_type", "prefix", "chosen_step", "rejected_step"), str),
    **dict.fromkeys(("chosen_value", "rejected_value"), float),
    **dict.fromkeys(("chosen_visits", "rejected_visits"), Count),
}
_STEPS: _Types = {"values": Annotated[list[float], _OneAStep], "visits": Annotated[list[Count], _OneAStep]}
COLUMNS: Mapping[str, _Types] = {
    "sft": {**_TRL["sft"], **_CHAIN, "value": float, **_COMMON},
    "dpo": {**_TRL["dpo"], **_PAIR, **_COMMON},
    "step_pairs": {**_TRL["dpo"], **_PAIR, **_COMMON, **_SIBLINGS},
    "stepwise": {**_TRL["stepwise"], **_STEPS, "leaf_id": Count, **_COMMON},
}
# Columns with the token counts of a row's completions.
COMPLETION_TOKENS = ("length_tokens", "chosen_tokens", "rejected_tokens")
# Columns used for statistics.
_COUNTED = [*COMPLETION_TOKENS, "task", "prefix_tokens", "value", "pass_rate", "reward"]
REQUIRED = {kind: tuple(columns) for kind, columns in _TRL.items()}


def _row_model(kind: str) -> type[BaseModel]:
    columns = COLUMNS["step_pairs" if kind == "dpo" else kind]  # a step pair is a pair with more columns
    optional = {name: (of | None, None) for name, of in columns.items()}
    fields: _Types = {**optional, **{name: (of, ...) for name, of in _TRL[kind].items()}}
    return create_model(kind, __cls_kwargs__={"strict": True}, **fields)


_ROW_MODELS = {kind: _row_model(kind) for kind in REQUIRED}


def write_parquet(
    path: Path,
    columns: Mapping[str, Any],
    rows: Iterable[Row],
    metadata: Mapping[str, Any],
    *,
    rows_per_group: int = ROWS_PER_BATCH,
    checksums: bool = False,
) -> int:
    """Write rows with these columns (name -> type) to Parquet, atomically; returns the number of rows.

    metadata: stored in the file for `read_metadata`. checksums: of pages, so that readers notice a flipped bit.
    """
    noted = {"cotree": json.dumps(metadata, sort_keys=True)}
    schema = pa.schema([(name, _arrow_type(of)) for name, of in columns.items()], metadata=noted)
    left, written = iter(rows), 0
    with atomic_draft(path) as partial, pq.ParquetWriter(partial, schema, write_page_checksum=checksums) as writer:
        # Row groups of a fixed size, so that they never depend on how rows were made.
        while batch := list(islice(left, rows_per_group)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            written += len(batch)
    return written


def read_columns(path: Path) -> dict[str, list[Any]]:
    """Read the columns used for statistics (numbers and the task) as {name: values}."""
    with pq.ParquetFile(path) as file:
        return dict(file.read(columns=_COUNTED).to_pydict())


def _arrow_type(of: Any) -> pa.DataType:
    """The Arrow type of a Python type; a class becomes a struct of its fields."""
    plain = {str: pa.string(), Literal: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    origin, arguments = get_origin(of) or of, get_args(of)
    if origin in plain:
        return plain[origin]
    if origin in (Annotated, UnionType):  # constrained, or None
        return _arrow_type(arguments[0])
    if origin is list:
        return pa.list_(_arrow_type(arguments[0]))
    fields = get_type_hints(Message if origin is dict else of)
    return pa.struct([(name, _arrow_type(of)) for name, of in fields.items()])


def check_template(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a dataset file was built with the student's tokenizer and chat template.

    Raises:
        UsageError: the file records another template. One without a record (not built by cotree) passes.
    """
    noted = read_metadata(path).get("template")
    if noted is not None and noted != template_hash(tokenizer):
        raise UsageError(
            f"{path} was made for another tokenizer or chat template ({noted}, this student's is "
            f"{template_hash(tokenizer)}); make it again with this student's `tokenizer`"
        )


def kind_of(row: Row) -> str | None:
    """Detect a row's kind (sft, dpo or stepwise) by its columns; None for anything else."""
    return next((kind for kind, needed in REQUIRED.items() if all(name in row for name in needed)), None)


def check_file(path: Path) -> tuple[str, int]:
    """Validate every row of a dataset file; returns its kind and the number of rows.

    Raises:
        UsageError: gives row and column of the first faults, and their number.
    """
    kind, count, faults = "", 0, list[str]()
    for count, row in enumerate(read_rows(path), 1):
        kind = kind or kind_of(row) or ""
        if not kind:
            types = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in REQUIRED.items())
            raise UsageError(f"{path}: row 0 has the columns of no type that is trained on ({types})")
        faults += [f"row {count - 1}, {fault}" for fault in faults_of(row, kind) or turn_faults(row, kind)]
    if not count:
        raise UsageError(f"{path} has no rows")
    if faults:
        more = f"; and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise UsageError(f"{path}: {'; '.join(faults[:_FAULTS_SHOWN])}{more}")
    return kind, count


def faults_of(row: Row, kind: str) -> list[str]:
    """Validate a row of a kind (sft, dpo or stepwise); returns one line per fault with the column's name."""
    return [
        f"column {'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}, "
        f"not {str(fault['input'])[:60]!a}"
        for fault in _pydantic_errors(row, kind)
    ]


def turn_faults(row: Row, kind: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Find texts of a valid row that contain a turn token (`<|im_end|>`, ...), which would be tokenized as that token.

    tokenizer: the student's; also checks its own special tokens.
    """
    special, faults = special_words(tokenizer), []
    for column in REQUIRED[kind]:
        values = row[column] if isinstance(row[column], list) else [row[column]]
        for at, value in enumerate(values):
            if found := special.search(str(value["content"] if isinstance(value, dict) else value)):
                faults.append(f"column {column}.{at}: the text names the special token {found[0]}; take it out")
    return faults


def optional_columns(row: Row, kind: str) -> Row:
    """A row's optional columns for its kind (sft or dpo), without those of a wrong type."""
    names = COLUMNS[kind].keys() - REQUIRED[kind] - {str(fault["loc"][0]) for fault in _pydantic_errors(row, kind)}
    return {name: value for name, value in row.items() if name in names and value is not None}


def _pydantic_errors(row: Row, kind: str) -> list[ErrorDetails]:
    try:
        _ROW_MODELS[kind].model_validate(row)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []
