"""The written entries of a recipe as single nodes: `like` is copied, `sweep` and `seeds` become one node a value.

    alpha: {like: cdpo, sweep: {alpha: [0.5, 1.5]}}   ->   alpha@alpha=0.5, alpha@alpha=1.5
    sft:   {from: llama, seeds: [0, 1], ...}          ->   sft@seed=0, sft@seed=1

Every name in a resolved entry names exactly one node, model or student; only an evaluation's `models` may name many.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.run_folder import KINDS, Kind
from cotree.base.settings import nearest

Raw = dict[str, Any]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
# Of each kind the keys that name other entries, and in which namespace. "models" holds models and students.
_REFERENCES: Mapping[Kind, Mapping[str, str]] = {
    "trees": {"tokens_of": "trees"},
    "datasets": {"trees": "trees", "size_of": "datasets", "questions_of": "datasets", "tokenizer": "models"},
    "students": {"from": "models", "data": "datasets"},
    "evaluations": {"models": "models", "tokens_of": "evaluations"},
}


@dataclass(frozen=True)
class Entry:
    """One node as it is written, with `like`, `sweep` and `seeds` resolved.

    entry: the name it has in the recipe; several nodes of a sweep or of seeds share it. like: the entry it copies.
    label: the swept values ("alpha=0.5"), "" without a sweep. seed: None where the recipe's seed holds.
    """

    kind: Kind
    entry: str
    values: Raw
    like: str | None = None
    label: str = ""
    seed: int | None = None

    @property
    def name(self) -> str:
        """The node's name: the entry's, with swept values and seed after an `@`."""
        parts = [self.label] * bool(self.label) + ([] if self.seed is None else [f"seed={self.seed}"])
        return f"{self.entry}@{','.join(parts)}" if parts else self.entry


def resolve_entries(written: Mapping[Kind, Mapping[str, Raw]], models: Mapping[str, object]) -> list[Entry]:
    """All nodes of a recipe, each kind in the order in which it is written.

    Raises:
        UsageError: a name is unknown (the nearest known one is named), used twice, or ambiguous; entries that are like
            each other, or parents of each other, in a circle.
    """
    names = Names(models)
    for kind in KINDS:
        for name in written.get(kind, {}):
            if not _NAME.fullmatch(name):
                raise UsageError(f"{kind}.{name}: a name has letters, digits, `_`, `+` and `-` only")
            if kind == "students" and name in models:
                raise UsageError(f"`{name}` is a model and a student; models and students share their names")
    resolving = _Resolving(written, names)
    return [entry for kind in KINDS for name in written.get(kind, {}) for entry in resolving.entry(kind, name)]


@dataclass
class Names:
    """Which nodes a reference means: an entry's name (all its nodes), `entry@label` (all its seeds), or one node."""

    models: Mapping[str, object]
    known: dict[str, dict[str, list[Entry]]] = field(default_factory=dict)

    def add(self, namespace: str, entries: list[Entry]) -> None:
        """Make the nodes of one entry known."""
        by_reference = self.known.setdefault(namespace, {})
        for entry in entries:
            labelled = f"{entry.entry}@{entry.label}" if entry.label else entry.entry
            for reference in dict.fromkeys((entry.entry, labelled, entry.name)):
                by_reference.setdefault(reference, []).append(entry)


class _Resolving:
    def __init__(self, written: Mapping[Kind, Mapping[str, Raw]], names: Names) -> None:
        self.written, self.names = written, names
        self.done: dict[tuple[Kind, str], list[Entry]] = {}
        self.under_way: list[str] = []

    def entry(self, kind: Kind, name: str) -> list[Entry]:
        """The nodes of one written entry."""
        if (kind, name) in self.done:
            return self.done[kind, name]
        where = f"{kind}.{name}"
        if where in self.under_way:
            circle = " -> ".join([*self.under_way[self.under_way.index(where) :], where])
            raise UsageError(f"{circle} is a circle: an entry cannot need itself; break it at one of these names")
        self.under_way.append(where)
        values = self._copied(kind, name, [])
        sweep, seeds = values.pop("sweep", None), values.pop("seeds", None)
        if seeds is not None and (kind != "students" or not _whole_numbers(seeds)):
            fault = "is a list of different whole numbers, like [0, 1, 2]"
            fault = fault if kind == "students" else "is for students; trees and datasets have the recipe's seed"
            raise UsageError(f"{where}: `seeds` {fault}")
        like = self.written[kind][name].get("like")
        entries = [
            Entry(kind, name, resolved, like, label, seed)
            for label, swept in _swept(values, sweep, where)
            for seed, resolved in self._seeded(kind, swept, seeds, where)
        ]
        self.under_way.pop()
        self.done[kind, name] = entries
        self.names.add("models" if kind == "students" else kind, entries)
        return entries

    def _copied(self, kind: Kind, name: str, path: list[str]) -> Raw:
        """An entry's settings with those of the entry that it is like; null takes the default again."""
        own = self.written[kind].get(name)
        if not isinstance(own, dict):
            raise UsageError(f"{kind}.{name}: must be a section of keys, like {{}}")
        path = [*path, name]
        like = own.get("like")
        if like is None:
            return {key: value for key, value in own.items() if value is not None}
        if not isinstance(like, str) or like not in self.written[kind]:
            raise UsageError(f"{kind}.{name}.like: unknown {kind} entry `{like}`; {nearest(like, self.written[kind])}")
        if like in path:
            raise UsageError(f"{kind}: {' is like '.join([*path[path.index(like) :], like])}: a circle; break it")
        merged = self._copied(kind, like, path) | {key: value for key, value in own.items() if key != "like"}
        return {key: value for key, value in merged.items() if value is not None}

    def _seeded(self, kind: Kind, values: Raw, seeds: list[int] | None, where: str) -> Iterator[tuple[int | None, Raw]]:
        """One copy for each seed, with every name in it resolved to one node."""
        parents = self._meant("models", values.get("from"), f"{where}.from") if kind == "students" else []
        of_parent = [parent.seed for parent in parents if parent is not None and parent.seed is not None]
        if len({parent.label for parent in parents if parent is not None}) > 1:
            several = ", ".join(parent.name for parent in parents if parent is not None)
            raise UsageError(f"{where}.from: `{values['from']}` is a sweep of several students; name one of {several}")
        if of_parent and seeds is not None and seeds != of_parent:
            raise UsageError(f"{where}: its parent has the seeds {of_parent}, so it has these too; leave out `seeds`")
        own_seeds: list[int | None] = [*(of_parent or seeds or [])]
        for seed in own_seeds or [None]:
            resolved = dict(values)
            for key, namespace in _REFERENCES[kind].items():
                if key in resolved:
                    of_seed = seed if key == "from" else None
                    find = self._all if key == "models" else self._each
                    resolved[key] = find(namespace, resolved[key], of_seed, f"{where}.{key}")
            if "roles" in resolved:
                resolved["roles"] = _each_writer(resolved["roles"], self._one_model(f"{where}.roles"))
            if isinstance(resolved.get("reward"), dict):
                one = self._one_model(f"{where}.reward")
                resolved["reward"] = {
                    key: one(value) if key in ("judge", "process") and isinstance(value, str) else value
                    for key, value in resolved["reward"].items()
                }
            yield seed, resolved

    def _all(self, namespace: str, value: Any, seed: int | None, where: str) -> list[str]:
        """The names of all nodes that are meant, each once: an evaluation asks every one."""
        listed = value if isinstance(value, list | tuple) else [value]
        found = [(name, self._meant(namespace, name, where)) for name in listed]
        return list(dict.fromkeys(name if entry is None else entry.name for name, meant in found for entry in meant))

    def _each(self, namespace: str, value: Any, seed: int | None, where: str) -> Any:
        """The name of the one node that a name, or each name of a list, means."""
        if isinstance(value, list | tuple):
            return [self._one(namespace, name, seed, where) for name in value]
        return self._one(namespace, value, seed, where)

    def _one_model(self, where: str) -> Callable[[str], str]:
        return lambda name: self._one("models", name, None, where)

    def _one(self, namespace: str, name: str, seed: int | None, where: str) -> str:
        """The name of the only node that is meant, of several seeds the one of `seed`."""
        meant = [
            each
            for each in self._meant(namespace, name, where)
            if seed is None or each is None or each.seed in (None, seed)
        ]
        if len(meant) > 1:
            several = ", ".join(entry.name for entry in meant if entry is not None)
            raise UsageError(f"{where}: `{name}` means several; name one of {several}")
        return name if meant[0] is None else meant[0].name

    def _meant(self, namespace: str, name: Any, where: str) -> list[Entry | None]:
        """The nodes that a name means, in order; None stands for a model."""
        kind: Kind = "students" if namespace == "models" else namespace  # type: ignore[assignment]
        if namespace == "models" and isinstance(name, str) and name in self.names.models:
            return [None]
        entry = str(name).partition("@")[0]
        if entry in self.written.get(kind, {}):
            self.entry(kind, entry)
        found = self.names.known.get(namespace, {}).get(str(name))
        if not found:
            known = [*(self.names.models if namespace == "models" else ()), *self.written.get(kind, {})]
            known += self.names.known.get(namespace, {})
            what = "model or student" if namespace == "models" else f"{kind} entry"
            raise UsageError(f"{where}: unknown {what} `{name}`; {nearest(name, dict.fromkeys(known))}")
        return list(found)


def _whole_numbers(seeds: Any) -> bool:
    return (
        isinstance(seeds, list) and bool(seeds) and all(type(s) is int for s in seeds) and len({*seeds}) == len(seeds)
    )


def _swept(values: Raw, sweep: Any, where: str) -> Iterator[tuple[str, Raw]]:
    """A label and the settings for each combination of swept values, in written order."""
    if sweep is None:
        yield "", values
        return
    if not isinstance(sweep, dict) or not all(
        isinstance(key, str) and isinstance(listed, list) and listed for key, listed in sweep.items()
    ):
        raise UsageError(f"{where}.sweep: must be {{key: [values]}}, e.g. sweep: {{alpha: [0.5, 1.0]}}")
    for combination in itertools.product(*sweep.values()):
        swept = json.loads(json.dumps(values))
        for key, value in zip(sweep, combination, strict=True):
            *sections, last = key.split(".")
            place = swept
            for section in sections:
                place = place.setdefault(section, {})
                if not isinstance(place, dict):
                    raise UsageError(f"{where}.sweep: `{key}` leads through a value, not a section")
            place[last] = value
        pairs = zip(sweep, combination, strict=True)
        yield ",".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in pairs), swept


def _each_writer(roles: Any, resolve: Callable[[str], str]) -> Any:
    """The roles with every model's or student's name resolved; what is malformed is left for the settings' check."""
    if isinstance(roles, str):
        return resolve(roles)
    if isinstance(roles, list):
        return [_each_writer(role, resolve) for role in roles]
    if isinstance(roles, dict) and isinstance(roles.get("model"), str):
        return roles | {"model": resolve(roles["model"])}
    if isinstance(roles, dict):
        return {name: _each_writer(role, resolve) for name, role in roles.items()}
    return roles
