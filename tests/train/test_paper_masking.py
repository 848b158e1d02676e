"""The measurement of what masking changes in the sigmoid margin: only rounding."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper_masking import PRECISIONS, measured
from tests.support.tiny_student import dpo_row
from transformers import PreTrainedTokenizerFast

from cotree.models.encode import encode_dpo


def test_masking_changes_rounding_alone_and_nothing_where_shared_tokens_are_computed_once(
    student: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = encode_dpo(tokenizer, [dpo_row(index) for index in range(3)], 512).rows
    assert all(pair.prefix for pair in pairs)
    found = measured(student, pairs)
    by = {(row["computed"], row["precision"]): row["gradient"] for row in found["distances"]}
    assert by.keys() == {(computed, precision) for computed in ("packed", "side by side") for precision in PRECISIONS}
    assert by["packed", "fp32"] < 1e-6 and by["side by side", "fp32"] < 1e-5
    assert by["packed", "bf16 autocast"] < 0.1 * found["bf16_to_fp32"]
    assert by["side by side", "bf16 weights"] > 10 * by["side by side", "fp32"]
