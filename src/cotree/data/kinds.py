"""The columns of each kind of row: to write them as Parquet, and to check a file and name each fault.

Invariant: the same rows give the same bytes; a Parquet file carries the hash of the chat template whose tokens were
counted, so that a trainer can refuse another.
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
# No half of a surrogate pair either, which JSON can hold and no tokenizer reads.
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Count = Annotated[int, Field(ge=0)]


class Message(BaseModel, strict=True):
    """One message of a conversation, as every trainer takes it."""

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
_Types = dict[str, Any]  # by the names of columns
# TRL's types: conversational prompt-completion and preference, and stepwise supervision. A file must have these columns
# to be of a kind, whoever wrote it.
_TRL: Mapping[str, _Types] = {
    "sft": {"prompt": _Prompt, "completion": _Reply},
    "dpo": {"prompt": _Prompt, "chosen": _Reply, "rejected": _Reply},
    "stepwise": {"prompt": Text, "completions": _Steps, "labels": Annotated[list[bool], _OneAStep]},
}
# What goes along with them; a file that is not ours may have any of these columns or none.
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
# The columns that count the tokens of a row's completions.
COMPLETION_TOKENS = ("length_tokens", "chosen_tokens", "rejected_tokens")
# The columns that are counted or averaged.
_COUNTED = [*COMPLETION_TOKENS, "task", "prefix_tokens", "value", "pass_rate", "reward"]
REQUIRED = {kind: tuple(columns) for kind, columns in _TRL.items()}


def _row_model(kind: str) -> type[BaseModel]:
    columns = COLUMNS["step_pairs" if kind == "dpo" else kind]  # a step pair is a pair with more columns
    optional = {name: (of | None, None) for name, of in columns.items()}
    fields: _Types = {**optional, **{name: (of, ...) for name, of in _TRL[kind].items()}}
    return create_model(kind, __cls_kwargs__={"strict": True}, **fields)


_ROW_MODELS = {kind: _row_model(kind) for kind in REQUIRED}


def write_parquet(path: Path, columns: Mapping[str, Any], rows: Iterable[Row], metadata: Mapping[str, Any]) -> int:
    """Write rows of these columns (name -> type), whole or not at all; returns how many.

    metadata: what `read_metadata` finds in the file.
    """
    noted = {"cotree": json.dumps(metadata, sort_keys=True)}
    schema = pa.schema([(name, _arrow_type(of)) for name, of in columns.items()], metadata=noted)
    left, written = iter(rows), 0
    with atomic_draft(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        # Row groups of a fixed size, so that they never depend on how rows were made.
        while batch := list(islice(left, ROWS_PER_BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            written += len(batch)
    return written


def read_columns(path: Path) -> dict[str, list[Any]]:
    """The columns of a written dataset that are counted or averaged (numbers, and the task), by their names."""
    with pq.ParquetFile(path) as file:
        return dict(file.read(columns=_COUNTED).to_pydict())


def _arrow_type(of: Any) -> pa.DataType:
    """The Arrow type of a column's type; of a class, a struct of its fields."""
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
    """Refuse a dataset file whose tokens were counted with another tokenizer or chat template than the student's.

    Raises:
        UsageError: the file names another template. One that names none (not built by cotree) passes.
    """
    noted = read_metadata(path).get("template")
    if noted is not None and noted != template_hash(tokenizer):
        raise UsageError(
            f"{path} was made for another tokenizer or chat template ({noted}, this student's is "
            f"{template_hash(tokenizer)}); make it again with this student's `tokenizer`"
        )


def kind_of(row: Row) -> str | None:
    """sft, dpo or stepwise by the columns that a row has; None for anything else."""
    return next((kind for kind, needed in REQUIRED.items() if all(name in row for name in needed)), None)


def check_file(path: Path) -> tuple[str, int]:
    """Check every row of a dataset file; returns its kind and the number of rows.

    Raises:
        UsageError: names row and column of the first faults, and how many there are.
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
    """What is wrong with a row of a kind (sft, dpo or stepwise), a line for each fault with the column's name."""
    return [
        f"column {'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}, "
        f"not {str(fault['input'])[:60]!a}"
        for fault in _pydantic_errors(row, kind)
    ]


def turn_faults(row: Row, kind: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The texts of a faultless row that name a token which opens or ends a turn: training would read it as the token.

    tokenizer: of the student, whose own special tokens are looked for too.
    """
    special, faults = special_words(tokenizer), []
    for column in REQUIRED[kind]:
        values = row[column] if isinstance(row[column], list) else [row[column]]
        for at, value in enumerate(values):
            if found := special.search(str(value["content"] if isinstance(value, dict) else value)):
                faults.append(f"column {column}.{at}: the text names the special token {found[0]}; take it out")
    return faults


def optional_columns(row: Row, kind: str) -> Row:
    """The optional columns of a kind (sft or dpo) that any row has, without those of a wrong type."""
    names = COLUMNS[kind].keys() - REQUIRED[kind] - {str(fault["loc"][0]) for fault in _pydantic_errors(row, kind)}
    return {name: value for name, value in row.items() if name in names and value is not None}


def _pydantic_errors(row: Row, kind: str) -> list[ErrorDetails]:
    try:
        _ROW_MODELS[kind].model_validate(row)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []
