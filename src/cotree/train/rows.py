"""Rows of a dataset file as optimizer steps: token ids, the rows of each step, and how much each token counts.

What a student cannot be trained on is refused.
"""

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
    """The rows of a dataset file as these settings train on them: chains for SFT, pairs for DPO.

    Raises:
        UsageError: the file is unreadable, empty, of another kind or built for another chat template, a row is not
            what its columns promise, or none fits into `max_tokens`.
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


def fixed_steps(rows: Sequence[EncodedChain | EncodedPair], settings: Optimizer, seed: int) -> list[list[int]]:
    """Row numbers of every optimizer step of a run: a new order each epoch, the last batch of an epoch may be short.

    Rows of one prompt follow each other, so that a step has as much to share as it can. A fractional number of epochs
    rounds up to whole steps.

    Args:
        rows: of one epoch.
        settings: have the rows of a step, and the epochs.
        seed: fixes the order of the prompts, and of the rows of each.
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
    """How much each token counts in the SFT loss of a step of these rows: minus the sum of weight * log-probability.

    Args:
        rows: all of the step.
        scope: `full` counts every token of each (chosen) completion, `suffix` none in the prefix that both sides of a
            pair share, `dedup` each 1 / (rows of the step that have this very token after the same tokens) times.
        norm: `token`: the mean over all that counts in the step, so long chains weigh more (TRL's `sft` term when the
            batch is one micro-batch). `pair`: the mean over rows of their own means (LLaMA-Factory, OpenRLHF).

    Returns:
        For each row (tokens of its completion,), float64.
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
    # A total is 0 where chosen has nothing after the prefix.
    return [count / (total or 1.0) / len(rows) for count, total in zip(counts, totals, strict=True)]
