"""Pin the hub models and datasets of a recipe to commits, once per run; and offline mode for the hub's libraries."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.run_folder import RunFolder
from cotree.experiment.recipe import Recipe, build_recipe
from cotree.models.weights import HUB_WEIGHTS
from cotree.report.summary import read_recipe

# {section of a recipe: key that may name a hub repository}
_NAMED_IN = {"models": "weights", "datasets": "hub"}
# Environment variables that huggingface_hub and datasets read once, at import.
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def pinned(recipe: Recipe, folder: RunFolder, *, ask: bool = True) -> Recipe:
    """Add a revision to every hub model and dataset of a recipe: the run's, else (if `ask`) the newest.

    Raises:
        UsageError: the hub is unreachable, or the repository does not exist.
    """
    kept = cache(partial(_revisions, folder))  # read only where a name without a revision needs it

    def pin(section: str, word: str) -> str:
        found = HUB_WEIGHTS.fullmatch(word)
        if found is None or found["revision"] or (section == "models" and Path(word).exists()):
            return word
        known, key = kept(), (section, found["repo"])
        if ask and key not in known:
            known[key] = _newest_commit(*key)
        return f"{found['repo']}@{known[key]}{word.removeprefix(found['repo'])}" if key in known else word

    written = _with_hub_names(recipe.written, pin)
    return recipe if written == recipe.written else build_recipe(written, recipe.home)


def _revisions(folder: RunFolder) -> dict[tuple[str, str], str]:
    """{(section, repository): revision} from the run's own recipe."""
    known: dict[tuple[str, str], str] = {}

    def remember(section: str, word: str) -> str:
        if (found := HUB_WEIGHTS.fullmatch(word)) and found["revision"]:
            known[section, found["repo"]] = found["revision"]
        return word

    if (folder.path / "recipe.yaml").is_file():
        _with_hub_names(read_recipe(folder), remember)
    return known


def _with_hub_names(written: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """A copy of a recipe's data with every possible hub name replaced by `change(section, name)`."""
    changed = copy.deepcopy(dict(written))
    for section, key in _NAMED_IN.items():
        entries = [entry for entry in (changed.get(section) or {}).values() if isinstance(entry, dict)]
        for place in [*entries, *(entry.get("sweep") or {} for entry in entries)]:
            if isinstance(value := place.get(key), str):
                place[key] = change(section, value)
            elif isinstance(value, list):
                place[key] = [change(section, name) for name in value]
    return changed


def _newest_commit(section: str, repo: str) -> str:
    """The newest commit of a model or dataset; offline, the last one downloaded."""
    from huggingface_hub import HfApi, snapshot_download

    kind = section.removesuffix("s")
    try:
        return str(HfApi().repo_info(repo, repo_type=kind).sha)
    except Exception as error:  # noqa: BLE001 - the hub client raises dozens of unrelated types
        with suppress(Exception):
            return Path(snapshot_download(repo, repo_type=kind, local_files_only=True, allow_patterns=[])).name
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        instead = {"models": "a folder", "datasets": "`file:`"}[section]
        raise UsageError(f"cannot ask the hub for {repo}: {reason}; is it reached, or give {instead} instead") from None


@contextmanager
def offline() -> Iterator[None]:
    """While the block runs, the hub's libraries use their caches only."""
    before = {name: os.environ.get(name) for name in _OFFLINE}
    _set_offline(dict.fromkeys(_OFFLINE, "1"))
    try:
        yield
    finally:
        _set_offline(before)


def _set_offline(values: Mapping[str, str | None]) -> None:
    """Set the environment variables, and the constants that imported hub libraries derived from them."""
    for name, value in values.items():
        os.environ[name] = value or ""
        if value is None:
            del os.environ[name]
        for module in map(sys.modules.get, ("huggingface_hub.constants", "datasets.config")):
            if hasattr(module, name):
                setattr(module, name, (value or "").upper() in {"1", "ON", "YES", "TRUE"})
