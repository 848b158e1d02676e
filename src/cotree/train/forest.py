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
from cotree.train.attention import Backend, Layout
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
        order = sorted(range(len(chains)), key=lambda index: chains[index])
        row: list[int] = []
        positions: list[Tensor] = []
        places: dict[int, Tensor] = {}
        ends = torch.empty(sum(map(len, chains)), dtype=torch.long)
        runs: list[list[tuple[int, int]]] = []
        before: list[int] = []
        path, spans = torch.empty(0, dtype=torch.long), list[tuple[int, int]]()
        for index in order:
            inputs = chains[index][:-1]
            shared, start = prefix_tokens(before, inputs), len(row)
            ends[path[shared:]] = start
            row += inputs[shared:]
            places[index] = path = torch.cat([path[:shared], torch.arange(start, len(row))])
            spans = _first_places(spans, shared)
            if len(row) > start:
                spans.append((start, len(row)))
                runs.append(list(spans))
                positions.append(torch.arange(shared, len(inputs)))
            before = inputs
        ends[path] = len(row)
        self.paths = [places[index] for index in range(len(chains))]
        self.ids = torch.tensor(row, device=device)
        self.positions = torch.cat(positions).to(device)
        self.layout = Layout(ends[: len(row)].to(device), runs)


def _first_places(spans: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The first `count` places of some spans of the row."""
    kept = []
    for start, stop in spans:
        if count > 0:
            kept.append((start, min(stop, start + count)))
        count -= stop - start
    return kept


def forest_logps(model: nn.Module, chains: Sequence[Scored], backend: Backend | None = None) -> list[Tensor]:
    """Log-probabilities of the scored tokens of each chain, from one forward pass of the (wrapped) model.

    Every (tokens so far, next token) that several chains score is computed once and given to each of them, so its
    gradient is the sum of theirs.

    Args:
        model: a causal language model of a supported family, loaded with `attn_implementation=ATTENTION`; may be
            wrapped (DDP, FSDP, autocast), its forward is called as a whole.
        chains: at least one.
        backend: of the attention; by default the fastest on the model's device.

    Returns:
        One (scored tokens,) tensor a chain, float32 or better.
    """
    device = next(model.parameters()).device
    forest = Forest([chain.ids for chain in chains], device)
    forest.layout.backend = backend or ("flex" if device.type == "cuda" else "block")
    contexts, targets, places = _edges(forest, chains)
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
    *_, places = _edges(Forest([chain.ids for chain in chains]), chains)
    return list(torch.split(places.bincount()[places], [len(chain.ids) - chain.first for chain in chains]))


def _edges(forest: Forest, chains: Sequence[Scored]) -> tuple[Tensor, Tensor, Tensor]:
    """The scored (place in the row, next token), each once, and which one each scored token of the chains is."""
    contexts = torch.cat([path[chain.first - 1 :] for path, chain in zip(forest.paths, chains, strict=True)])
    targets = torch.tensor([token for chain in chains for token in chain.ids[chain.first :]])
    width = int(targets.max()) + 1
    edges, places = torch.unique(contexts * width + targets, return_inverse=True)
    return edges // width, edges % width, places


def packs(rows: Sequence[EncodedRow], cap: int) -> list[list[EncodedRow]]:
    """Deal rows to packs whose forests have at most `cap` tokens; a row that is larger is a pack by itself.

    Rows go in the order of their ids, so a tree that does not fit is cut along its subtrees, and only the ancestors of
    the cut are computed twice.
    """
    dealt: list[list[EncodedRow]] = []
    inside: list[list[int]] = []
    size = cap
    for row in sorted(rows, key=lambda row: row.sequences):
        new = _add_row(inside, row)
        if not dealt or size + new > cap:
            dealt.append([])
            inside, size = [], 0
            new = _add_row(inside, row)
        dealt[-1].append(row)
        size += new
    return dealt


def forest_tokens(rows: Sequence[EncodedChain | EncodedPair]) -> int:
    """Tokens in the forest of some rows, the last one of each chain included."""
    inside: list[list[int]] = []
    return sum(_add_row(inside, row) for row in rows)


def _add_row(inside: list[list[int]], row: EncodedChain | EncodedPair) -> int:
    """Add a row's chains to the sorted chains of a pack; returns how many tokens are new."""
    new = 0
    for chain in row.sequences:
        at = bisect(inside, chain)
        new += len(chain) - max((prefix_tokens(chain, other) for other in inside[max(at - 1, 0) : at + 1]), default=0)
        inside.insert(at, chain)
    return new
