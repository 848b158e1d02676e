"""Prefix-tree packing: chains with common prefixes as one row of tokens that holds each shared token once.

Invariant: a chain in a forest (of prefix trees) gets the log-probabilities that it would get alone. Sharing is by token
ids, independent of thought boundaries; a token attends to its ancestors and itself only, and its position id is its
depth. There is no padding, and logits are computed for scored tokens only: the vocabulary is half of a small model's
cost on a CPU.

Sorted by token ids, each chain shares its longest prefix with the previous one, so the row is the concatenation of each
chain's new tokens (its **run**). This is the trie in depth-first order: the subtree of token k is k to `ends[k]`.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cotree.models.encode import EncodedChain, EncodedPair, EncodedRow, prefix_tokens
from cotree.train.attention import Layout
from cotree.train.losses import token_logps


@dataclass(frozen=True)
class Scored:
    """A chain of token ids of which `ids[first:]` are scored; 1 <= first < len(ids)."""

    ids: list[int]
    first: int


class Forest:
    """Model inputs for several chains, packed in one row.

    Attributes:
        ids: (tokens,) token ids. A chain's last token is only predicted, so it is no input.
        positions: (tokens,) position ids: the depth of each token.
        paths: per chain, in the order given, the indices of its inputs in the row.
        layout: the attention structure.
    """

    def __init__(self, chains: Sequence[list[int]], device: torch.device | None = None) -> None:
        row: list[int] = []
        positions: list[int] = []
        ends = [0] * sum(map(len, chains))
        paths: dict[int, list[int]] = {}
        runs: list[tuple[list[int], int]] = []
        before: list[int] = []
        path: list[int] = []
        for index in sorted(range(len(chains)), key=lambda index: chains[index]):
            inputs = chains[index][:-1]
            shared, start = prefix_tokens(before, inputs), len(row)
            for place in path[shared:]:
                ends[place] = start
            row += inputs[shared:]
            positions += range(shared, len(inputs))
            path = [*path[:shared], *range(start, len(row))]
            paths[index] = path
            if len(row) > start:
                runs.append((path, len(row) - start))
            before = inputs
        for place in path:
            ends[place] = len(row)
        self.paths = [paths[index] for index in range(len(chains))]
        self.ids = torch.tensor(row, device=device)
        self.positions = torch.tensor(positions, device=device)
        self.layout = Layout(torch.tensor(ends[: len(row)], device=device), runs)


def forest_logps(model: nn.Module, chains: Sequence[Scored]) -> list[Tensor]:
    """Log-probabilities of the scored tokens of each chain, from one forward pass of the (wrapped) model.

    A (context, next token) that several chains score is computed once; their gradients add up.

    Args:
        model: a causal language model of a supported family, loaded with `attn_implementation=ATTENTION`; may be
            wrapped (DDP, FSDP, autocast).
        chains: at least one.

    Returns:
        One (scored tokens,) tensor per chain, float32 or better.
    """
    device = next(model.parameters()).device
    forest = Forest([chain.ids for chain in chains], device)
    contexts, targets, places = _distinct_targets(forest, chains)
    logits = model(
        input_ids=forest.ids[None],
        position_ids=forest.positions[None],
        logits_to_keep=contexts.to(device),
        use_cache=False,
        layout=forest.layout,
    ).logits
    # squeeze, not [0]: the backward of indexing allocates a second tensor as large as the logits.
    logps = token_logps(logits.squeeze(0), targets.to(device))[places.to(device)]
    return list(torch.split(logps, [len(chain.ids) - chain.first for chain in chains]))


def multiplicities(chains: Sequence[Scored]) -> list[Tensor]:
    """Per scored token of each chain, the number of chains that score the same token in the same context."""
    *_, places = _distinct_targets(Forest([chain.ids for chain in chains]), chains)
    return list(torch.split(places.bincount()[places], [len(chain.ids) - chain.first for chain in chains]))


def _distinct_targets(forest: Forest, chains: Sequence[Scored]) -> tuple[Tensor, Tensor, Tensor]:
    """Deduplicate the (context, scored token) pairs of all chains.

    Returns:
        The contexts' indices in the row and the token ids, both (pairs,); and for each scored token of all chains, in
        order, the index of its pair.
    """
    scored_paths = [path[chain.first - 1 :] for path, chain in zip(forest.paths, chains, strict=True)]
    contexts = torch.tensor([place for path in scored_paths for place in path])
    targets = torch.tensor([token for chain in chains for token in chain.ids[chain.first :]])
    width = int(targets.max()) + 1
    pairs, places = torch.unique(contexts * width + targets, return_inverse=True)
    return pairs // width, pairs % width, places


def packs(rows: Sequence[EncodedRow], cap: int) -> list[list[EncodedRow]]:
    """Split rows into packs whose forests have at most `cap` tokens; a larger row is a pack by itself.

    Rows are sorted by token ids, so a tree that does not fit is split along its subtrees, and only the ancestors of the
    split are computed twice.
    """
    dealt: list[list[EncodedRow]] = []
    chains: list[list[int]] = []
    size = 0
    for row in sorted(rows, key=lambda row: row.sequences):
        size += _insert_chains(chains, row)
        if not dealt or size > cap:
            dealt.append([])
            chains = []
            size = _insert_chains(chains, row)
        dealt[-1].append(row)
    return dealt


def forest_tokens(rows: Sequence[EncodedChain | EncodedPair]) -> int:
    """The number of tokens in the forest of these rows, including the last token of each chain."""
    chains: list[list[int]] = []
    return sum(_insert_chains(chains, row) for row in rows)


def _insert_chains(chains: list[list[int]], row: EncodedChain | EncodedPair) -> int:
    """Insert a row's chains into a sorted list of chains; returns how many tokens they add to its forest."""
    added = 0
    for chain in row.sequences:
        at = bisect(chains, chain)
        # In sorted order a chain shares its longest prefix with a neighbour.
        neighbours = chains[max(at - 1, 0) : at + 1]
        added += len(chain) - max((prefix_tokens(chain, other) for other in neighbours), default=0)
        chains.insert(at, chain)
    return added
