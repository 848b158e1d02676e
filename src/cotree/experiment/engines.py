"""Which engine serves the weights of a recipe's models: a run keeps the one that it began with, on any machine."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.run_folder import RunFolder
from cotree.experiment.recipe import Recipe, build_recipe
from cotree.models.resolve import engine_of
from cotree.models.settings import Engine
from cotree.report.summary import read_recipe

_SAID = 6  # names in a line


def with_engines(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe with the run's own engine for every model that names none and has weights of the same name there.

    In a run's own recipe an engine is written where vLLM is one to choose; none means llama.cpp, so that a run of a
    laptop goes on with it where there is a GPU.
    """
    kept: Mapping[str, Any] = {}
    with suppress(UsageError):  # a damaged one is written again
        kept = read_recipe(folder).get("models") or {} if (folder.path / "recipe.yaml").is_file() else {}
    written = copy.deepcopy(dict(recipe.written))
    for name, model in recipe.models.items():
        if model.weights is None or model.engine is not None:
            continue
        before = kept.get(name) or {}
        with suppress(UsageError):  # weights that are not here: their fingerprint says so
            engine = here = engine_of(model)
            if Path(before.get("weights") or "").name == Path(model.weights).name:  # their folder may have moved
                engine = before.get("engine") or "llama.cpp"
            if "vllm" in (here, engine):
                written["models"][name]["engine"] = engine
    return recipe if written == recipe.written else build_recipe(written, recipe.home)


def engines_of(recipe: Recipe, names: Iterable[str]) -> dict[str, Engine]:
    """What serves the weights of these models and students; those on servers are left out.

    Raises:
        UsageError: the weights are not here, or the engine does not take them.
    """
    roots = {name: recipe.models[recipe.root_model(name)] for name in names}
    return {name: engine_of(root) for name, root in roots.items() if root.weights is not None}


def engine_lines(engines: Mapping[str, Engine]) -> list[str]:
    """A line for each engine with what it serves, for the terminal."""
    served: dict[str, list[str]] = {}
    for name, engine in engines.items():
        served.setdefault("vLLM" if engine == "vllm" else engine, []).append(name)
    lines = []
    for by, names in served.items():
        others = f" and {len(names) - _SAID} others" if len(names) > _SAID else ""
        lines.append(f"weights served by {by}: {', '.join(names[:_SAID])}{others}")
    return lines
