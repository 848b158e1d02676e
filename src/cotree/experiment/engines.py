"""Choose the engines of a recipe's models; a run keeps those that it started with, on any machine."""

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

_SAID = 6  # maximum names in a line


def with_engines(recipe: Recipe, folder: RunFolder) -> Recipe:
    """Set unset engines in a recipe to those recorded in the run's own recipe for weights of the same name.

    The run's recipe records an engine where vLLM was a choice; none means llama.cpp, so a run started on a laptop keeps
    it on a machine with a GPU.
    """
    kept: Mapping[str, Any] = {}
    with suppress(UsageError):  # a damaged recipe is written again
        kept = read_recipe(folder).get("models") or {} if (folder.path / "recipe.yaml").is_file() else {}
    written = copy.deepcopy(dict(recipe.written))
    for name, model in recipe.models.items():
        if model.weights is None or model.engine is not None:
            continue
        before = kept.get(name) or {}
        with suppress(UsageError):  # missing weights are reported by their fingerprint
            engine = here = engine_of(model)
            if Path(before.get("weights") or "").name == Path(model.weights).name:  # the folder may have moved
                engine = before.get("engine") or "llama.cpp"
            if "vllm" in (here, engine):
                written["models"][name]["engine"] = engine
    return recipe if written == recipe.written else build_recipe(written, recipe.home)


def engines_of(recipe: Recipe, names: Iterable[str]) -> dict[str, Engine]:
    """{model or student: engine} of those with weights; models on servers are left out.

    Raises:
        UsageError: the weights are missing, or not supported by the engine.
    """
    roots = {name: recipe.models[recipe.root_model(name)] for name in names}
    return {name: engine_of(root) for name, root in roots.items() if root.weights is not None}


def engine_lines(engines: Mapping[str, Engine]) -> list[str]:
    """A terminal line per engine with the models that it serves."""
    served: dict[str, list[str]] = {}
    for name, engine in engines.items():
        served.setdefault("vLLM" if engine == "vllm" else engine, []).append(name)
    lines = []
    for by, names in served.items():
        others = f" and {len(names) - _SAID} more" if len(names) > _SAID else ""
        lines.append(f"weights served by {by}: {', '.join(names[:_SAID])}{others}")
    return lines
