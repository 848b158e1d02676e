"""Is the tree worth its tokens? MCTS with and without reflection beside sampling, each tuned on dev questions.

    python -m benchmarks.worth                     the embedded model, half an hour on two cores
    python -m benchmarks.worth --questions 4 --temperatures 0.7     a few minutes

Each method gets the same grid of temperatures on dev questions and is reported, at its own best, on others; sampling
gets as many generated tokens for a question as the tree it stands beside. Writes benchmarks/out/worth.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cotree.experiment.recipe import load_recipe
from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.report.templates import lines
from cotree.search.journal import Journal
from cotree.search.settings import Trees
from cotree.search.store import TreeStore
from cotree.search.summary import MethodResult, compare_methods
from cotree.search.trees import TreeGrower, trees_of
from cotree.tasks import Split, task
from cotree.tasks.base import Asked

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "out" / "worth.json"


async def both(
    endpoints: dict[str, Endpoint], settings: Trees, questions: list[Asked], seed: int
) -> tuple[MethodResult, MethodResult]:
    """The results of the search under these settings, and of sampling at its tokens."""
    sampling = settings.model_copy(update={"method": "sampling", "tokens_of": "search"})
    with (
        tempfile.TemporaryDirectory() as name,
        Journal(Path(name) / "journal.db") as journal,
        TreeStore(Path(name) / "search.db") as grown,
        TreeStore(Path(name) / "sampling.db") as sampled,
    ):
        more: dict[str, Any] = {"endpoints": endpoints, "config": "", "seed": seed}
        await TreeGrower(grown, journal, settings, **more).grow(questions)
        budgets = {tree.question_name: tree.completion_tokens for tree in grown.trees()}
        await TreeGrower(sampled, journal, sampling, budgets=budgets, **more).grow(questions)
        stores = {"mcts": grown, "sampling": sampled}
        first, second = compare_methods({key: trees_of(store, questions, "") for key, store in stores.items()})
        return first, second


def drawn(names: list[str], split: Split, count: int) -> list[Asked]:
    return [(task(name), question) for name in names for question in task(name).questions(split, count)]


def goal(result: MethodResult) -> float:
    """What is tuned for: a pair needs both kinds of chains."""
    return result.pairs_per_question


async def measure(count: int, dev: int, temperatures: list[float], seed: int) -> dict[str, Any]:
    recipe = load_recipe(ROOT / "recipes" / "laptop.yaml", [f"seed={seed}"])
    search = recipe.nodes["trees/train"].settings
    names = list(search.questions)
    methods = {"mcts": 0, "mcts with reflection": search.max_reflections or 1}
    result: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "seed": seed, "tuned": {}, "reported": {}}
    models = {name: recipe.models[name] for name in search.writers}
    async with open_endpoints(models, widest=search.widest) as endpoints:

        async def at(temperature: float, reflections: int, asked: list[Asked]) -> tuple[MethodResult, MethodResult]:
            changed = search.model_copy(update={"temperature": temperature, "max_reflections": reflections})
            return await both(endpoints, changed, asked, seed)

        for name, reflections in methods.items():
            grid: dict[float, tuple[MethodResult, MethodResult]] = {}
            for temperature in temperatures:
                grid[temperature] = await at(temperature, reflections, drawn(names, "dev", dev))
                print(f"dev  {name}  temperature {temperature}: {_pairs(grid[temperature][0])}", flush=True)
            ours = max(temperatures, key=lambda t: goal(grid[t][0]))
            theirs = max(temperatures, key=lambda t: goal(grid[t][1]))
            result["tuned"][name] = {"mcts": ours, "sampling": theirs}
            asked = drawn(names, "train", count)
            rows = [asdict((await at(t, reflections, asked))[side]) for side, t in enumerate((ours, theirs))]
            result["reported"][name] = rows
            print(f"\n{name} at temperature {ours}, sampling at {theirs}, {count} questions a task:")
            print("\n".join(lines("compared", rows)), flush=True)
    return result


def _pairs(result: MethodResult) -> str:
    return f"{goal(result):.2f} pairs a question, {result.tokens} tokens"


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
