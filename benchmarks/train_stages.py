"""How long the training stages of a finished run take: its rows packed by tree, and a row at a time.

    python -m benchmarks.train_stages runs/laptop

Trains the run's SFT and DPO students again, into a temporary folder, in turns. A row at a time is plain computation of
a chain, and of a pair the two chains after their shared prompt. The weights are the same up to rounding, which the last
loss shows. Everything that a stage does is in its time: the reference, the optimizer, checkpoints.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cotree.experiment.recipe import load_recipe
from cotree.train.dpo import train_dpo
from cotree.train.sft import train_sft


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    run: Path = parser.parse_args().run
    recipe = load_recipe(run / "recipe.yaml", [])
    start, after = run / "checkpoints" / "base" / "model", run / "checkpoints" / "sft" / "model"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {run}, seed {recipe.seed}", flush=True)

    train: Any
    for stage, train, student, settings in (
        ("sft", train_sft, start, recipe.train.sft), ("dpo", train_dpo, after, recipe.train.dpo)
    ):  # fmt: skip
        data = run / "data" / stage / "train.parquet"
        for name, size in (("a row at a time", 1), (f"packs of {settings.pack_tokens}", settings.pack_tokens)):
            packed = settings.model_copy(update={"pack_tokens": size})
            with tempfile.TemporaryDirectory() as folder:
                found = train(data, student, Path(folder) / "out", packed, recipe.seed, recipe.build.max_tokens)
            loss = found.final["loss"]
            print(
                f"{stage}, {name}: {found.seconds:.0f} s, {found.steps} steps, {found.packed} tokens computed for "
                f"{found.tokens}, last loss {loss:.5f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
