"""Out of memory in one line: where it happened, and which setting to lower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from cotree.base.errors import CotreeError
from cotree.models.encode import EncodedChain, EncodedPair
from cotree.train.forest import forest_tokens


@contextmanager
def explain_out_of_memory(where: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that fails in the block into a CotreeError: "out of memory", where, and what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise CotreeError(f"out of memory {where()}") from error


def pack_out_of_memory(pack: Sequence[EncodedChain | EncodedPair], where: str, pack_tokens: int) -> str:
    """Where a pack of rows did not fit into memory, and what to lower."""
    lower = f"pack_tokens (now {pack_tokens})" if len(pack) > 1 else "max_tokens"
    size = f"a pack of {len(pack)} rows and {forest_tokens(pack)} tokens"
    return f"{where}, in {size}: lower {lower}, or set gradient_checkpointing: true"
