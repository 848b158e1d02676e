"""Optimizer steps: which rows each has, fixed by the seed, and how much each of their tokens counts in the SFT loss."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cotree.models.encode import EncodedChain, EncodedPair
from cotree.train.forest import Scored, multiplicities


@dataclass(frozen=True)
class Step:
    """What the loss of one pack needs to know of its whole step.

    Attributes:
        rows: how many the step has.
        weights: of each row, by its id(), how much each completion token counts in the SFT loss.
        tokens: the sum of all these weights.
    """

    rows: int
    weights: dict[int, Tensor]
    tokens: float


def fixed_steps(trees: Sequence[Hashable], batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """Row numbers of every optimizer step of a run: a new order each epoch, the last batch of an epoch may be short.

    Rows of one tree follow each other, so that a step has as much to share as it can. A fractional number of epochs
    rounds up to whole steps.

    Args:
        trees: of each row the tree that it is from; rows of one question are one tree.
        batch_size: rows of a step.
        epochs: how often each row is trained on.
        seed: fixes the order of the trees, and of the rows in each.
    """
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[int]] = []
    for _ in range(math.ceil(epochs)):
        rows: dict[Hashable, list[int]] = {}
        for row in torch.randperm(len(trees), generator=generator).tolist():
            rows.setdefault(trees[row], []).append(row)
        by_tree = list(rows.values())
        order = [row for tree in torch.randperm(len(by_tree), generator=generator) for row in by_tree[tree]]
        steps += [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return steps[: math.ceil(epochs * math.ceil(len(trees) / batch_size))]


def whole_step(rows: Sequence[EncodedChain | EncodedPair], scope: str) -> Step:
    """The step of these rows, whose tokens count by `scope` (`sft_weights`)."""
    weights = sft_weights(rows, scope)
    by_row = {id(row): each for row, each in zip(rows, weights, strict=True)}
    return Step(len(rows), by_row, sum(float(each.sum()) for each in weights))


def sft_weights(rows: Sequence[EncodedChain | EncodedPair], scope: str) -> list[Tensor]:
    """How much each token of each row's (chosen) completion counts in the SFT loss of a step of these rows.

    Args:
        rows: all of the step.
        scope: `full` is 1 everywhere, `suffix` 0 in the prefix that both sides of a pair share, `dedup` 1 / (rows of
            the step that have this very token after the same tokens).
    """
    if scope == "dedup":
        counts = multiplicities([Scored(row.sequences[0], len(row.prompt)) for row in rows])
        return [1 / count.double() for count in counts]
    weights = [torch.ones(len(row.sequences[0]) - len(row.prompt), dtype=torch.float64) for row in rows]
    for row, each in zip(rows, weights, strict=True):
        if scope == "suffix" and isinstance(row, EncodedPair):
            each[: row.prefix] = 0
    return weights
