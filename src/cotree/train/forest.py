"""Chains that share a beginning, laid out in one row in which every shared token stands once.

Invariant: a chain in a forest gets the log-probabilities that it would get alone. Sharing is by token ids of whole
chains, so it never depends on where thoughts begin or end; a token attends to its ancestors and itself only, and its
position is its depth. There is no padding, and logits exist only where a token is scored: half of a small model's cost
on a CPU is its vocabulary.

In the order of their ids every chain goes on where it leaves the one before, so the row is simply the new tokens of
one chain after the other (its **run**), the trie in depth-first order: the tokens below token k are those from k to
`ends[k]`.
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
    """The inputs of some chains as one row of tokens.

    Attributes:
        ids: (tokens,) the row. The last token of a chain is only ever predicted: it is no input by itself.
        positions: (tokens,) depth of each token.
        paths: for each chain, in the order given, where in the row its inputs are.
        layout: who may attend to whom.
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

    Every (tokens so far, next token) that several chains score is computed once and given to each of them, so its
    gradient is the sum of theirs.

    Args:
        model: a causal language model of a supported family, loaded with `attn_implementation=ATTENTION`; may be
            wrapped (DDP, FSDP, autocast), its forward is called as a whole.
        chains: at least one.

    Returns:
        One (scored tokens,) tensor a chain, float32 or better.
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
    # squeeze, not [0]: the backward of an index fills a second tensor as large as the logits.
    logps = token_logps(logits.squeeze(0), targets.to(device))[places.to(device)]
    return list(torch.split(logps, [len(chain.ids) - chain.first for chain in chains]))


def multiplicities(chains: Sequence[Scored]) -> list[Tensor]:
    """For each scored token of each chain, how many of the chains score the same token after the same tokens."""
    *_, places = _distinct_targets(Forest([chain.ids for chain in chains]), chains)
    return list(torch.split(places.bincount()[places], [len(chain.ids) - chain.first for chain in chains]))


def _distinct_targets(forest: Forest, chains: Sequence[Scored]) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct pairs of a context and a token that is scored after it.

    Returns:
        The contexts' places in the row and the tokens' ids, both (pairs,); and for each scored token of all chains, in
        their order, the number of its pair.
    """
    scored_paths = [path[chain.first - 1 :] for path, chain in zip(forest.paths, chains, strict=True)]
    contexts = torch.tensor([place for path in scored_paths for place in path])
    targets = torch.tensor([token for chain in chains for token in chain.ids[chain.first :]])
    width = int(targets.max()) + 1
    pairs, places = torch.unique(contexts * width + targets, return_inverse=True)
    return pairs // width, pairs % width, places


def packs(rows: Sequence[EncodedRow], cap: int) -> list[list[EncodedRow]]:
    """Deal rows to packs whose forests have at most `cap` tokens; a row that is larger is a pack by itself.

    Rows go in the order of their ids, so a tree that does not fit is cut along its subtrees, and only the ancestors of
    the cut are computed twice.
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
    """Tokens in the forest of some rows, the last one of each chain included."""
    chains: list[list[int]] = []
    return sum(_insert_chains(chains, row) for row in rows)


def _insert_chains(chains: list[list[int]], row: EncodedChain | EncodedPair) -> int:
    """Insert a row's chains into a sorted list of chains; returns how many tokens they add to its forest."""
    added = 0
    for chain in row.sequences:
        at = bisect(chains, chain)
        # In sorted order a chain shares its longest beginning with a neighbour.
        neighbours = chains[max(at - 1, 0) : at + 1]
        added += len(chain) - max((prefix_tokens(chain, other) for other in neighbours), default=0)
        chains.insert(at, chain)
    return added
