"""What masking the shared prefix changes in the sigmoid margin: nothing in exact arithmetic, so this is the rounding.

    python -m benchmarks.paper_masking --run runs/paper-small --student sft@seed=0 --data pairs_longest

The gradient of plain DPO is computed with and without the mask, in fp32, under bf16 autocast, and with the weights in
bf16; packed as cotree trains, where a shared token is computed once and its weights add up to 0, and side by side, as
plain trainers do, where the prefix is computed in each. Writes docs/results/masking.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.paper import OUT
from torch import Tensor

from cotree.base.atomic import write_json
from cotree.base.machine import machine_class
from cotree.experiment.opened import open_run
from cotree.models.encode import EncodedPair, encode_dpo
from cotree.models.tokenizer import load_tokenizer
from cotree.train.dpo import pair_logps
from cotree.train.forest import Scored, forest_logps
from cotree.train.losses import margin_weights
from cotree.train.model import load_model
from cotree.train.settings import DPO

PRECISIONS = ("fp32", "bf16 autocast", "bf16 weights")


def measured(student: Path, pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    """The distances between gradients and margins with and without the mask, by computation and precision."""
    rows, exact = [], None
    between = 0.0
    for precision in PRECISIONS:
        for computed in ("packed", "side by side"):
            packed = computed == "packed"
            plain, margins = gradient(student, pairs, precision, masked=False, packed=packed)
            masked, masked_margins = gradient(student, pairs, precision, masked=True, packed=packed)
            distance = float((masked - plain).norm() / plain.norm())
            change = float((masked_margins - margins).abs().max())
            rows.append({"computed": computed, "precision": precision, "gradient": distance, "margin": change})
            if precision == "fp32" and exact is None:
                exact = plain
            elif precision == "bf16 autocast" and computed == "packed" and exact is not None:
                between = float((plain - exact).norm() / exact.norm())
    return {"distances": rows, "bf16_to_fp32": between}


def gradient(
    student: Path, pairs: Sequence[EncodedPair], precision: str, *, masked: bool, packed: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of plain DPO at its first step, all weights in a row, and beta times each pair's log-ratio."""
    settings = DPO(label_smoothing=0, alpha=0, mask_prefix=masked)
    model = load_model(student)
    if precision == "bf16 weights":
        model = model.bfloat16()
    margins = []
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
        for pair in pairs:
            if packed:
                _, (sums,) = pair_logps(model, [pair], settings, sft=False)
            else:
                sums = _side_by_side(model, pair, settings)
            margin = settings.beta * (sums[0] - sums[1])
            margins.append(margin.detach())
            # The reference is the student itself, so that the margin is 0 and its gradient is not.
            loss = -F.logsigmoid(margin - margin.detach()) / len(pairs)
            torch.autograd.backward(loss)
    grads = [each.grad.float().flatten() for each in model.parameters() if each.grad is not None]
    return torch.cat(grads), torch.stack(margins)


def _side_by_side(model: Any, pair: EncodedPair, settings: DPO) -> Tensor:
    """The sums of chosen and rejected in the margin, each from a forward pass of its own."""
    sums = []
    for side, other in ((pair.chosen, pair.rejected), (pair.rejected, pair.chosen)):
        (logps,) = forest_logps(model, [Scored(pair.prompt + side, len(pair.prompt))])
        weights = margin_weights(len(side), len(other), pair.prefix, settings)
        sums.append((logps * weights.to(logps)).sum())
    return torch.stack(sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/paper-small")
    parser.add_argument("--student", default="sft@seed=0")
    parser.add_argument("--data", default="pairs_longest")
    parser.add_argument("--pairs", type=int, default=8, help="the first so many")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    run = open_run(options.run)
    student = run.student(options.student)
    pairs = encode_dpo(load_tokenizer(student), run.dataset(options.data), 2**20).rows[: options.pairs]
    tokens = [2 * pair.prefix for pair in pairs], [len(pair.chosen) + len(pair.rejected) for pair in pairs]
    about = {"date": datetime.now(UTC).date().isoformat(), "machine": machine_class(), "run": options.data}
    about |= {"model": options.student, "pairs": len(pairs), "shared": sum(tokens[0]) / sum(tokens[1])}
    result = about | measured(student, pairs)
    write_json(options.out / "masking.json", result)
    for row in result["distances"]:
        print(f"{row['computed']:14} {row['precision']:14} gradient {row['gradient']:.1e}  margin {row['margin']:.1e}")


if __name__ == "__main__":
    main()
