"""Rows of a dataset file as the token ids that a student is trained on; what it cannot be trained on is refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.rows import read_rows
from cotree.data.kinds import check_template, faults_of, kind_of
from cotree.models.encode import Encoded, EncodedChain, EncodedPair, encode_dpo, encode_sft
from cotree.train.methods import method_of
from cotree.train.settings import Optimizer


def encode_file(path: Path, tokenizer: Any, settings: Optimizer) -> Encoded[Any]:
    """The rows of a dataset file as these settings train on them: chains for SFT, pairs for DPO.

    Raises:
        UsageError: the file is unreadable, empty, of another kind or built for another chat template, a row is not
            what its columns promise, or none fits into `max_tokens`.
    """
    kind = method_of(settings).rows
    rows = list(read_rows(path))
    if not rows:
        raise UsageError(f"{path} has no rows")
    if kind_of(rows[0]) != kind:
        raise UsageError(f"{path} has no {kind} rows: their columns are {', '.join(rows[0])}")
    for index, row in enumerate(rows):
        if faults := faults_of(row, kind):
            raise UsageError(f"{path}: row {index}, {faults[0]} (`cotree check-data {path}` finds all faults)")
    check_template(path, tokenizer)
    limit = settings.max_tokens or sys.maxsize
    encoded: Encoded[Any] = (encode_sft if kind == "sft" else encode_dpo)(tokenizer, rows, limit)
    if not encoded.rows:
        raise UsageError(f"all {encoded.too_long} rows are over {settings.max_tokens} tokens: raise max_tokens")
    return encoded


def check_fits(rows: Sequence[EncodedChain | EncodedPair], config: Any) -> None:
    """Refuse tokens and positions that the student of this config does not have.

    Raises:
        UsageError: a token is outside its vocabulary, or a row is longer than its positions.
    """
    largest = max(max(chain) for row in rows for chain in row.sequences)
    if largest >= config.vocab_size:
        raise UsageError(
            f"the rows have token {largest}, the student's vocabulary {config.vocab_size}: is the tokenizer its own?"
        )
    positions = config.max_position_embeddings
    if longer := sum(row.longest_sequence > positions for row in rows):
        raise UsageError(f"{longer} rows are over the student's {positions} positions: set max_tokens={positions}")
