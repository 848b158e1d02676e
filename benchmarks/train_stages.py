"""How long the students of a finished run take to train: their rows packed by tree, and a row at a time.

    python -m benchmarks.train_stages runs/laptop
    python -m benchmarks.train_stages runs/laptop sft dpo --precision fp32 bf16

Trains the run's students again, into a temporary folder, in turns. A row at a time is plain computation of a chain, and
of a pair the two chains after their shared prompt. The weights are the same up to rounding, which the last loss shows.
Everything that training does is in its time: the reference, the optimizer, checkpoints.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from cotree.base.run_folder import RunFolder
from cotree.experiment.recipe import load_recipe
from cotree.train.run import train
from cotree.train.student import student_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("students", nargs="*", help="all by default")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    arguments = parser.parse_args()
    recipe, run = load_recipe(arguments.run), RunFolder(arguments.run)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {arguments.run}", flush=True)
    for node in recipe.of_kind("students"):
        if arguments.students and node.name not in arguments.students:
            continue
        student, settings = node.settings, node.settings.training
        if student.parent in recipe.models:
            start = student_folder(str(recipe.models[student.parent].weights))
        else:
            start = run.node(f"students/{student.parent}").path / "model"
        data = run.node(f"datasets/{student.data}").path / "train.parquet"
        for precision in arguments.precision:
            for name, size in (("a row at a time", 1), (f"packs of {settings.pack_tokens}", settings.pack_tokens)):
                changed = settings.model_copy(update={"pack_tokens": size, "precision": precision})
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "out"
                    found = train(student.method, data, start, out, settings=changed, seed=node.seed)
                print(
                    f"{node.name}, {precision}, {name}: {found.seconds:.0f} s, {found.steps} steps, {found.packed} "
                    f"tokens computed for {found.tokens}, last loss {found.final['loss']:.5f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
