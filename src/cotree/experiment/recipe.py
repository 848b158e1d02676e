"""The recipe: one YAML file that describes an experiment of named trees, datasets, students and evaluations.

A recipe that loads is complete and consistent: defaults are filled in, every name is known, nothing needs itself. It is
a graph: `Recipe.nodes` has every node after those that it reads.
"""

from __future__ import annotations

import graphlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cotree.base.errors import UsageError
from cotree.base.run_folder import KINDS, Kind, folder_name
from cotree.base.settings import nearest, parse_section, parse_value
from cotree.data.settings import Dataset
from cotree.eval.settings import Evaluation
from cotree.experiment.entries import Entry, resolve_entries
from cotree.models.settings import Model
from cotree.search.settings import Trees
from cotree.search.thoughts import THOUGHT_TYPES
from cotree.tasks import TASKS, is_own_task
from cotree.train.methods import METHODS
from cotree.train.settings import Optimizer

_OLD_KEYS = ("tasks", "search", "build", "train", "eval", "roles")
_LONGEST_NAME = 200  # of the 255 bytes that a file's name may have, some are left for a draft's
_HOMES = {"thoughts": "trees", "patterns": "trees", "rollouts": "trees", "questions": "trees"}


@dataclass(frozen=True)
class Student:
    """A `students` node: a model or another student (`from`), trained by a method on a dataset.

    training: the settings of the method (`train.settings`).
    """

    parent: str
    method: str
    data: str
    training: Optimizer


@dataclass(frozen=True)
class Node:
    """A node of the experiment. reads: the ids of the nodes that it needs ("trees/train")."""

    kind: Kind
    name: str
    entry: str
    like: str | None
    seed: int
    settings: Trees | Dataset | Student | Evaluation
    reads: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Kind and name: "students/dpo"."""
        return f"{self.kind}/{self.name}"

    @property
    def trees(self) -> Trees:
        """The settings of a trees node."""
        assert isinstance(self.settings, Trees)
        return self.settings

    @property
    def dataset(self) -> Dataset:
        """The settings of a dataset node."""
        assert isinstance(self.settings, Dataset)
        return self.settings

    @property
    def student(self) -> Student:
        """The settings of a student node."""
        assert isinstance(self.settings, Student)
        return self.settings

    @property
    def evaluation(self) -> Evaluation:
        """The settings of an evaluation node."""
        assert isinstance(self.settings, Evaluation)
        return self.settings


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    nodes: by id, each after those that it reads. written: the recipe as it was given, overrides applied and paths
    absolute: what the run folder keeps. home: the run folder that the recipe was read from, None elsewhere.
    """

    name: str
    seed: int
    models: Mapping[str, Model]
    nodes: Mapping[str, Node]
    written: Mapping[str, Any]
    home: Path | None = None

    def of_kind(self, kind: Kind) -> list[Node]:
        """The nodes of one kind, in order."""
        return [node for node in self.nodes.values() if node.kind == kind]

    def root_model(self, name: str) -> str:
        """The model whose weights a student descends from; of a model itself."""
        while name not in self.models:
            name = self.nodes[f"students/{name}"].student.parent
        return name

    def with_needed(self, wanted: Iterable[str]) -> list[str]:
        """The ids of the wanted nodes and of all that they need, in order.

        Args:
            wanted: ids, entries ("students/alpha": all its nodes), or kinds ("trees").

        Raises:
            UsageError: one names nothing; the nearest name is said.
        """
        found: set[str] = set()
        for name in wanted:
            meant = [n.id for n in self.nodes.values() if name in (n.id, f"{n.kind}/{n.entry}", n.kind)]
            if not meant:
                raise UsageError(f"--only: unknown node `{name}`; {nearest(name, [*self.nodes, *KINDS])}")
            found.update(meant)
        for node in reversed(list(self.nodes.values())):
            if node.id in found:
                found.update(node.reads)
        return [name for name in self.nodes if name in found]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe (a YAML file, or a run folder, whose own recipe it then is) and apply `a.b.c=value` overrides.

    Raises:
        UsageError: one line that names the file, the key and the fix.
    """
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            raise UsageError(f"{path} is a folder without a recipe.yaml; name a recipe file, or a run folder")
        path = path / "recipe.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no recipe at {path}; `cotree init` writes one to start from") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} holds no recipe: expected keys like `name`, `models`, `trees`")
    in_run = path.name == "recipe.yaml" and (path.parent / ".lock").is_file()
    home = path.parent if in_run and not any(override.startswith("name=") for override in overrides) else None
    try:
        _absolute_paths(raw, path.parent.absolute(), strict=True)
        for override in overrides:
            _override(raw, override)
        _absolute_paths(raw, Path.cwd(), strict=False)
        return build_recipe(raw, home)
    except UsageError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None  # names may hold line breaks


def build_recipe(raw: Mapping[str, Any], home: Path | None = None) -> Recipe:
    """A recipe from plain data, as YAML gives it.

    Raises:
        UsageError: one line that names the key and the fix.
    """
    if old := [key for key in _OLD_KEYS if key in raw]:
        raise UsageError(
            f"a recipe of an older form (`{old[0]}`): trees, datasets, students and evaluations are named now; "
            "docs/migration.md has every old key beside the new one, `cotree init` writes a new recipe"
        )
    for key in raw:
        if key not in (known := ("name", "seed", "models", *KINDS)):
            hint = f"it is a setting of an entry of `{_HOMES[key]}`" if key in _HOMES else nearest(key, known)
            raise UsageError(f"unknown key `{key}`; {hint}")
    sections = {key: raw.get(key) or {} for key in ("models", *KINDS)}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise UsageError(f"`{key}` must be a section of named entries, like {{NAME: {{...}}}}")
        if wrong := [name for name in section if not isinstance(name, str)]:
            raise UsageError(f"{key}: the name {wrong[0]!r} is no text for YAML; put it in quotes")
    name, seed = raw.get("name"), raw.get("seed", 0)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError("`name` is missing, or has other signs than letters, digits, `.`, `_` and `-`")
    if type(seed) is not int:
        raise UsageError(f"`seed` must be a whole number, not {seed!r}")
    if not any(sections[kind] for kind in KINDS):
        raise UsageError("the recipe makes nothing: it has no trees, datasets, students or evaluations")
    models = {key: parse_section(Model, value, f"models.{key}") for key, value in sections["models"].items()}
    entries = resolve_entries({kind: sections[kind] for kind in KINDS}, models)
    nodes = {node.id: node for node in (_node(entry, seed) for entry in entries)}
    recipe = Recipe(name, seed, models, _ordered(nodes), raw, home)
    _check_models(recipe)
    return replace(recipe, nodes={key: _with_tokenizer(recipe, node) for key, node in recipe.nodes.items()})


def recipe_yaml(recipe: Recipe) -> str:
    """What the run folder keeps: the recipe as it was given, overrides applied, paths absolute, revisions pinned."""
    return yaml.safe_dump(dict(recipe.written), sort_keys=False, allow_unicode=True)


def _node(entry: Entry, seed: int) -> Node:
    where = f"{entry.kind}.{entry.name}"
    if len(folder_name(entry.name)) > _LONGEST_NAME:
        raise UsageError(
            f"{entry.kind}.{entry.entry}: its name with the swept values is too long for a folder; shorten it"
        )
    seed = seed if entry.seed is None else entry.seed
    settings: Trees | Dataset | Student | Evaluation
    if entry.kind == "trees":
        settings = trees = parse_section(Trees, entry.values, where)
        _tasks_known(trees.questions, where)
        reads = [f"trees/{trees.tokens_of}"] if trees.tokens_of else []
        reads += [f"students/{name}" for name in trees.writers]
    elif entry.kind == "datasets":
        settings = data = parse_section(Dataset, entry.values, where)
        reads = [f"trees/{name}" for name in data.trees]
        reads += [f"datasets/{name}" for name in (data.size_of, data.questions_of) if name]
    elif entry.kind == "students":
        settings = student = _student(entry.values, where)
        reads = [f"students/{student.parent}", f"datasets/{student.data}"]
    else:
        settings = evaluation = parse_section(Evaluation, entry.values, where)
        _tasks_known(evaluation.questions, where)
        reads = [f"students/{name}" for name in evaluation.models]
        reads += [f"evaluations/{evaluation.tokens_of}"] if evaluation.tokens_of else []
    return Node(entry.kind, entry.name, entry.entry, entry.like, seed, settings, tuple(dict.fromkeys(reads)))


def _student(values: Mapping[str, Any], where: str) -> Student:
    rest = dict(values)
    own = {key: rest.pop(key, None) for key in ("from", "method", "data")}
    for key, value in own.items():
        if not isinstance(value, str):
            what = {"from": "the model or student it starts from", "method": " or ".join(METHODS), "data": "a dataset"}
            raise UsageError(f"`{where}.{key}` is missing, or no name; give {what[key]}")
    if own["method"] not in METHODS:
        raise UsageError(f"{where}.method: unknown method `{own['method']}`; {nearest(own['method'], METHODS)}")
    training = METHODS[str(own["method"])].settings
    return Student(str(own["from"]), str(own["method"]), str(own["data"]), parse_section(training, rest, where))


def _tasks_known(questions: Iterable[str], where: str) -> None:
    for name in questions:
        if name not in TASKS and not is_own_task(name):
            raise UsageError(f"{where}.questions: unknown task `{name}`; {nearest(name, TASKS)}")


def _ordered(nodes: Mapping[str, Node]) -> dict[str, Node]:
    """The nodes, each after those that it reads, otherwise kind after kind as they are written; models are no nodes."""
    reads = {node.id: [name for name in node.reads if name in nodes] for node in nodes.values()}
    sorter = graphlib.TopologicalSorter(reads)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        raise UsageError(f"{' -> '.join(reversed(error.args[1]))} is a circle: a node cannot need itself") from None
    place = {name: index for index, name in enumerate(nodes)}
    ordered: dict[str, Node] = {}
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=place.__getitem__)
        first = ready.pop(0)
        ordered[first] = replace(nodes[first], reads=tuple(reads[first]))
        sorter.done(first)
    return ordered


def _check_models(recipe: Recipe) -> None:
    """That every model can do what is asked of it: write, score, or be trained."""

    def scores(name: str) -> bool:
        return name in recipe.models and recipe.models[name].mode == "pooling"

    for node in recipe.nodes.values():
        where = f"{node.kind}.{node.name}"
        if isinstance(node.settings, Trees):
            process = node.settings.reward.process if node.settings.reward is not None else None
            writers = [name for name in node.settings.writers if name != process]
            if process is not None and not scores(process):
                raise UsageError(f"{where}.reward.process: `{process}` writes; it needs a model with `mode: pooling`")
        elif isinstance(node.settings, Evaluation):
            writers = list(node.settings.models)
        else:
            writers = []
        if wrong := [name for name in writers if scores(name)]:
            raise UsageError(f"{where}: `{wrong[0]}` is `mode: pooling`, which scores and writes nothing")
        if isinstance(node.settings, Dataset):
            own = [kind for name in node.settings.trees for kind in recipe.nodes[f"trees/{name}"].trees.thoughts]
            for kind in node.settings.leave_out:
                if kind not in (known := [*THOUGHT_TYPES, *own]):
                    raise UsageError(f"{where}.leave_out: unknown thought type `{kind}`; {nearest(kind, known)}")
        if isinstance(node.settings, Student):
            root = recipe.root_model(node.name)
            if recipe.models[root].weights is None:
                raise UsageError(f"{where}.from: `{root}` is a server; a student's weights must be here")
            rows, needed = (
                recipe.nodes[f"datasets/{node.settings.data}"].dataset.rows,
                METHODS[node.settings.method].rows,
            )
            if rows != needed and not (needed == "dpo" and rows == "step_pairs"):
                raise UsageError(
                    f"{where}: {node.settings.method} trains on {needed} rows, `{node.settings.data}` has {rows}"
                )


def _with_tokenizer(recipe: Recipe, node: Node) -> Node:
    """The node; a dataset's with the model whose tokens count named."""
    if not isinstance(node.settings, Dataset) or node.settings.tokenizer is not None:
        return node
    readers = [student for student in recipe.of_kind("students") if student.student.data == node.name]
    weights = [name for name, model in recipe.models.items() if model.weights is not None]
    candidates = list(dict.fromkeys(recipe.root_model(student.name) for student in readers)) or weights
    if len(candidates) != 1:
        several = f"; {', '.join(candidates)} could be meant" if candidates else ""
        raise UsageError(f"datasets.{node.name}: name the model whose tokens count, `tokenizer: MODEL`{several}")
    return replace(node, settings=node.settings.model_copy(update={"tokenizer": candidates[0]}))


def _override(raw: dict[str, Any], override: str) -> None:
    """Change one value of a written recipe; entries that are like the changed one follow."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"`{override}` is no override; write it as key.subkey=value, e.g. students.dpo.beta=0.3")
    *sections, last = key.split(".")
    if sections and sections[0] in KINDS and len(sections) > 1 and sections[1] not in (raw.get(sections[0]) or {}):
        raise UsageError(f"`{override}`: unknown {sections[0]} entry `{sections[1]}`; "
                         f"{nearest(sections[1], raw.get(sections[0]) or {})}")  # fmt: skip
    place: Any = raw
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise UsageError(f"`{override}`: `{section}` is a value, not a section")
    place[last] = parse_value(text, override)


def _absolute_paths(raw: dict[str, Any], folder: Path, *, strict: bool) -> None:
    """Make a written recipe's paths absolute: those that exist in `folder`, and (strict) what can only be a path."""

    def absolute(value: Any, *, path: bool = False) -> Any:
        if not isinstance(value, str) or not value or "://" in value:
            return value
        file, colon, attribute = value.partition(":")
        place = os.path.abspath(folder / os.path.expanduser(file))
        must_be_path = path or (value.endswith(".gguf") and not colon)
        return f"{place}{colon}{attribute}" if os.path.exists(place) or (strict and must_be_path) else value

    def entries(kind: str) -> list[dict[str, Any]]:
        section = raw.get(kind)
        return [entry for entry in section.values() if isinstance(entry, dict)] if isinstance(section, dict) else []

    for model in entries("models"):
        model.update({key: absolute(model[key]) for key in ("weights", "base", "tokenizer") if key in model})
    for dataset in entries("datasets"):
        if "file" in dataset:
            dataset["file"] = absolute(dataset["file"], path=True)
    for node in [*entries("trees"), *entries("evaluations")]:
        if isinstance(node.get("questions"), dict):
            node["questions"] = {
                absolute(name) if is_own_task(str(name)) else name: n for name, n in node["questions"].items()
            }
        if isinstance(node.get("reward"), dict) and ".py:" in str(node["reward"].get("function")):
            node["reward"]["function"] = absolute(node["reward"]["function"])
