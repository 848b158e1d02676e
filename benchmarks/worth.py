"""Is the tree worth its tokens? MCTS with and without reflection beside best-of-n, each tuned on dev questions.

    python -m benchmarks.worth                     the embedded model, half an hour on two cores
    python -m benchmarks.worth --questions 4 --temperatures 0.7     a few minutes

Each method gets the same grid of temperatures on dev questions and is reported, at its own best, on others; best-of-n
gets as many generated tokens for a question as the tree it stands beside. Writes benchmarks/out/worth.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cotree.experiment.recipe import load_recipe
from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.report.table import comparison_lines
from cotree.search.baselines import compare
from cotree.search.driver import Grower
from cotree.search.store import TreeStore
from cotree.tasks import Question, Split, Task, task

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "out" / "worth.json"
# What is tuned for: a pair needs both kinds of chains.
GOAL = "pairs_per_question"


async def both(
    endpoints: dict[str, Endpoint], recipe: Any, questions: list[tuple[Task, Question]], folder: Path, **changes: Any
) -> tuple[dict[str, object], dict[str, object]]:
    """The row of the search under these settings, and that of best-of-n at its tokens."""
    settings = recipe.search.model_copy(update=changes)
    with TreeStore(folder / "trees.db") as store:
        grower = Grower(store, endpoints, recipe.roles, settings, recipe.seed)
        await grower.grow_all(questions)
        mcts, best_of_n = await compare(grower, questions, lambda *_: None)
        return mcts, best_of_n


def drawn(names: list[str], split: Split, count: int) -> list[tuple[Task, Question]]:
    return [(task(name), question) for name in names for question in task(name).questions(split, count)]


async def measure(count: int, dev: int, temperatures: list[float], seed: int) -> dict[str, Any]:
    recipe = load_recipe(ROOT / "recipes" / "laptop.yaml", [f"seed={seed}"])
    names = list(recipe.tasks.train)
    methods = {"mcts": 0, "mcts with reflection": recipe.search.max_reflections or 1}
    result: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "seed": seed, "tuned": {}, "reported": {}}
    async with open_endpoints(recipe.used_models(), widest=recipe.search.widest) as endpoints:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            grid: dict[tuple[str, float], tuple[dict[str, object], dict[str, object]]] = {}
            for name, reflections in methods.items():
                for temperature in temperatures:
                    grid[name, temperature] = await both(
                        endpoints,
                        recipe,
                        drawn(names, "dev", dev),
                        place,
                        temperature=temperature,
                        max_reflections=reflections,
                    )
                    print(f"dev  {name}  temperature {temperature}: {_pairs(grid[name, temperature][0])}", flush=True)
            for name, reflections in methods.items():
                ours = max(temperatures, key=lambda t: float(str(grid[name, t][0][GOAL])))
                theirs = max(temperatures, key=lambda t: float(str(grid[name, t][1][GOAL])))
                result["tuned"][name] = {"mcts": ours, "best_of_n": theirs}
                rows = []
                for side, temperature in enumerate((ours, theirs)):
                    found = await both(
                        endpoints,
                        recipe,
                        drawn(names, "train", count),
                        place,
                        temperature=temperature,
                        max_reflections=reflections,
                    )
                    rows.append(found[side])
                result["reported"][name] = rows
                print(f"\n{name} at temperature {ours}, best-of-n at {theirs}, {count} questions a task:")
                print("\n".join(comparison_lines(rows)), flush=True)
    return result


def _pairs(row: dict[str, object]) -> str:
    return f"{float(str(row[GOAL])):.2f} pairs a question, {row['tokens']} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=48, help="a task, reported")
    parser.add_argument("--dev", type=int, default=16, help="a task, for tuning")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 0.7, 1.0])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    result = asyncio.run(measure(options.questions, options.dev, options.temperatures, options.seed))
    result["seconds"] = round(time.monotonic() - started)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['seconds']} s; {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
