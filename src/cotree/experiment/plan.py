"""What a run would cost, stage by stage, as far as it can be known before it: `cotree run --dry-run`.

Invariant: no server is asked, no model is loaded and nothing is written. What is called `at most` is a bound that
follows from the recipe, what is called `about` an estimate from rows that are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from cotree.experiment.recipe import Recipe, TrainDPO, TrainSFT
from cotree.experiment.run_folder import RunFolder


def dry_run(run: RunFolder, stages: Sequence[str]) -> Iterator[str]:
    """A line for each stage, for each student in training, of the run as it stands.

    Raises:
        UsageError: rows that are there cannot be trained on.
    """
    recipe = run.recipe
    trees = sum(recipe.tasks.train.values())
    sft = ["sft", "control"] if recipe.eval.control else ["sft"]
    chains, pairs = trees * recipe.build.sft.chains_per_tree, trees * recipe.build.dpo.pairs_per_tree
    for stage in stages:
        if run.done(stage):
            yield f"{stage}: done"
        elif stage == "search":
            yield f"search: {_search(recipe, trees)}"
        elif stage == "build":
            yield f"build: at most {chains} chains for each of {', '.join(sft)}, and {pairs} pairs for dpo"
        elif stage == "train_sft":
            yield from (_train(run, name, chains, recipe.train.sft) for name in sft)
        elif stage == "train_dpo":
            yield _train(run, "dpo", pairs, recipe.train.dpo)
        elif stage == "eval":
            models = 3 + recipe.eval.control + recipe.eval.examples
            n = sum(recipe.tasks.of(recipe.eval.split).values())
            tokens = n * models * recipe.eval.max_tokens
            yield f"eval: {n} questions of each of {models} models, at most {tokens:,} generated tokens"


def _search(recipe: Recipe, trees: int) -> str:
    from cotree.search.thoughts import PATTERNS

    search, models = recipe.search, recipe.used_models()
    patterns = [search.own_patterns.get(name) or PATTERNS[name] for name in search.patterns]
    children = max(sum(row.values()) for pattern in patterns for row in pattern.values())
    longest = max([search.max_thought_tokens, *(thought.max_tokens or 0 for thought in search.thoughts.values())])
    # A rollout writes the children of each thought on its way to an answer, and a reflection on that.
    tokens = trees * search.rollouts * (search.max_depth * children + 1) * longest
    tokens = min(tokens, trees * search.stop.tokens) if search.stop.tokens else tokens
    tokens *= 1 + search.baselines
    price = max((model.price.completion for model in models.values() if model.price), default=None)
    cost = "" if price is None else f", which cost at most {tokens * price / 1e6:.2f} (prompts not counted)"
    asked = ", ".join(f"{name} ({'embedded' if model.embedded else 'server'})" for name, model in models.items())
    cost = (", best-of-n included" if search.baselines else "") + cost
    trees_of = f"{trees} trees of at most {search.rollouts} rollouts, written by {asked}"
    return f"{trees_of}; at most {tokens:,} generated tokens{cost}"


def _train(run: RunFolder, name: str, most: int, settings: TrainSFT | TrainDPO) -> str:
    rows = run.data / name / "train.parquet"
    if not rows.is_file():
        steps = ceil(settings.epochs * ceil(most / settings.batch_size))
        return f"train {name}: at most {most} rows in {steps} steps; the rest is known when `build` has made its rows"
    from cotree.base.numbers import duration
    from cotree.experiment.datasets import student_source
    from cotree.train.plan import plan

    p = plan(rows, student_source(run.recipe), settings, run.recipe.seed, run.recipe.build.max_tokens)
    return (
        f"train {name}: {p.rows} rows ({p.too_long} over build.max_tokens left out), {p.steps} steps, {p.packs} packs; "
        f"{p.tokens:,} tokens, packed {p.packed_tokens:,} (ratio {p.token_ratio:.2f}); about "
        f"{p.peak_bytes / 1e9:.1f} GB of memory, and {duration(p.seconds)} for the matrices' work alone"
    )
