"""Fingerprints: one hash per node of everything that affects its content. Equal fingerprints mean equal content.

A fingerprint covers the node's settings (`hashed_settings`, without those marked `NOT_CONTENT`), the content of its
external inputs (questions, weights, files), and the fingerprints of the nodes that it reads. Names are not part of it,
so renaming a model, a node or a run changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.run_folder import Kind
from cotree.base.settings import hashed_settings
from cotree.base.shards import Shard, rank_of
from cotree.data.annotations import ChainAnnotation, Key, chain_annotations
from cotree.data.rollouts import read_rollouts
from cotree.data.settings import Dataset
from cotree.eval.asking import load_questions
from cotree.eval.settings import Evaluation
from cotree.experiment.recipe import Node, Recipe, Student
from cotree.models.checksums import file_sha256
from cotree.models.resolve import identity, serving
from cotree.models.settings import GGUFType
from cotree.search.settings import Trees
from cotree.tasks import Question
from cotree.tasks.base import VERDICT_VERSION, Asked
from cotree.tasks.decontamination import contaminated
from cotree.train.settings import TRAINING_VERSION

# Raised when the code changes what a node of this kind makes from the same inputs.
CONTENT_VERSION: Mapping[Kind, int] = {"trees": 2, "datasets": 3, "students": TRAINING_VERSION, "evaluations": 1}


@dataclass(frozen=True)
class Fingerprint:
    """The hashes of everything that affects a node's content.

    of: the fingerprint. base: the same without the questions, because trees and answers are stored by question. parts:
    the hashed values, {`a.b`: value}, to report which key changed.
    """

    of: str
    base: str
    parts: Mapping[str, Any]


class Fingerprints:
    """Computes and caches the fingerprints of a recipe's nodes; reads questions and files, calls no server."""

    def __init__(
        self, recipe: Recipe, shard: Shard | None = None, *, run: Path | None = None, whole: Fingerprints | None = None
    ) -> None:
        """With a shard, trees and evaluations cover its questions only; other nodes are taken from `whole`.

        Args:
            run: the run folder with annotations, if any.
            whole: fingerprints over all questions, if computed already.
        """
        self.recipe, self.shard, self._run = recipe, shard, run
        self.whole: Fingerprints = self if shard is None else whole or Fingerprints(recipe, run=run)
        self._dealt: dict[tuple[str, int], list[list[Asked]]] = {}
        self._found: dict[tuple[str, str | None], Fingerprint] = {}
        self._questions: dict[str, list[Asked]] = {}
        self._annotations: dict[tuple[str, ...], dict[Key, ChainAnnotation]] = {}

    def of(self, node_id: str, model: str | None = None) -> Fingerprint:
        """The fingerprint of a node, or of one model's cell of an evaluation.

        Raises:
            UsageError: an input is missing (questions, weights, a file).
        """
        key = (node_id, model)
        if key not in self._found:
            node = self.recipe.nodes[node_id]
            if self.shard is not None and node.kind in ("datasets", "students"):
                return self.whole.of(node_id)
            if model is not None:
                self._found[key] = self._cell(node, model)
            else:
                make: dict[Kind, Callable[[Node[Any]], Fingerprint]]
                make = {"trees": self._trees, "datasets": self._dataset, "students": self._student}
                self._found[key] = make[node.kind](node)
        return self._found[key]

    def _cell(self, node: Node[Evaluation], model: str) -> Fingerprint:
        parts = _flatten(hashed_settings(node.settings), leave_out=("models", "questions", "split", "tokens_of"))
        parts |= {"version": CONTENT_VERSION["evaluations"], "model": self._writer(model, node.settings.gguf)}
        return self._with_questions(node, parts, model)

    def _trees(self, node: Node[Trees]) -> Fingerprint:
        settings = node.settings
        if settings.file is not None:  # its questions contain a hash of the rollouts
            parts = hashed_settings(settings)
            del parts["file"]
            parts |= {"tokenizer": self._tokenizer(str(settings.tokenizer)), "version": CONTENT_VERSION["trees"]}
            return self._with_questions(node, parts)
        named = ("questions", "roles", "split", "tokens_of", "reward", "patterns", "parquet")
        parts = _flatten(hashed_settings(settings), leave_out=named)
        for name, matrix in settings.patterns.items():  # the order within a row matters: thoughts are generated in it
            parts |= {
                f"patterns.{name}.{kind}": [[*next_type] for next_type in row.items()] for kind, row in matrix.items()
            }
        for role, writers in settings.roles.items():
            parts[f"roles.{role}"] = [hashed_settings(w) | {"model": self._writer(w.model)} for w in writers]
        if (reward := settings.reward) is not None:
            parts["reward"] = hashed_settings(reward)
            for key in {"judge", "process"} & parts["reward"].keys():
                parts["reward"][key] = self._writer(getattr(reward, key))
            file, _, function = (reward.function or "").rpartition(":")
            if file.endswith(".py"):
                parts["reward"]["function"] = [function, _file_hash(file)]
        parts |= {"version": CONTENT_VERSION["trees"], "verdicts": VERDICT_VERSION, "seed": node.seed}
        return self._with_questions(node, parts)

    def _with_questions(self, node: Node[Any], parts: dict[str, Any], model: str | None = None) -> Fingerprint:
        """Add the questions to `parts`; without them, `parts` gives the base, as results are stored by question."""
        base = dict(parts)
        if node.settings.tokens_of is not None:
            other = self.of(f"{node.kind}/{node.settings.tokens_of}", model)
            parts["tokens_of"], base["tokens_of"] = other.of, other.base
        if isinstance(node.settings, Trees) and node.settings.parquet:
            known = None if self.shard is None else self.whole.of(node.id).parts["parquet"]
            parts["parquet"] = known or sorted(map(file_sha256, node.settings.parquet_files()))
        asked = sorted(self.questions(node), key=lambda each: each[0].name)  # not the recipe's order
        parts["questions"] = _hash([task.content_of(question) for task, question in asked])
        parts["verdicts"] = VERDICT_VERSION  # stored answers are judged again
        return Fingerprint(_hash(parts), _hash(base), parts)

    def _dataset(self, node: Node[Dataset]) -> Fingerprint:
        settings = node.settings
        named = ("trees", "file", "hub", "tokenizer", "size_of", "questions_of")
        parts = _flatten(hashed_settings(settings), leave_out=named)
        tokenizer = self._tokenizer(str(settings.tokenizer))
        parts |= {"version": CONTENT_VERSION["datasets"], "seed": node.seed, "tokenizer": tokenizer}
        if settings.trees:
            parts["trees"] = [self.of(f"trees/{name}").of for name in settings.trees]
            if settings.annotations is not None:
                made = self.annotations(node).items()
                parts["annotations.made"] = _hash(sorted([*key, *astuple(said)] for key, said in made))
            if settings.judges_again:  # changed texts are verified again
                parts["verdicts"] = VERDICT_VERSION
        elif settings.file is not None:
            parts["file"] = _file_hash(settings.file)
        elif "@" not in str(settings.hub):
            raise UsageError(f"{settings.hub} has no revision yet; a run asks the hub for the newest and keeps it")
        else:
            parts["hub"] = settings.hub
        for key in ("size_of", "questions_of"):
            if name := getattr(settings, key):
                parts[key] = self.of(f"datasets/{name}").of
        if settings.gates.contamination and settings.trees:
            parts["contaminated"] = _hash(sorted(self.contaminated(node)))
        elif settings.gates.contamination:  # rows of a file are checked against all held-out questions
            held_out = [json.dumps([question.task, question.id, question.messages]) for question in self.held_out]
            parts["contaminated"] = _hash(sorted(held_out))
        return Fingerprint(_hash(parts), _hash(parts), parts)

    def annotations(self, node: Node[Dataset]) -> dict[Key, ChainAnnotation]:
        """The annotations of a dataset's trees; cached at the first call, so that later edits do not matter."""
        configs = tuple(self.of(f"trees/{name}").base for name in node.settings.trees)
        if configs not in self._annotations:
            self._annotations[configs] = {} if self._run is None else chain_annotations(self._run, configs)
        return self._annotations[configs]

    def _student(self, node: Node[Student]) -> Fingerprint:
        settings = node.settings
        parts = _flatten(hashed_settings(settings.training))
        parts |= {"version": CONTENT_VERSION["students"], "seed": node.seed, "method": settings.method}
        if settings.parent in self.recipe.models:
            parts["from"] = str(identity(self.recipe.models[settings.parent])["weights"])
        else:
            parts["from"] = self.of(f"students/{settings.parent}").of
        parts["data"] = self.of(f"datasets/{settings.data}").of
        return Fingerprint(_hash(parts), _hash(parts), parts)

    def _tokenizer(self, name: str) -> str:
        """The identity of a model's or student's tokenizer."""
        counting = identity(self.recipe.models[self.recipe.root_model(name)])
        return str(counting.get("tokenizer") or counting["weights"])

    def _writer(self, name: str, gguf: GGUFType | None = None) -> dict[str, Any]:
        """The identity of a model or student as a writer: weights and serving settings, or a served model's name."""
        root = self.recipe.models[self.recipe.root_model(name)]
        if name in self.recipe.models:
            return identity(root, gguf)
        return {"student": self.of(f"students/{name}").of} | serving(root, gguf)

    def questions(self, node: Node[Trees] | Node[Evaluation]) -> list[Asked]:
        """The questions of a trees or evaluations node, each with its task; for trees sorted by task name, which fixes
        the order of dataset rows.

        Raises:
            UsageError: a task has fewer, its data is missing, or two questions have the same name.
        """
        settings, counts = node.settings, node.settings.questions
        if isinstance(settings, Trees):
            counts = dict(sorted(counts.items()))
        if self.shard is not None:
            return self.whole.questions_by_shard(node, self.shard.world_size)[self.shard.rank]
        file = (settings.file, settings.task) if isinstance(settings, Trees) and settings.file is not None else None
        key = json.dumps([settings.split, counts, file])
        if key not in self._questions:
            self._questions[key] = (
                read_rollouts(Path(file[0]), file[1]).asked if file else load_questions(counts.items(), settings.split)
            )
        return self._questions[key]

    def questions_by_shard(self, node: Node[Trees] | Node[Evaluation], world_size: int) -> list[list[Asked]]:
        """The questions of a node, split by shard."""
        if (node.id, world_size) not in self._dealt:
            shards: list[list[Asked]] = [[] for _ in range(world_size)]
            for task, question in self.questions(node):
                shards[rank_of(task.name, question.id, world_size)].append((task, question))
            self._dealt[node.id, world_size] = shards
        return self._dealt[node.id, world_size]

    @cached_property
    def held_out(self) -> list[Question]:
        """All dev and test questions of the recipe's evaluations."""
        held_out = [node for node in self.recipe.of_kind("evaluations") if node.settings.split != "train"]
        asked = [question for node in held_out for _, question in self.questions(node)]
        return list({(question.task, question.id): question for question in asked}.values())

    def contaminated(self, node: Node[Dataset]) -> set[tuple[str, str]]:
        """(task, id) of a dataset's tree questions that overlap with an evaluation."""
        found: set[tuple[str, str]] = set()
        for name in node.settings.trees:
            for task, asked in groupby(self.questions(self.recipe.nodes[f"trees/{name}"]), key=lambda each: each[0]):
                generated = [task.name] if task.generated else []
                repeated = contaminated([question for _, question in asked], self.held_out, generated=generated)
                found |= {(task.name, id_) for id_ in repeated}
        return found


def _flatten(settings: Mapping[str, Any], at: str = "", leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Flatten nested settings to dotted keys: {"stop": {"correct": 3}} -> {"stop.correct": 3}."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key in leave_out:
            continue
        if isinstance(value, Mapping):
            found |= _flatten(value, f"{at}{key}.") or {f"{at}{key}": {}}
        else:
            found[f"{at}{key}"] = value
    return found


def _file_hash(path: str) -> str:
    if not os.path.isfile(path):  # also False for impossible paths
        raise UsageError(f"no file at {path}")
    return file_sha256(Path(path))


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
