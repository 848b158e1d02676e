"""Tree attention (each token attends to its ancestors only) for transformers' attention interface.

Invariant: token q attends to token k exactly if k is an ancestor of q or q itself, which in depth-first order is
`k <= q < ends[k]`.

On CUDA it uses torch's flex_attention, which skips masked blocks but has no backward pass on CPU. Elsewhere it computes
dense attention of each run of the forest to its ancestors, and no masked scores.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ATTENTION = "cotree_forest"
FLEX_BLOCK = 128


class Layout:
    """The attention structure of a row of tokens in depth-first order. (No dataclass: FSDP would flatten it.)

    Attributes:
        ends: (tokens,) the end of each token's subtree.
        runs: the consecutive runs of the row: for each, the indices that its last token attends to, and the number of
            its own tokens among them.
    """

    def __init__(self, ends: Tensor, runs: list[tuple[list[int], int]]) -> None:
        self.ends = ends
        self.runs = runs

    @cached_property
    def segments(self) -> tuple[list[int], list[list[int]]]:
        """Split the row into segments so that each run's ancestors are whole segments; returns the segments' lengths,
        and for each run the segments that it attends to, its own included."""
        cuts = {0, len(self.ends)}
        for path, own in self.runs:
            # Where the run starts, and where the last of its ancestors ends.
            cuts |= {path[-own], path[-own - 1] + 1} if own < len(path) else {path[-own]}
        starts = {start: segment for segment, start in enumerate(sorted(cuts))}
        visible = [[starts[place] for place in path if place in starts] for path, _ in self.runs]
        return [stop - start for start, stop in pairwise(sorted(cuts))], visible

    @cached_property
    def flex_mask(self) -> BlockMask:
        """The layout as flex_attention's BlockMask, without evaluating every pair of tokens.

        A block of queries attends to tokens of an earlier block of keys if the last of their `ends` lies beyond its
        first query, and to all of them if the first of their `ends` lies beyond its last. Its own block is causal.
        """
        from torch.nn.attention.flex_attention import BlockMask

        ends, tokens = self.ends, len(self.ends)
        blocks = F.pad(ends, (0, -tokens % FLEX_BLOCK)).view(-1, FLEX_BLOCK)
        keys = torch.arange(len(blocks), device=ends.device) * FLEX_BLOCK
        queries = keys[:, None]
        full = (keys < queries) & (blocks.amin(1) >= queries + FLEX_BLOCK)
        partial = (keys <= queries) & (blocks.amax(1) > queries) & ~full

        def is_visible(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends[key])

        return BlockMask.from_kv_blocks(
            *_block_format(partial), *_block_format(full), FLEX_BLOCK, is_visible, seq_lengths=(tokens, tokens)
        )


def _block_format(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """flex_attention's block format: the number of key blocks per query block, and the key blocks' indices first.

    Args:
        blocks: (query blocks, key blocks), whether the first attends to the second.
    """
    numbers = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], numbers.to(torch.int32)[None, None]


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    layout: Layout,
    scaling: float | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """Attention of each token of a row to its ancestors.

    Args:
        module: the attention layer (unused).
        query, key, value: (1, heads, tokens, head_dim); key and value may have fewer heads (grouped-query attention).
        layout: of the row.
        scaling: of the scores; None: 1 / sqrt(head_dim).

    Returns:
        (1, tokens, heads, head_dim), and None for the attention weights.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves norms of q and k in float32
    attend = flex_attention if value.is_cuda else dense_attention
    return attend(query, key, value, layout=layout, scaling=scaling), None


def dense_attention(query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scaling: float | None) -> Tensor:
    """`forest_attention` with torch's dense attention, one run at a time."""
    # split, not slices: the backward of each slice would allocate and add a whole row.
    segments, visible = layout.segments
    keys, values = (torch.split(each, segments, dim=2) for each in (key, value))
    outputs = []
    for q, seen in zip(torch.split(query, [own for _, own in layout.runs], dim=2), visible, strict=True):
        k, v = (torch.cat([each[at] for at in seen], dim=2) for each in (keys, values))
        above = k.shape[2] - q.shape[2]  # a run attends to all its ancestors, and causally to itself
        mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(above) if above else None
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        # The output's memory layout is token-major, so transposing before cat avoids a copy.
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def flex_attention(query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scaling: float | None) -> Tensor:
    """`forest_attention` with torch's flex_attention."""
    attend, usual = _torch_flex_attention(query.is_cuda), query.shape[-1] ** -0.5
    if scaling is not None and not math.isclose(scaling, usual):
        query = query * (scaling / usual)
    # Passed as `scale` it would become dynamic in the graph, but the kernels need a constant.
    output: Tensor = attend(query, key, value, block_mask=layout.flex_mask, enable_gqa=True)
    return output.transpose(1, 2)


@cache
def _torch_flex_attention(compiled: bool) -> Any:
    """torch's flex_attention, compiled on CUDA, because eager mode computes all masked scores too.

    The number of tokens is dynamic, so a few graphs serve all packs of a model. With `fullgraph`, too many
    recompilations raise an error instead of falling back to eager mode with a warning.
    """
    from torch.nn.attention import flex_attention as torch_flex

    if not compiled:
        return torch_flex.flex_attention
    return torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True)
