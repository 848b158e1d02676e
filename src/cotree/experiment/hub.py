"""Datasets of the hub are known by id and commit: an id without a revision is pinned once, in the run's recipe."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.run_folder import RunFolder
from cotree.experiment.recipe import Recipe, build_recipe
from cotree.report.summary import read_recipe

# What huggingface_hub and datasets read, once, when they are loaded.
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def pinned(recipe: Recipe, folder: RunFolder, *, ask: bool = True) -> Recipe:
    """The recipe with a revision for every dataset of the hub: the run's own, else (if `ask`) the newest commit.

    Raises:
        UsageError: the hub is not reached, or has no such dataset.
    """
    hubs = {node.settings.hub for node in recipe.of_kind("datasets") if node.settings.hub is not None}
    known = _revisions(folder) if hubs else {}
    commits = {hub: known.get(hub) or _newest_commit(hub) for hub in hubs if "@" not in hub and (ask or hub in known)}
    if not commits:
        return recipe

    def pin(value: Any) -> Any:
        if isinstance(value, list):
            return [pin(item) for item in value]
        return f"{value}@{commits[value]}" if value in commits else value

    written = copy.deepcopy(dict(recipe.written))
    for entry in written["datasets"].values():
        for place in (entry, entry.get("sweep") or {}):
            if "hub" in place:
                place["hub"] = pin(place["hub"])
    return build_recipe(written, recipe.home)


def _revisions(folder: RunFolder) -> dict[str, str]:
    """The revisions that the run's own recipe names."""
    found: dict[str, str] = {}
    kept = read_recipe(folder)["datasets"] if (folder.path / "recipe.yaml").is_file() else {}
    for entry in kept.values():
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
    _set_offline(dict.fromkeys(_OFFLINE, "1"))
    try:
        yield
    finally:
        _set_offline(before)


def _set_offline(values: Mapping[str, str | None]) -> None:
    """Set the variables, and what loaded modules of the hub's libraries have read from them."""
    for name, value in values.items():
        os.environ[name] = value or ""
        if value is None:
            del os.environ[name]
        for module in map(sys.modules.get, ("huggingface_hub.constants", "datasets.config")):
            if hasattr(module, name):
                setattr(module, name, (value or "").upper() in {"1", "ON", "YES", "TRUE"})
