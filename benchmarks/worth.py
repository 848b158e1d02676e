"""Is the tree worth its tokens? Search beside sampling at equal generated tokens, each tuned on dev questions.

    python -m benchmarks.worth                          the demo's tasks and model
    python -m benchmarks.worth --recipe recipes/gsm8k.yaml     GSM8K and Qwen2.5-Coder-0.5B (`make real`)
    python -m benchmarks.worth --task gsm8k --model NAME       that recipe's search with another model, or another task

Three ways: the recipe's search (`mcts`), independent chains that begin as its trees do (`sampling`: the same worked
examples and first words), and what a user would do without cotree (`plain`: the model's own chat template, the plain
question, to the end of its turn). Each gets the same grid of temperatures on dev questions and is reported, at its own
best, on others; for each question both samplings get as many generated tokens as the tree that is reported. `--tokens
800 1400 2000` tunes at 800 a question and reports at all three: the smaller ones are the beginnings of the largest, and
cost nothing more. Writes benchmarks/out/worth.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cotree.experiment.recipe import load_recipe
from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.models.resolve import parse_model
from cotree.models.settings import Model
from cotree.search.journal import Journal
from cotree.search.settings import Trees
from cotree.search.store import TreeStore
from cotree.search.summary import MethodResult, compare_methods
from cotree.search.trees import TreeGrower, trees_of
from cotree.tasks import Split, task
from cotree.tasks.base import Asked, hash_digit
from cotree.tasks.benchmark import Benchmark

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "out" / "worth.json"


def ways_of(search: Trees) -> dict[str, Trees]:
    """The search of a recipe, and the two ways of sampling that stand beside it."""
    sampling = {"method": "sampling", "tokens_of": "mcts"}
    whole = {"ends": "paragraph", "examples": 0, "patterns": ["solution"], "thoughts": {}, "max_reflections": 0}
    written = search.model_dump(exclude_unset=True)
    plain = {key: value for key, value in written.items() if key not in whole}
    chain = {"max_chain_tokens": max(512, search.max_chain_tokens)}  # without examples they are longer
    return {
        "mcts": search,
        "sampling": search.model_copy(update=sampling),
        "plain": Trees.model_validate(plain | whole | sampling | chain),
    }


def spending(settings: Trees, tokens: int | None) -> Trees:
    """The settings with a stop at so many generated tokens a question; None leaves them as they are."""
    stop = settings.stop if tokens is None else settings.stop.model_copy(update={"tokens": tokens})
    return settings.model_copy(update={"stop": stop})


class Bench:
    """Grows trees of one model with everything that was asked before in a journal; stores and journal stay in `folder`.

    A run that was stopped goes on where it was; its seconds are then those of the last start. Both samplings spend on a
    question what its tree has cost.
    """

    def __init__(self, endpoints: Mapping[str, Endpoint], folder: Path, seed: int) -> None:
        self.endpoints, self.folder, self.seed = endpoints, folder, seed
        self.seconds: dict[str, float] = {}

    async def grow(self, name: str, settings: Trees, questions: list[Asked], budgets_of: str | None = None) -> None:
        """Grow the trees of one way into the store `name`; for sampling `budgets_of` is a store with each budget."""
        budgets, config = None, settings.model_dump_json(exclude={"questions", "split"})
        if budgets_of is not None:
            with TreeStore(self.folder / f"{budgets_of}.db") as other:
                budgets = {tree.question_name: tree.completion_tokens for tree in other.trees()}
        started = time.monotonic()
        with Journal(self.folder / "journal.db") as journal, TreeStore(self.folder / f"{name}.db") as store:
            more: dict[str, Any] = {"endpoints": self.endpoints, "config": config, "seed": self.seed}
            await TreeGrower(store, journal, settings, budgets=budgets, **more).grow(questions)
        self.seconds[name] = round(time.monotonic() - started, 1)

    def result(self, way: str, name: str, settings: Trees, questions: list[Asked]) -> MethodResult:
        """What a way found."""
        config = settings.model_dump_json(exclude={"questions", "split"})
        with TreeStore(self.folder / f"{name}.db") as store:
            return compare_methods({way: trees_of(store, questions, config)})[0]


def drawn(counts: Mapping[str, int], split: Split, family: str | None) -> list[Asked]:
    """The first questions of each task, of one family alone where it is given.

    A task that has a test set only is asked there, and a tenth of it, by the hash of the ids, is for tuning.
    """
    asked: list[Asked] = []
    for name, count in counts.items():
        of = task(name)
        if isinstance(of, Benchmark) and of.training is None:
            found = [one for one in of.questions() if (hash_digit(one.id) == 0) == (split == "dev")]
        else:
            found = of.questions(split, None if family else count)
        asked += [(of, one) for one in found if family in (None, one.family)][:count]
    return asked


def line(result: MethodResult, seconds: float) -> str:
    """The figures of one way, in a line."""

    def share(name: str) -> str:
        value, low, high = getattr(result, name)
        return f"{100 * value:5.1f} ({100 * low:.0f}-{100 * high:.0f})"

    value, low, high = result.pairs_per_1000_tokens
    shared = "  -" if result.shared is None else f"{100 * result.shared:3.0f}"
    return (
        f"{result.method:9} {result.chains:6}  {share('accuracy'):16} {share('correct'):16} {share('both'):16} "
        f"{share('vote'):16} {value:5.2f} ({low:.2f}-{high:.2f})  {shared:>6}  {result.tokens:8} {seconds:7.0f}"
    )


HEAD = (
    f"{'':9} {'chains':>6}  {'chains correct %':16} {'a correct one %':16} {'correct+wrong %':16} {'vote right %':16} "
    f"{'pairs/1000 tokens':17} {'shared %':>8}  {'tokens':>7} {'seconds':>7}"
)


async def measure(
    model: Mapping[str, Model],
    ways: Mapping[str, Trees],
    folder: Path,
    *,
    dev: int,
    temperatures: list[float],
    tokens: list[int | None],
    seed: int,
    family: str | None,
) -> dict[str, Any]:
    """Tune every way on dev questions at the first number of tokens, then report it on train questions at each."""
    search = ways["mcts"]
    result: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "seed": seed, "tuned": {}, "dev": {}}
    result |= {"questions": dict(search.questions), "family": family, "model": list(model)}
    result |= {"temperatures": temperatures}
    async with open_endpoints(dict(model), widest=search.widest) as endpoints:
        bench = Bench(endpoints, folder, seed)
        asked = drawn(dict.fromkeys(search.questions, dev), "dev", family)
        print(f"{len(asked)} dev questions\n{HEAD}", flush=True)
        best: dict[str, Trees] = {}
        for way, settings in ways.items():
            grid = {t: spending(settings.model_copy(update={"temperature": t}), tokens[0]) for t in temperatures}
            found = {}
            for temperature, at in grid.items():
                name = f"dev-{way}-{temperature}"
                tuned = result["tuned"].get("mcts")
                await bench.grow(name, at, asked, None if way == "mcts" else f"dev-mcts-{tuned}")
                found[temperature] = bench.result(way, name, at, asked)
                print(f"{line(found[temperature], bench.seconds[name])}  at temperature {temperature}", flush=True)
            chosen = max(temperatures, key=lambda t: found[t].pairs_per_1000_tokens[0])
            result["tuned"][way], best[way] = chosen, grid[chosen]
            result["dev"][way] = {str(t): asdict(of) for t, of in found.items()}
        asked, result["reported"] = drawn(search.questions, "train", family), []
        print(f"\n{len(asked)} train questions, each way at the temperature of most pairs", flush=True)
        for most in sorted(tokens, key=lambda n: -(n or 0)):
            print(f"{HEAD}  {'' if most is None else f'at {most} tokens a question'}", flush=True)
            for way, settings in best.items():
                name, at = f"train-{way}-{most}", spending(settings, most)
                await bench.grow(name, at, asked, None if way == "mcts" else f"train-mcts-{most}")
                found_there = bench.result(way, name, at, asked)
                result["reported"].append({"at_tokens": most} | asdict(found_there) | {"seconds": bench.seconds[name]})
                print(f"{line(found_there, bench.seconds[name])}  at temperature {settings.temperature}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="whose `trees.train` is searched with; recipes/laptop.yaml")
    parser.add_argument("--task", help="instead of the recipe's; then recipes/gsm8k.yaml is the default recipe")
    parser.add_argument("--family", help='only such questions, e.g. "3 blocks" of blocksworld')
    parser.add_argument("--model", help="a packaged name, a .gguf or a folder, instead of the recipe's thinker")
    parser.add_argument("--questions", type=int, help="a task, reported; as many as the recipe has")
    parser.add_argument("--dev", type=int, default=24, help="a task, for tuning")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 0.7, 1.0])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[None], help="generated a question; as the recipe says"
    )
    parser.add_argument("--ways", nargs="+", default=["sampling", "plain"], help="to stand beside the search")
    parser.add_argument("--set", nargs="*", default=[], metavar="A=B", help="settings of the search, e.g. rollouts=4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "worth", help="of trees and journal; resumes")
    options = parser.parse_args()
    started = time.monotonic()
    recipe_file = options.recipe or ROOT / "recipes" / ("gsm8k.yaml" if options.task else "laptop.yaml")
    overrides = [f"seed={options.seed}", *(f"trees.train.{one}" for one in options.set)]
    recipe = load_recipe(recipe_file, overrides)
    search: Trees = recipe.nodes["trees/train"].settings
    models = {name: recipe.models[name] for name in search.writers}
    if options.model:
        model = parse_model(options.model, max_in_flight=next(iter(models.values())).max_in_flight)
        models = dict.fromkeys(models, model)
    names = [options.task] if options.task else list(search.questions)
    search = search.model_copy(
        update={"questions": {n: options.questions or search.questions.get(n, 60) for n in names}}
    )
    ways = {way: of for way, of in ways_of(search).items() if way in ("mcts", *options.ways)}
    folder = options.folder / "-".join([recipe_file.stem, *names])
    folder.mkdir(parents=True, exist_ok=True)
    more = {"dev": options.dev, "temperatures": options.temperatures, "tokens": options.tokens}
    more |= {"seed": options.seed, "family": options.family}
    result = asyncio.run(measure(models, ways, folder, **more))
    result["seconds"] = round(time.monotonic() - started)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['seconds']} s; {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
