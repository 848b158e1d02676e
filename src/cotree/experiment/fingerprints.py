"""Fingerprints: what decides the content of a node, as one hash. Equal fingerprints are equal content; nothing else is.

A fingerprint is made of the node's own content-deciding settings (`base.settings.content_of`), of the content of its
inputs that are no nodes (questions, weights, files), and of the fingerprints of the nodes that it reads. Names play no
part, so renaming a model, a node or a run changes nothing; neither do settings that are marked `NOT_CONTENT`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.run_folder import Kind
from cotree.base.settings import content_of
from cotree.eval.asking import load_questions
from cotree.experiment.recipe import Node, Recipe
from cotree.models.identity import file_sha256, identity
from cotree.models.settings import GGUFType
from cotree.tasks import Question
from cotree.tasks.base import VERDICT_VERSION, Asked
from cotree.tasks.decontamination import contaminated

# Raised when the code changes what a node of this kind makes from the same inputs.
CONTENT_VERSION: Mapping[Kind, int] = {"trees": 1, "datasets": 1, "students": 1, "evaluations": 1}


@dataclass(frozen=True)
class Fingerprint:
    """of: the whole content. base: without the set of questions, by which trees and answers are kept.

    parts: what it was made of, `a.b` -> value, to say which key changed.
    """

    of: str
    base: str
    parts: Mapping[str, Any]


class Fingerprints:
    """The fingerprints of a recipe's nodes, computed once each; reads questions and files, asks no server."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._found: dict[tuple[str, str | None], Fingerprint] = {}
        self._questions: dict[str, list[Asked]] = {}

    def of(self, node_id: str) -> Fingerprint:
        """The fingerprint of a node; of an evaluation, of all its cells together.

        Raises:
            UsageError: an input is not here (questions, weights, a file).
        """
        key = (node_id, None)
        if key not in self._found:
            node = self.recipe.nodes[node_id]
            if node.kind == "evaluations":
                cells = [self.cell(node, model).of for model in node.evaluation.models]
                self._found[key] = Fingerprint(_hash(cells), _hash(cells), {"cells": cells})
            else:
                self._found[key] = {"trees": self._trees, "datasets": self._dataset, "students": self._student}[
                    node.kind
                ](node)
        return self._found[key]

    def cell(self, node: Node, model: str) -> Fingerprint:
        """The fingerprint of one model's cell of an evaluation."""
        key = (node.id, model)
        if key not in self._found:
            settings = node.evaluation
            parts = _flat(content_of(settings), leave_out=("models", "questions", "split", "tokens_of"))
            parts |= {"version": CONTENT_VERSION["evaluations"], "model": self.writer(model, settings.gguf)}
            base = dict(parts)
            if settings.tokens_of is not None:
                other = self.cell(self.recipe.nodes[f"evaluations/{settings.tokens_of}"], model)
                parts["tokens_of"], base["tokens_of"] = other.of, other.base
            parts |= {"questions": self.questions_hash(node), "verdicts": VERDICT_VERSION}
            self._found[key] = Fingerprint(_hash(parts), _hash(base), parts)
        return self._found[key]

    def _trees(self, node: Node) -> Fingerprint:
        settings = node.trees
        named = ("questions", "roles", "split", "tokens_of", "reward", "patterns")
        parts = _flat(content_of(settings), leave_out=named)
        for name, matrix in settings.patterns.items():  # the order of a row is that in which its thoughts are written
            parts |= {
                f"patterns.{name}.{kind}": [[*next_type] for next_type in row.items()] for kind, row in matrix.items()
            }
        for role, writers in settings.roles.items():
            parts[f"roles.{role}"] = [content_of(w) | {"model": self.writer(w.model)} for w in writers]
        if settings.reward is not None:
            models = {key: self.writer(name) for key in ("judge", "process") if (name := getattr(settings.reward, key))}
            parts["reward"] = content_of(settings.reward) | models
            if settings.reward.function is not None and ".py:" in settings.reward.function:
                file = Path(settings.reward.function.rpartition(":")[0])
                parts["reward"] |= {"function": [settings.reward.function.rpartition(":")[2], _file(file)]}
        parts |= {"version": CONTENT_VERSION["trees"], "verdicts": VERDICT_VERSION, "seed": node.seed}
        base = dict(parts)
        if settings.tokens_of is not None:
            other = self.of(f"trees/{settings.tokens_of}")
            parts["tokens_of"], base["tokens_of"] = other.of, other.base
        parts["questions"] = self.questions_hash(node)
        return Fingerprint(_hash(parts), _hash(base), parts)

    def _dataset(self, node: Node) -> Fingerprint:
        settings = node.dataset
        named = ("trees", "file", "hub", "tokenizer", "size_of", "questions_of")
        parts = _flat(content_of(settings), leave_out=named)
        parts |= {
            "version": CONTENT_VERSION["datasets"],
            "seed": node.seed,
            "tokenizer": self.tokenizer(settings.tokenizer),
        }
        if settings.trees:
            parts["trees"] = [self.of(f"trees/{name}").of for name in settings.trees]
            if settings.reflections == "cut":  # what was cut is judged again
                parts["verdicts"] = VERDICT_VERSION
        elif settings.file is not None:
            parts["file"] = _file(Path(settings.file))
        elif "@" not in str(settings.hub):
            raise UsageError(f"{settings.hub} has no revision yet; a run asks the hub for the newest and keeps it")
        else:
            parts["hub"] = settings.hub
        for key in ("size_of", "questions_of"):
            if name := getattr(settings, key):
                parts[key] = self.of(f"datasets/{name}").of
        if settings.gates.contamination:
            parts["contaminated"] = self.contamination_hash(node)
        return Fingerprint(_hash(parts), _hash(parts), parts)

    def _student(self, node: Node) -> Fingerprint:
        settings = node.student
        parts = _flat(content_of(settings.training))
        parts |= {"version": CONTENT_VERSION["students"], "seed": node.seed, "method": settings.method}
        parts["from"], parts["data"] = self.weights(settings.parent), self.of(f"datasets/{settings.data}").of
        return Fingerprint(_hash(parts), _hash(parts), parts)

    def writer(self, name: str, gguf: GGUFType | None = None) -> dict[str, Any]:
        """What decides the text of a model or a student: weights and their GGUF type, or a served model's name."""
        if name in self.recipe.models:
            return identity(self.recipe.models[name], gguf)
        root = self.recipe.models[self.recipe.root_model(name)]
        return {"student": self.of(f"students/{name}").of, "gguf": gguf or root.gguf}

    def weights(self, name: str) -> str:
        """What is trained: a student's fingerprint, or the hash of a model's weights."""
        if name not in self.recipe.models:
            return self.of(f"students/{name}").of
        return str(identity(self.recipe.models[name])["weights"])

    def tokenizer(self, name: str | None) -> str:
        """Whose tokens count: the hash of the weights that carry the tokenizer, or its id or hash."""
        assert name is not None, "a loaded recipe has named it"
        found = identity(self.recipe.models[self.recipe.root_model(name)])
        if (content := found.get("tokenizer") or found.get("weights")) is None:
            raise UsageError(f"model `{name}` has no tokenizer to count with; give it `tokenizer`")
        return str(content)

    def questions(self, node: Node) -> list[Asked]:
        """The questions of a trees or evaluations node, each with its task; of trees in the order of the tasks' names,
        which is the order of the rows that are made of them.

        Raises:
            UsageError: a task has fewer, its rows are not here, or two questions have one name.
        """
        settings = node.evaluation if node.kind == "evaluations" else node.trees
        counts = settings.questions if node.kind == "evaluations" else dict(sorted(settings.questions.items()))
        key = json.dumps([settings.split, counts])
        if key not in self._questions:
            self._questions[key] = load_questions(counts.items(), settings.split)
        return self._questions[key]

    def questions_hash(self, node: Node) -> str:
        """A hash of the questions' content, whatever the order of their tasks."""
        asked = sorted(self.questions(node), key=lambda each: each[0].name)
        return _hash([known.content_of(question) for known, question in asked])

    @cached_property
    def held_out(self) -> list[Question]:
        """Every dev or test question that an evaluation of the recipe asks."""
        held_out = [node for node in self.recipe.of_kind("evaluations") if node.evaluation.split != "train"]
        asked = [question for node in held_out for _, question in self.questions(node)]
        return list({(question.task, question.id): question for question in asked}.values())

    def contaminated(self, node: Node) -> set[tuple[str, str]]:
        """(task, id) of the questions of a dataset's trees that repeat a question of an evaluation."""
        found: set[tuple[str, str]] = set()
        for name in node.dataset.trees:
            asked = self.questions(self.recipe.nodes[f"trees/{name}"])
            for known in {each.name: each for each, _ in asked}.values():
                mine = [question for each, question in asked if each.name == known.name]
                generated = [known.name] if known.generated else []
                found |= {(known.name, id_) for id_ in contaminated(mine, self.held_out, generated=generated)}
        return found

    def contamination_hash(self, node: Node) -> str:
        """What the gate leaves out: of trees a set of questions; of a file it depends on all held-out questions."""
        if node.dataset.trees:
            return _hash(sorted(self.contaminated(node)))
        return _hash(sorted(json.dumps([question.task, question.id, question.messages]) for question in self.held_out))


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The parts of two fingerprints that differ, sorted."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != json.loads(json.dumps(now.get(key))))


def _flat(settings: Mapping[str, Any], at: str = "", leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key in leave_out:
            continue
        if isinstance(value, Mapping):
            found |= _flat(value, f"{at}{key}.") or {f"{at}{key}": {}}
        else:
            found[f"{at}{key}"] = value
    return found


def _file(path: Path) -> str:
    if not os.path.isfile(path):  # False as well for what can be no path
        raise UsageError(f"no file at {path}")
    return file_sha256(path)


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
