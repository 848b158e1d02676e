"""Datasets of the hub are known by id and commit: an id without a revision is pinned once, in the run's recipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import yaml

from cotree.base.errors import UsageError
from cotree.base.run_folder import RunFolder
from cotree.experiment.recipe import Recipe, build_recipe

# What huggingface_hub and datasets read, once, when they are loaded.
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def pinned(recipe: Recipe, folder: RunFolder, *, ask: bool = True) -> Recipe:
    """The recipe with a revision for every dataset of the hub: the run's own, else (if `ask`) the newest commit.

    Raises:
        UsageError: the hub is not reached, or has no such dataset.
    """
    unpinned = {n.dataset.hub for n in recipe.of_kind("datasets") if n.dataset.hub and "@" not in n.dataset.hub}
    if not unpinned:
        return recipe
    known = _revisions(folder)
    commits = {hub: known.get(hub) or _newest_commit(hub) for hub in unpinned if ask or hub in known}

    def pin(value: Any) -> Any:
        if isinstance(value, list):
            return [pin(item) for item in value]
        return f"{value}@{commits[value]}" if isinstance(value, str) and value in commits else value

    written = yaml.safe_load(yaml.safe_dump(dict(recipe.written)))
    for entry in written["datasets"].values():
        for place in (entry, entry.get("sweep") or {}):
            if "hub" in place:
                place["hub"] = pin(place["hub"])
    return build_recipe(written, recipe.home)


def _revisions(folder: RunFolder) -> dict[str, str]:
    """The revisions that the run's own recipe names."""
    path = folder.path / "recipe.yaml"
    kept: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found: dict[str, str] = {}
    for entry in (kept.get("datasets") or {}).values():
        swept = (entry.get("sweep") or {}).get("hub") or []
        found |= dict(hub.split("@", 1) for hub in (entry.get("hub") or "", *swept) if "@" in hub)
    return found


def _newest_commit(hub: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(hub).sha)
    except Exception as error:  # noqa: BLE001 - the hub client raises dozens of unrelated types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"cannot ask the hub for {hub}: {reason}; is it reached, or give `file:` instead") from None


@contextmanager
def offline() -> Iterator[None]:
    """While the block runs, the hub's libraries use what is in their caches and ask no network."""
    before = {name: os.environ.get(name) for name in _OFFLINE}
    loaded = {(module.__name__, name): getattr(module, name) for module, name in _offline_switches()}
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    for module, name in _offline_switches():
        setattr(module, name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
        for module, name in _offline_switches():  # those that were loaded in the block have read the environment
            of_environment = (before[name] or "").upper() in {"1", "ON", "YES", "TRUE"}
            setattr(module, name, loaded.get((module.__name__, name), of_environment))


def _offline_switches() -> list[tuple[ModuleType, str]]:
    """The loaded modules of the hub's libraries that have read one of the variables, each with its name."""
    modules = map(sys.modules.get, ("huggingface_hub.constants", "datasets.config"))
    return [(module, name) for module in modules if module is not None for name in _OFFLINE if hasattr(module, name)]
