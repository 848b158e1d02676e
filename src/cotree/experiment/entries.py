"""Expand the entries of a recipe to single nodes: resolve `like`, and make one node per value of `sweep` and `seeds`.

    alpha: {like: cdpo, sweep: {alpha: [0.5, 1.5]}}   ->   alpha@alpha=0.5, alpha@alpha=1.5
    sft:   {from: llama, seeds: [0, 1], ...}          ->   sft@seed=0, sft@seed=1

Every name in a resolved entry names exactly one node, model or student; only an evaluation's `models` may name many.
"""

from __future__ import annotations

import copy
import graphlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.run_folder import KINDS, Kind
from cotree.base.settings import nearest, set_value

Raw = dict[str, Any]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
# {kind: {key that refers to other entries: their kind}}; names of students may also be models.
_REFERENCES: Mapping[Kind, Mapping[str, Kind]] = {
    "trees": {"tokens_of": "trees", "tokenizer": "students"},
    "datasets": {"trees": "trees", "size_of": "datasets", "questions_of": "datasets", "tokenizer": "students"},
    "students": {"from": "students", "data": "datasets"},
    "evaluations": {"models": "students", "tokens_of": "evaluations"},
}


@dataclass(frozen=True)
class Entry:
    """The settings of one node, with `like`, `sweep` and `seeds` resolved.

    entry: its name in the recipe, shared by all nodes of a sweep or of seeds. like: the entry that it copies.
    label: the swept values ("alpha=0.5"), "" without a sweep. seed: None for the recipe's seed.
    reads: the ids of the nodes that it refers to ("trees/train").
    """

    kind: Kind
    entry: str
    values: Raw
    like: str | None = None
    label: str = ""
    seed: int | None = None
    reads: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The node's name: the entry's name, plus swept values and seed after `@`."""
        parts = [self.label] * bool(self.label) + ([] if self.seed is None else [f"seed={self.seed}"])
        return f"{self.entry}@{','.join(parts)}" if parts else self.entry


def resolve_entries(written: Mapping[Kind, Mapping[str, Raw]], models: Collection[str]) -> list[Entry]:
    """All nodes of a recipe, each kind in the order in which it is written.

    Raises:
        UsageError: a name is unknown (the nearest known one is named), used twice, or ambiguous; entries that are like
            each other, or students that start from each other, in a circle.
    """
    names = _Names(written, models)
    for kind, entries in written.items():
        for name, own in entries.items():
            if not _NAME.fullmatch(name):
                raise UsageError(f"{kind}.{name}: a name has letters, digits, `_`, `+` and `-` only")
            if kind == "students" and name in models:
                raise UsageError(f"`{name}` is a model and a student; models and students share their names")
            if not isinstance(own, dict):
                raise UsageError(f"{kind}.{name}: must be a section of keys, like {{}}")
        copied = {name: _copy_of_like(kind, name, entries) for name in entries}
        seeds = {name: values.pop("seeds", None) for name, values in copied.items()}
        swept = {name: list(_swept(values, f"{kind}.{name}")) for name, values in copied.items()}
        parents = {
            name: {str(values.get("from", "")).partition("@")[0] for _, values in combinations} & swept.keys()
            for name, combinations in swept.items()
        }
        for name in sort_by_need(parents):  # a student has the seeds of its parent
            for label, values in swept[name]:
                names.add(Entry(kind, name, values, entries[name].get("like"), label), seeds[name])
    return [names.resolve(node) for kind in written for name in written[kind] for node in names.known[kind][name]]


def sort_by_need(needs: Mapping[str, Collection[str]]) -> list[str]:
    """Sort keys topologically: each after those that it needs, otherwise stable.

    Raises:
        UsageError: a cycle.
    """
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise UsageError(f"{circle} is a circle: nothing can need itself; break it at one of these names") from None
    found: list[str] = []
    while len(found) < len(needs):
        found.append(next(name for name in needs if name not in found and {*needs[name]} <= {*found}))
    return found


class _Names:
    """Resolves names to nodes: an entry's name to all its nodes, `entry@label` to all its seeds or one node.

    known: {kind: {name: nodes}}. Models are listed as students without seeds.
    """

    def __init__(self, written: Mapping[Kind, Mapping[str, Raw]], models: Collection[str]) -> None:
        self.models = models
        self.known: dict[Kind, dict[str, list[Entry]]] = {kind: {name: [] for name in written[kind]} for kind in KINDS}
        self.known["students"] |= {model: [Entry("students", model, {})] for model in models}

    def add(self, entry: Entry, seeds: Any) -> None:
        """Register an entry with one node per seed: its own `seeds`, or its parent's."""
        where = f"{entry.kind}.{entry.entry}"
        if seeds is not None:
            if entry.kind != "students":
                raise UsageError(f"{where}: `seeds` is for students; trees and datasets have the recipe's seed")
            if not isinstance(seeds, list) or {*map(type, seeds)} != {int} or len({*seeds}) < len(seeds):
                raise UsageError(f"{where}: `seeds` is a list of different whole numbers, like [0, 1, 2]")
        if entry.kind == "students":
            parents = self.find("students", entry.values.get("from"), f"{where}.from")
            if len({parent.label for parent in parents}) > 1:
                several = ", ".join(parent.name for parent in parents)
                parent = f"`{entry.values['from']}` is a sweep of several students"
                raise UsageError(f"{where}.from: {parent}; name one of {several}")
            inherited = [parent.seed for parent in parents if parent.seed is not None]
            if inherited and seeds not in (None, inherited):
                raise UsageError(
                    f"{where}: its parent has the seeds {inherited}, so it has them too; leave out `seeds`"
                )
            seeds = inherited or seeds
        labelled = f"{entry.entry}@{entry.label}" if entry.label else entry.entry
        for node in (replace(entry, seed=seed) for seed in seeds or [None]):
            for name in dict.fromkeys([entry.entry, labelled, node.name]):
                self.known[entry.kind].setdefault(name, []).append(node)

    def find(self, kind: Kind, name: Any, where: str) -> list[Entry]:
        """The nodes that a name refers to, in order."""
        if found := self.known[kind].get(str(name)):
            return found
        what = "model or student" if kind == "students" else f"{kind} entry"
        raise UsageError(f"{where}: unknown {what} `{name}`; {nearest(name, self.known[kind])}")

    def resolve(self, entry: Entry) -> Entry:
        """Replace each reference to an entry by the name of one node, and set `reads`."""
        values, reads = dict(entry.values), list[str]()

        def nodes_named(name: str, kind: Kind, key: str) -> list[str]:
            where = f"{entry.kind}.{entry.entry}.{key}"
            found = [node for node in self.find(kind, name, where) if key != "from" or node.seed in (None, entry.seed)]
            if len(found) > 1 and key != "models":
                several = ", ".join(node.name for node in found)
                raise UsageError(f"{where}: `{name}` means several; name one of {several}")
            if key != "tokenizer":
                reads.extend(f"{kind}/{node.name}" for node in found if node.name not in self.models)
            return [node.name for node in found]

        for key, kind in _REFERENCES[entry.kind].items():
            if key in values:
                value = values[key]
                listed = value if isinstance(value, list | tuple) else [value]
                found = [each for name in listed for each in nodes_named(name, kind, key)]
                if key == "models":
                    values[key] = list(dict.fromkeys(found))
                else:
                    values[key] = found if value is listed else found[0]
        if "roles" in values:
            values["roles"] = _replace_models(values["roles"], lambda name: nodes_named(name, "students", "roles")[0])
        reward = values.get("reward")
        if isinstance(reward, dict):
            asked = {key: reward[key] for key in ("judge", "process") if isinstance(reward.get(key), str)}
            asked = {key: nodes_named(name, "students", "reward")[0] for key, name in asked.items()}
            values["reward"] = reward | asked
        return replace(entry, values=values, reads=tuple(dict.fromkeys(reads)))


def _copy_of_like(kind: Kind, name: str, entries: Mapping[str, Any], path: tuple[str, ...] = ()) -> Raw:
    """Merge an entry's settings over those of the entry that it is like; null restores the default."""
    own, path = entries[name], (*path, name)
    like = own.get("like")
    if like is not None:
        if not isinstance(like, str) or not isinstance(entries.get(like), dict):
            raise UsageError(f"{kind}.{name}.like: unknown {kind} entry `{like}`; {nearest(like, entries)}")
        if like in path:
            raise UsageError(f"{kind}: {' is like '.join([*path[path.index(like) :], like])}: a circle; break it")
        own = _copy_of_like(kind, like, entries, path) | own
    return {key: value for key, value in own.items() if value is not None and key != "like"}


def _swept(values: Raw, where: str) -> Iterator[tuple[str, Raw]]:
    """Yield a label and settings for each combination of swept values, in written order."""
    values = dict(values)
    sweep = values.pop("sweep", {})
    if not isinstance(sweep, dict) or not all(
        isinstance(key, str) and isinstance(listed, list) and listed for key, listed in sweep.items()
    ):
        raise UsageError(f"{where}.sweep: must be {{key: [values]}}, e.g. sweep: {{alpha: [0.5, 1.0]}}")
    if twice := [key for key, listed in sweep.items() if any(value in listed[:at] for at, value in enumerate(listed))]:
        raise UsageError(f"{where}.sweep: `{twice[0]}` has a value twice (1 and 1.0 are equal); name each once")
    for combination in itertools.product(*sweep.values()):
        chosen, swept = dict(zip(sweep, combination, strict=True)), copy.deepcopy(values)
        for key, value in chosen.items():
            set_value(swept, key, value, f"{where}.sweep: `{key}`")
        label = ",".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in chosen.items())
        yield label, swept


def _replace_models(roles: Any, resolve: Callable[[str], str]) -> Any:
    """Resolve the model and student names in roles; malformed values are left to the settings' validation."""
    if isinstance(roles, str):
        return resolve(roles)
    if isinstance(roles, list):
        return [_replace_models(role, resolve) for role in roles]
    if isinstance(roles, dict) and isinstance(roles.get("model"), str):
        return roles | {"model": resolve(roles["model"])}
    if isinstance(roles, dict):
        return {name: _replace_models(role, resolve) for name, role in roles.items()}
    return roles
