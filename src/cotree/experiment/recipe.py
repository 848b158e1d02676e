"""Load a recipe: one YAML file that describes an experiment of named trees, datasets, students and evaluations.

A loaded recipe is complete and consistent: defaults are filled in, all names are known, and there are no cycles.
`Recipe.nodes` is topologically sorted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from cotree.base.atomic import write_text
from cotree.base.errors import UsageError
from cotree.base.progress import one_line
from cotree.base.run_folder import KINDS, Kind, find_run, folder_name
from cotree.base.settings import LONGEST_NAME, Section, apply_override, nearest, parse_section, require_name
from cotree.data.settings import Dataset
from cotree.eval.settings import Evaluation
from cotree.experiment.entries import Entry, resolve_entries, sort_by_need
from cotree.models.settings import Model
from cotree.search.settings import Trees
from cotree.search.thoughts import THOUGHT_TYPES
from cotree.tasks import TASKS, is_own_task
from cotree.train.settings import METHODS, Optimizer

_OLD_KEYS = ("tasks", "search", "build", "train", "eval", "roles")
_OF_TREES = ("thoughts", "patterns", "rollouts", "questions")  # of trees, often written one level too high
# Keys whose values may be paths; so may the task names in `questions`.
_PATHS = {
    "models": ("weights", "tokenizer"),
    "trees": ("function", "file", "parquet"),
    "datasets": ("file",),
    "evaluations": (),
}
S = TypeVar("S")


@dataclass(frozen=True)
class Student:
    """A `students` node: trains a model or another student (`from`) with a method on a dataset.

    training: the method's settings (`train.settings`).
    """

    parent: str
    method: str
    data: str
    training: Optimizer


@dataclass(frozen=True)
class Node(Generic[S]):
    """A node of the experiment's graph.

    kind, name: together its id, "students/dpo". entry: its name in the recipe, without swept values and seed. like: the
    entry that it copies. settings: a Trees, Dataset, Student or Evaluation, by its kind. reads: the ids of the nodes
    that it needs ("trees/train").
    """

    kind: Kind
    name: str
    entry: str
    like: str | None
    seed: int
    settings: S
    reads: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Kind and name: "students/dpo"."""
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    nodes: {id: node}, topologically sorted. written: the recipe as given, with overrides and absolute paths, as saved
    in the run folder. home: the run folder that it was read from, else None.
    """

    name: str
    seed: int
    models: Mapping[str, Model]
    nodes: Mapping[str, Node[Any]]
    written: Mapping[str, Any]
    home: Path | None = None

    def of_kind(self, kind: Kind) -> list[Node[Any]]:
        """The nodes of one kind, in order."""
        return [node for node in self.nodes.values() if node.kind == kind]

    def root_model(self, name: str) -> str:
        """The model that a student's training started from, through all parents; a model itself."""
        while name not in self.models:
            name = self.nodes[f"students/{name}"].settings.parent
        return name

    def with_needed(self, wanted: Iterable[str]) -> list[str]:
        """The ids of the wanted nodes and all their dependencies, in order.

        Args:
            wanted: ids, entries ("students/alpha": all its nodes), or kinds ("trees").

        Raises:
            UsageError: an unknown name; the message suggests the nearest.
        """
        found: set[str] = set()
        for name in wanted:
            meant = [n.id for n in self.nodes.values() if name in (n.id, f"{n.kind}/{n.entry}", n.kind)]
            if not meant:
                known = [n.id for n in self.nodes.values() if n.name == name] or [*self.nodes, *KINDS]
                hint = f"did you mean `{known[0]}`?" if len(known) == 1 else nearest(name, known)
                raise UsageError(f"--only: unknown node `{name}`; {hint}")
            found.update(meant)
        for node in reversed(list(self.nodes.values())):
            if node.id in found:
                found.update(node.reads)
        return [name for name in self.nodes if name in found]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe (a YAML file, or a run folder with its saved recipe) and apply `a.b.c=value` overrides.

    Raises:
        UsageError: one line that names the file, the key and the fix.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "manifest.json").is_file():
            find_run(path)  # raises a helpful error
        if not (path / "recipe.yaml").is_file():
            raise UsageError(f"{path} is a folder without a recipe.yaml; name a recipe file, or a run folder")
        path = path / "recipe.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no recipe at {path}; `cotree init` writes one to start from") from None
    except yaml.MarkedYAMLError as error:  # without quoting the line, which may contain a key
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"cannot read {path}: {place}{error.problem or error.context}; correct it") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} holds no recipe: expected keys like `name`, `models`, `trees`")
    in_run = path.name == "recipe.yaml" and (path.parent / ".lock").is_file()
    home = path.parent if in_run and not any(override.startswith("name=") for override in overrides) else None
    try:
        _make_paths_absolute(raw, path.parent.absolute(), strict=True)
        for override in overrides:
            _override(raw, override)
        _make_paths_absolute(raw, Path.cwd(), strict=False)
        return build_recipe(raw, home)
    except UsageError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None  # names may contain line breaks


def build_recipe(raw: Mapping[str, Any], home: Path | None = None) -> Recipe:
    """Build a recipe from plain data, as YAML gives it.

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
            hint = "it is a setting of an entry of `trees`" if key in _OF_TREES else nearest(key, known)
            raise UsageError(f"unknown key `{key}`; {hint}")
    sections = {key: raw.get(key) or {} for key in ("models", *KINDS)}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise UsageError(f"`{key}` must be a section of named entries, like {{NAME: {{...}}}}")
        if wrong := [name for name in section if not isinstance(name, str)]:
            raise UsageError(f"{key}: the name {wrong[0]!r} is no text for YAML; put it in quotes")
    name, seed = raw.get("name"), raw.get("seed", 0)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise UsageError("`name` is missing, or has other signs than at most 200 letters, digits, `.`, `_` and `-`")
    if type(seed) is not int:
        raise UsageError(f"`seed` must be a whole number, not {seed!r}")
    if not any(sections[kind] for kind in KINDS):
        raise UsageError("the recipe makes nothing: it has no trees, datasets, students or evaluations")
    models = {
        require_name(key, "models"): parse_section(Model, value, f"models.{key}")
        for key, value in sections["models"].items()
    }
    entries = resolve_entries({kind: sections[kind] for kind in KINDS}, models)
    nodes = {node.id: node for node in (_node(entry, seed) for entry in entries)}
    order = sort_by_need({key: node.reads for key, node in nodes.items()})
    recipe = Recipe(name, seed, models, {key: nodes[key] for key in order}, raw, home)
    for node in recipe.nodes.values():
        _check_fit(recipe, node)
    return replace(recipe, nodes={key: _with_tokenizer(recipe, node) for key, node in recipe.nodes.items()})


def recipe_yaml(recipe: Recipe) -> str:
    """The YAML saved in the run folder: the recipe as given, with overrides, absolute paths and pinned revisions."""
    return yaml.safe_dump(dict(recipe.written), sort_keys=False, allow_unicode=True)


def write_starter(path: Path) -> str:
    """Write a commented starter recipe with every kind of node; returns a line about next steps.

    Raises:
        UsageError: the file exists.
    """
    if path.exists():
        raise UsageError(f"{path} is there already; name another file")
    name = path.stem if re.fullmatch(r"[A-Za-z]\w*", path.stem, re.ASCII) else "mine"
    starter = files("cotree.experiment").joinpath("starter.yaml").read_text(encoding="utf-8")
    write_text(path, starter.replace("{file}", one_line(str(path))).replace("{name}", name))
    return f"{path}: a recipe to start from; `cotree plan {path}` shows what it would do"


def _node(entry: Entry, seed: int) -> Node[Any]:
    """Build a node and validate its settings, without other nodes."""
    where = f"{entry.kind}.{entry.name}"
    if len(folder_name(entry.name)) > LONGEST_NAME:
        where = f"{entry.kind}.{entry.entry}"
        raise UsageError(f"{where}: its name with the swept values is too long for a folder; shorten it")
    sections: dict[Kind, type[Section]] = {"trees": Trees, "datasets": Dataset, "evaluations": Evaluation}
    if entry.kind == "students":
        settings: Any = _student(entry.values, where)
    else:
        settings = parse_section(sections[entry.kind], entry.values, where)
    for name in getattr(settings, "questions", ()):  # of trees and evaluations
        if is_own_task(name):
            file = re.sub(r"(?<=\.py):\w*$", "", name)
            if not os.path.isfile(file):
                raise UsageError(f"{where}.questions: no task file at {file}")
        elif name not in TASKS:
            raise UsageError(f"{where}.questions: unknown task `{name}`; {nearest(name, TASKS)}")
    seed = seed if entry.seed is None else entry.seed
    return Node(entry.kind, entry.name, entry.entry, entry.like, seed, settings, entry.reads)


def _student(values: Mapping[str, Any], where: str) -> Student:
    training = dict(values)
    parent, method, data = (training.pop(key, None) for key in ("from", "method", "data"))
    if not isinstance(data, str):
        raise UsageError(f"`{where}.data` is missing, or no name; give a dataset")
    if method not in [*METHODS]:
        raise UsageError(f"{where}.method: unknown method `{method}`; {nearest(method, METHODS)}")
    return Student(parent, method, data, parse_section(METHODS[method], training, where))


def _check_fit(recipe: Recipe, node: Node[Any]) -> None:
    """Check a node against those that it reads: models can generate, score or be trained as required, and the rows are
    of the kind that the method trains on."""
    where, settings = f"{node.kind}.{node.name}", node.settings
    writers: list[str] = []
    if isinstance(settings, Trees):
        process = settings.reward.process if settings.reward is not None else None
        writers = [name for name in settings.writers if name != process]
        if process is not None and not (process in recipe.models and recipe.models[process].mode == "pooling"):
            raise UsageError(f"{where}.reward.process: `{process}` writes; it needs a model with `mode: pooling`")
    elif isinstance(settings, Evaluation):
        writers = [*settings.models]
        if settings.tokens_of is not None:
            there = recipe.nodes[f"evaluations/{settings.tokens_of}"].settings.models
            if lacking := [name for name in writers if name not in there]:
                raise UsageError(f"{where}.tokens_of: `{settings.tokens_of}` does not ask `{lacking[0]}`; add it there")
    elif isinstance(settings, Dataset):
        own = [kind for name in settings.trees for kind in recipe.nodes[f"trees/{name}"].settings.thoughts]
        for kind in settings.leave_out:
            if kind not in (known := [*THOUGHT_TYPES, *own]):
                raise UsageError(f"{where}.leave_out: unknown thought type `{kind}`; {nearest(kind, known)}")
    elif isinstance(settings, Student):
        root = recipe.root_model(node.name)
        if recipe.models[root].weights is None:
            raise UsageError(f"{where}.from: `{root}` is a server; a student's weights must be here")
        rows, needed = recipe.nodes[f"datasets/{settings.data}"].settings.rows, settings.training.row_kind
        if rows != needed and (needed, rows) != ("dpo", "step_pairs"):
            raise UsageError(f"{where}: {settings.method} trains on {needed} rows, `{settings.data}` has {rows}")
    for name in writers:
        if name in recipe.models and recipe.models[name].mode == "pooling":
            raise UsageError(f"{where}: `{name}` is `mode: pooling`, which scores and writes nothing")


def _with_tokenizer(recipe: Recipe, node: Node[Any]) -> Node[Any]:
    """Fill in a dataset's `tokenizer`: as set, else the model of its students, else the only model with weights."""
    if node.kind != "datasets":
        return node
    readers = [student.name for student in recipe.of_kind("students") if student.settings.data == node.name]
    weights = [name for name, model in recipe.models.items() if model.weights is not None]
    candidates = list(dict.fromkeys(map(recipe.root_model, readers))) or weights
    if node.settings.tokenizer is not None:
        candidates = [node.settings.tokenizer]
    if len(candidates) != 1:
        several = f"; {', '.join(candidates)} could be meant" if candidates else ""
        raise UsageError(f"datasets.{node.name}: name the model whose tokens count, `tokenizer: MODEL`{several}")
    model = recipe.models[recipe.root_model(candidates[0])]
    if model.weights is None and model.tokenizer is None:
        raise UsageError(f"model `{candidates[0]}` has no tokenizer to count with; give it `tokenizer`")
    return replace(node, settings=node.settings.model_copy(update={"tokenizer": candidates[0]}))


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply one `a.b.c=value` override to a recipe's data, before `like` is resolved."""
    key = override.partition("=")[0]
    if key == override and override.partition("/")[0] in KINDS:
        raise UsageError(f"`{override}` is a node or a kind, no setting; write --only before each: --only {override}")
    kind, *names = key.split(".")
    entries = raw.get(kind) or {}
    if kind in ("models", *KINDS) and len(names) > 1 and names[0] not in entries:
        raise UsageError(f"`{key}`: unknown {kind} entry `{names[0]}`; {nearest(names[0], entries)}")
    apply_override(raw, override, "students.dpo.beta=0.3")


def _make_paths_absolute(raw: dict[str, Any], folder: Path, *, strict: bool) -> None:
    """Make paths in a recipe's data absolute: those that exist in `folder`, and (strict) values that must be paths."""

    def absolute(value: Any, key: str) -> Any:
        if not isinstance(value, str) or not value or "://" in value:
            return value
        if (key == "questions" and not is_own_task(value)) or (key == "function" and ".py:" not in value):
            return value
        file, colon, attribute = value.partition(":")
        place = os.path.abspath(folder / os.path.expanduser(file))
        must_be_path = key == "file" or (value.endswith(".gguf") and not colon)
        if key == "parquet":  # a pattern, which need not exist
            return os.path.abspath(folder / os.path.expanduser(value))
        return f"{place}{colon}{attribute}" if os.path.exists(place) or (strict and must_be_path) else value

    def replaced(value: Any, keys: Sequence[str], key: str = "") -> Any:
        if isinstance(value, dict):
            return {absolute(n, key) if key == "questions" else n: replaced(item, keys, n) for n, item in value.items()}
        if isinstance(value, list):
            return [replaced(item, keys, key) for item in value]
        return absolute(value, key) if key in keys else value

    for section in raw.keys() & _PATHS.keys():
        raw[section] = replaced(raw[section], _PATHS[section])
