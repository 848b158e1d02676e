"""Tokenize a dataset file, check that the student can train on it, split it into optimizer steps, weight tokens."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cotree.base.errors import UsageError
from cotree.base.rows import read_rows
from cotree.data.kinds import check_template, faults_of, kind_of, turn_faults
from cotree.models.encode import Encoded, EncodedChain, EncodedPair, RowError, encode_dpo, encode_sft
from cotree.train.forest import Scored, multiplicities
from cotree.train.settings import Optimizer


def encode_file(path: Path, tokenizer: Any, settings: Optimizer) -> Encoded[Any]:
    """Read and tokenize a dataset file: chains for SFT, pairs for DPO.

    Raises:
        UsageError: the file is unreadable, empty, of another kind or built for another chat template, a row contradicts
            its columns, or none fits into `max_tokens`.
    """
    kind = settings.row_kind
    rows = list(read_rows(path))
    if not rows:
        raise UsageError(f"{path} has no rows")
    if kind_of(rows[0]) != kind:
        raise UsageError(f"{path} has no {kind} rows: their columns are {', '.join(rows[0])}")
    found = ((index, faults_of(row, kind) or turn_faults(row, kind, tokenizer)) for index, row in enumerate(rows))
    if faulty := [(index, faults[0]) for index, faults in found if faults]:
        (index, fault), number = faulty[0], f"{len(faulty)} of {len(rows)} rows are faulty"
        raise UsageError(f"{path}: row {index}, {fault}; {number} (`cotree check-data {path}` finds all faults)")
    check_template(path, tokenizer)
    limit = settings.max_tokens or sys.maxsize
    try:
        encoded: Encoded[Any] = (encode_sft if kind == "sft" else encode_dpo)(tokenizer, rows, limit)
    except RowError as error:
        raise UsageError(f"{path}: {error} (`cotree preview` shows it, `cotree import` leaves such rows out)") from None
    if not encoded.rows:
        raise UsageError(f"all {encoded.too_long} rows are over {settings.max_tokens} tokens: raise max_tokens")
    return encoded


def check_fits(rows: Sequence[EncodedChain | EncodedPair], config: Any) -> None:
    """Check that all rows fit the student's vocabulary and context length.

    Raises:
        UsageError: a token id is outside the vocabulary, or a row exceeds the maximum position.
    """
    largest = max(max(chain) for row in rows for chain in row.sequences)
    if largest >= config.vocab_size:
        raise UsageError(
            f"the rows have token {largest}, the student's vocabulary {config.vocab_size}: is the tokenizer its own?"
        )
    positions = config.max_position_embeddings
    if longer := sum(row.longest_sequence > positions for row in rows):
        raise UsageError(f"{longer} rows are over the student's {positions} positions: set max_tokens={positions}")


def fixed_steps(rows: Sequence[EncodedChain | EncodedPair], settings: Optimizer, seed: int) -> list[list[int]]:
    """The row indices of every optimizer step: shuffled anew each epoch; an epoch's last batch may be short.

    Rows of one prompt stay adjacent, so a step shares as many prefix tokens as possible. Fractional epochs round up to
    whole steps.

    Args:
        rows: of one epoch.
        settings: give batch size and epochs.
        seed: fixes the order of prompts, and of rows within a prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    size, epochs = settings.batch_size, settings.epochs
    steps: list[list[int]] = []
    for _ in range(math.ceil(epochs)):
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for row in torch.randperm(len(rows), generator=generator).tolist():
            by_prompt.setdefault(tuple(rows[row].prompt), []).append(row)
        groups = list(by_prompt.values())
        order = [row for group in torch.randperm(len(groups), generator=generator) for row in groups[group]]
        steps += [order[at : at + size] for at in range(0, len(order), size)]
    return steps[: math.ceil(epochs * math.ceil(len(rows) / size))]


def sft_weights(rows: Sequence[EncodedChain | EncodedPair], scope: str, norm: str = "token") -> list[Tensor]:
    """Token weights such that a step's SFT loss is minus the sum of weight * log-probability.

    Args:
        rows: all rows of the step.
        scope: `full` counts all (chosen) completion tokens, `suffix` only those after the shared prefix of a pair,
            `dedup` each with 1 / (number of the step's rows with the same token in the same context).
        norm: `token`: mean over the step's tokens, so long chains weigh more (TRL's `sft` term when the batch is one
            micro-batch). `pair`: mean over rows of per-row means (LLaMA-Factory, OpenRLHF).

    Returns:
        Per row (completion tokens,), float64.
    """
    if scope == "dedup":
        chains = [Scored(row.sequences[0], len(row.prompt)) for row in rows]
        counts = [1 / count.double() for count in multiplicities(chains)]
    else:
        counts = [torch.ones(len(row.sequences[0]) - len(row.prompt), dtype=torch.float64) for row in rows]
    for row, count in zip(rows, counts, strict=True):
        if scope == "suffix" and isinstance(row, EncodedPair):
            count[: row.prefix] = 0
    totals = [float(count.sum()) for count in counts]
    if norm == "token":
        totals = [fmean(totals)] * len(rows)
    # A total is 0 if chosen has no token after the shared prefix.
    return [count / (total or 1.0) / len(rows) for count, total in zip(counts, totals, strict=True)]
