"""Token sequences laid end to end in one row, and the attention that keeps them apart.

Invariant: a sequence in a layout gets the log-probabilities that it would get alone. There is no padding, and logits
exist only where a token is scored; both matter most on a CPU, where half of a small model's cost is its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotree.train.losses import token_logps

ATTENTION = "cotree_segments"


@dataclass(frozen=True)
class Scored:
    """A sequence of token ids of which `ids[first:]` are scored; 1 <= first < len(ids)."""

    ids: list[int]
    first: int

    @property
    def count(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first


def sequence_logps(model: nn.Module, sequences: Sequence[Scored]) -> list[Tensor]:
    """Log-probabilities of the scored tokens of each sequence, from one forward pass of the (wrapped) model.

    The last token of a sequence is only ever predicted, so it is no input.

    Args:
        model: a causal language model of a supported family, loaded with `attn_implementation=ATTENTION`; may be
            wrapped (DDP, FSDP, autocast), its forward is called as a whole.
        sequences: at least one.

    Returns:
        One (count,) tensor a sequence, float32 or better.
    """
    device = next(model.parameters()).device
    lengths = [len(sequence.ids) - 1 for sequence in sequences]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    scored = [
        torch.arange(start + sequence.first - 1, start + length)
        for start, length, sequence in zip(starts, lengths, sequences, strict=False)
    ]
    targets = torch.tensor([token for sequence in sequences for token in sequence.ids[sequence.first :]])
    logits = model(
        input_ids=torch.tensor([[token for sequence in sequences for token in sequence.ids[:-1]]], device=device),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        logits_to_keep=torch.cat(scored).to(device),
        use_cache=False,
        segment_lengths=lengths,
    ).logits
    logps = token_logps(logits[0], targets.to(device))
    return list(torch.split(logps, [sequence.count for sequence in sequences]))


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segment_lengths: list[int] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of one row, in transformers' attention interface.

    Args:
        module: the attention layer (unused).
        query, key, value: (1, heads, tokens, head_dim); key and value may have fewer heads (grouped-query attention).
        attention_mask: None; the segments say it all.
        scaling: of the scores; None is 1 / sqrt(head_dim).
        segment_lengths: lengths that add up to tokens.

    Returns:
        (1, tokens, heads, head_dim), and no attention weights.
    """
    if segment_lengths is None or attention_mask is not None:
        raise ValueError(f"{ATTENTION} attention needs segment_lengths and takes no mask: use layout.sequence_logps")
    # split, not slices: the backward of a slice fills and adds a whole row for every segment.
    parts = zip(*(torch.split(each, segment_lengths, dim=2) for each in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=1), None
