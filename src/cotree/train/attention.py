"""Attention to ancestors only, in transformers' attention interface, in three implementations.

Invariant: in all three token q attends to token k exactly if k is an ancestor of q or q itself, which in depth-first
order is `k <= q < ends[k]`.

- `block`: dense attention for each run of the forest over its ancestors' slices. The fastest on CPU, and the fallback.
- `sdpa`: one call with a (tokens, tokens) mask: computes what the mask then hides.
- `flex`: torch's flex_attention, which skips hidden blocks. Used on CUDA; has no backward on CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotree.train.recompute import recomputed

ATTENTION = "cotree_forest"
Backend = Literal["block", "sdpa", "flex"]


class Layout:
    """Which tokens attend to which in a row of tokens in depth-first order. (No dataclass: FSDP would take it apart.)

    Attributes:
        ends: (tokens,) where the tokens below each one end.
        runs: for each run its ancestors' places as spans of the row, and itself as the last span; in row order.
        backend: how attention is computed.
    """

    def __init__(self, ends: Tensor, runs: list[list[tuple[int, int]]]) -> None:
        self.ends = ends
        self.runs = runs
        self.backend: Backend = "block"

    @cached_property
    def visible(self) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
        """The ancestor test of (batch, head, query, key), as flex_attention calls it."""
        ends = self.ends

        def visible(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends[key])

        return visible

    @cached_property
    def mask(self) -> Tensor:
        """(tokens, tokens) bool."""
        row = torch.arange(len(self.ends), device=self.ends.device)
        return self.visible(None, None, row[:, None], row[None])

    @cached_property
    def blocks(self) -> Any:
        """The mask as flex_attention wants it."""
        from torch.nn.attention.flex_attention import create_block_mask

        tokens = len(self.ends)
        return create_block_mask(self.visible, None, None, tokens, tokens, device=self.ends.device)

    @cached_property
    def pieces(self) -> list[int]:
        """Lengths of the pieces of the row, cut so that every span is a sequence of whole pieces."""
        cuts = sorted({place for spans in self.runs for span in spans for place in span})
        return [stop - start for start, stop in pairwise(cuts)]

    @cached_property
    def blocks_of_runs(self) -> list[tuple[int, list[int], Tensor | None]]:
        """For each run its length, the pieces that it sees, and its additive mask, None where it is simply causal."""
        number = {start: piece for piece, start in enumerate(accumulate(self.pieces, initial=0))}
        found = []
        for spans in self.runs:
            seen = [piece for start, stop in spans for piece in range(number[start], number[stop])]
            start, stop = spans[-1]
            above = sum(last - first for first, last in spans[:-1])
            mask = torch.full((stop - start, above + stop - start), -torch.inf, device=self.ends.device)
            found.append((stop - start, seen, mask.triu(above + 1) if above else None))
        return found


def forest_attention(  # noqa: PLR0917 - transformers passes these by position
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each token of a row to its ancestors.

    Args:
        module: the attention layer (unused).
        query, key, value: (1, heads, tokens, head_dim); key and value may have fewer heads (grouped-query attention).
        attention_mask: None; the layout has the same information.
        scaling: of the scores; None is 1 / sqrt(head_dim).
        layout: of the row.

    Returns:
        (1, tokens, heads, head_dim), and no attention weights.
    """
    if layout is None or attention_mask is not None:
        raise ValueError(f"{ATTENTION} attention needs a layout and takes no mask: use forest.forest_logps")
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves norms of q and k in float32
    if layout.backend == "block":
        return _block(query, key, value, scaling=scaling, layout=layout), None
    elif layout.backend == "sdpa":
        output = _dense(query, key, value, scaling=scaling, mask=layout.mask)
    else:
        output = _flex(query.is_cuda)(query, key, value, block_mask=layout.blocks, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


def _block(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, layout: Layout) -> Tensor:
    # split, not slices: the backward of a slice fills and adds a whole row for every piece.
    keys, values = (torch.split(each, layout.pieces, dim=2) for each in (key, value))
    queries = torch.split(query, [length for length, *_ in layout.blocks_of_runs], dim=2)
    outputs = []
    for q, (_, seen, mask) in zip(queries, layout.blocks_of_runs, strict=True):
        k, v = (torch.cat([each[piece] for piece in seen], dim=2) for each in (keys, values))
        mask = mask if mask is None else mask.to(q)
        # Attention writes its output token by token, so it is joined without another copy.
        outputs.append(_dense(q, k, v, scaling=scaling, mask=mask).transpose(1, 2))
    pieces = [each.detach() for each in outputs]
    return recomputed(torch.cat(outputs, dim=1), lambda: torch.cat(pieces, dim=1))


def _dense(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


@cache
def _flex(compiled: bool) -> Any:
    """flex_attention: compiled on CUDA, where the eager form would compute every score."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
