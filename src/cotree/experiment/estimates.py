"""Estimate what bringing a node up to date costs: tokens, time, memory, disk and GPU-hours.

Tokens and seconds come from measurements in the run so far, else from the recipe; unknown values are None. Loads no
models and calls no servers: missing questions, rows or weights are replaced by the recipe's counts and model shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from cotree.base.errors import CotreeError, UsageError
from cotree.base.run_folder import NodeRecord, RunFolder
from cotree.data.settings import Dataset
from cotree.eval.settings import Evaluation
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.recipe import Node, Recipe, Student
from cotree.experiment.state import State
from cotree.models.weights import locate, parameter_count
from cotree.search.settings import Matrix, Search, Trees
from cotree.train.settings import Optimizer

_MB = 10**6
# Records round to tenths of seconds, so short work may have 0.
_LEAST_SECONDS = 0.05
# Assumed mean length of a thought as a share of `max_thought_tokens` (10.5 of 32 in laptop.yaml), and of a chain as a
# share of `max_chain_tokens`, before anything was measured.
_FILL = 1 / 3
# Assumed tokens of a question, and of a reply at most, before one was measured.
_QUESTION, _REPLY = 100, 600
# Assumed utilization of an H100's 989 dense bf16 TFLOP/s in training and in generation.
CARD_FLOPS, TRAINING_SHARE, WRITING_SHARE = 989e12, 0.4, 0.1


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a node; None where unknown.

    tokens: generated, or trained on. seconds: on this machine. gpu_hours: on an H100, at the utilization above.
    memory_mb: peak of training in each of its `processes`. disk_mb: peak of training, with checkpoints.
    """

    tokens: int | None = None
    seconds: float | None = None
    gpu_hours: float | None = None
    memory_mb: int | None = None
    disk_mb: int | None = None
    processes: int | None = None


class Estimates:
    """Estimates costs from the speeds and sizes measured in the run so far."""

    def __init__(self, recipe: Recipe, run: RunFolder, fingerprints: Fingerprints) -> None:
        self.recipe, self.run, self.fingerprints = recipe, run, fingerprints
        self.records, self.cells = run.nodes(), run.cells()

    def cost(self, node: Node[Any], left: Sequence[State]) -> Cost:
        """The cost of a node. left: its state, or those of an evaluation's unfinished cells.

        Raises:
            UsageError: unknown, because an input is missing.
        """
        if node.kind == "datasets" or (node.kind == "trees" and node.settings.file is not None):
            return Cost()
        if node.kind == "trees" and node.settings.parquet and not left[0].asks:
            return Cost()
        if node.kind == "students":
            return self._cost_of_training(node)
        if node.kind == "trees":
            tokens = [self._tokens_of_trees(node, left[0].state)]
            writers = [node.settings.roles["thinker"][0].model]
            done = [record for name, record in self.records.items() if record.done and name.startswith("trees/")]
        else:
            done = [record for record in self.cells.values() if record.done]
            tokens = [self._tokens_of_cell(node, each, done) for each in left]
            writers = [str(each.model) for each in left]
        speed, written = _tokens_a_second(done), sum(tokens)
        sizes = [self._parameters(name) for name in writers]
        hours = None
        if None not in sizes:
            work = sum(2 * (size or 0) * n for size, n in zip(sizes, tokens, strict=True))
            hours = work / (WRITING_SHARE * CARD_FLOPS) / 3600
        return Cost(written, seconds=_tenths_up(written / speed) if speed else None, gpu_hours=hours)

    def _parameters(self, name: str) -> float | None:
        """A model's active parameters per token: from its files, else from its name (72B; 30B-A3B has 3B)."""
        model = self.recipe.models[self.recipe.root_model(name)]
        called = model.weights or model.model
        if model.weights is not None:
            with suppress(UsageError):
                return parameter_count(locate(called))
        if found := re.findall(r"(?<![a-z0-9.])A?(\d+(?:\.\d+)?)B(?![a-z])", called, re.IGNORECASE):
            return min(map(float, found)) * 1e9
        return None

    def _count(self, node: Node[Any]) -> int:
        """The number of questions of a node; if they are not downloaded, the recipe's count."""
        with suppress(UsageError):
            return len(self.fingerprints.questions(node))
        return sum(node.settings.questions.values())

    def _tokens_of_cell(self, node: Node[Evaluation], cell: State, done: Sequence[NodeRecord]) -> int:
        """The tokens of a budget or of replies with this max_tokens, else half of it or
        600, for each question left."""
        settings, limit = node.settings, node.settings.max_tokens
        each = settings.budget_tokens or min(limit / 2, _REPLY)
        if settings.tokens_of is not None:  # a budget is all samples of the other evaluation
            each *= self.recipe.nodes[f"evaluations/{settings.tokens_of}"].settings.samples
        alike = [record.result for record in done if record.result["asking"]["max_tokens"] == limit]
        if alike and settings.budget_tokens is None:
            each = fmean(
                result["tokens"]["completion"] / max(sum(row["n"] * row["samples"] for row in result["rows"]), 1)
                for result in alike
            )
        questions = self._count(node)
        record = self.cells.get((node.name, str(cell.model)))
        if cell.state == "partial" and record is not None:
            questions = max(questions - sum(row["n"] for row in record.result.get("rows", ())), 0)
        return round(questions * settings.samples * each)

    def _tokens_of_trees(self, node: Node[Trees], state: str = "new") -> int:
        """Tokens for the missing trees: measured tokens per tree if this node has trees of its settings, else from its
        patterns."""
        settings = node.settings
        questions = self._count(node)
        if settings.tokens_of is not None:
            other = self.recipe.nodes[f"trees/{settings.tokens_of}"]
            return round(self._tokens_of_trees(other) * questions / self._count(other))
        record = self.records.get(node.id)
        counts = record.result.get("counts", {}) if record else {}
        if counts.get("trees") and state != "changed":
            left = max(questions - int(counts["trees"]), 0) if state == "partial" else questions
            return round(float(counts["tokens"]["completion"]) * left / int(counts["trees"]))
        thoughts = fmean(_thoughts_of_tree(pattern, settings.rollouts) for pattern in settings.patterns.values())
        tree = thoughts * settings.max_thought_tokens * _FILL
        return round(questions * min(tree, settings.stop.tokens or tree))

    def _cost_of_training(self, node: Node[Student]) -> Cost:
        """Memory and disk from the student's shapes, tokens and time from its rows; before the dataset exists, tokens
        if every tree gave its maximum number of rows."""
        config, parameters = student_shapes(self.recipe, node)
        from cotree.train.memory import training_memory
        from cotree.train.plan import plan as plan_training
        from cotree.train.processes import process_count

        weights, training = str(self.recipe.models[self.recipe.root_model(node.name)].weights), node.settings.training
        processes, steps, seconds = process_count(training), None, None
        memory = training_memory(config, training, processes=processes, tokens=training.pack_tokens).peak
        tokens = self._tokens_of_rows(self.recipe.nodes[f"datasets/{node.settings.data}"])
        tokens = tokens and round(tokens * training.epochs)
        rows = self.run.node(f"datasets/{node.settings.data}").path / "train.parquet"
        with suppress(CotreeError):  # known shapes need no weights
            if rows.is_file():
                found = plan_training(rows, locate(weights), training, node.seed)
                memory, steps = found.peak_bytes, found.steps
                tokens, seconds = found.tokens, _tenths_up(found.seconds)
        work = (4 if training.lora else 6) * parameters * (tokens or 0)
        return Cost(
            tokens,
            seconds=seconds,
            gpu_hours=work / (TRAINING_SHARE * CARD_FLOPS) / 3600 if tokens else None,
            memory_mb=round(memory / _MB),
            disk_mb=round(disk_bytes(parameters, training, steps) / _MB),
            processes=processes,
        )

    def _tokens_of_rows(self, node: Node[Dataset]) -> int | None:
        """Estimated tokens of a dataset not built yet, if every tree gave its maximum number of rows; None for rows of
        a file, unless `size_of` tells."""
        settings = node.settings
        if settings.size_of is not None and (settings.trees or settings.size_in == "tokens"):
            return self._tokens_of_rows(self.recipe.nodes[f"datasets/{settings.size_of}"])
        trees = [self.recipe.nodes[f"trees/{name}"] for name in settings.trees]
        sides = 2 if settings.rows in ("dpo", "step_pairs") else 1
        most = sum(
            self._count(each) * settings.per_tree * sides * (_QUESTION + _tokens_of_chain(each.settings))
            for each in trees
        )
        return round(most) or None


def student_shapes(recipe: Recipe, node: Node[Student]) -> tuple[Any, int]:
    """The transformers config of a student's initial weights, and their number of parameters.

    Raises:
        UsageError: missing weights of unknown shape, or torch is not installed.
    """
    if find_spec("torch") is None:
        raise UsageError("torch is not installed; run `make install` in a clone, or pip install 'cotree[train]'")
    from cotree.train.memory import empty_model, shapes_of

    config = shapes_of(str(recipe.models[recipe.root_model(node.name)].weights))
    return config, empty_model(config).num_parameters()


def disk_bytes(parameters: int, settings: Optimizer, steps: int | None) -> int:
    """Estimated peak disk use of training: the saved model beside the checkpoints (weights and Adam moments), and later
    its GGUF.

    steps: optimizer steps; None if unknown.
    """
    if settings.lora:
        kept = 0  # checkpoints hold the adapter only
    elif settings.probe and settings.probe.keep == "best":
        kept = 3  # the last two checkpoints and the best
    else:
        kept = 2 if steps is None else min(2, (steps - 1) // settings.save_steps)
    return max(4 + 12 * kept, 4 + 1) * parameters


def _tokens_of_chain(search: Search) -> float:
    """Estimated tokens of a whole chain, for thoughts in lines or in paragraphs."""
    if search.ends == "paragraph":
        return search.max_chain_tokens * _FILL
    return fmean(len(pattern) for pattern in search.patterns.values()) * search.max_thought_tokens * _FILL


def _thoughts_of_tree(pattern: Matrix, rollouts: int) -> float:
    """Estimated thoughts of a tree: the first rollout writes the pattern's row of each type on the way to an answer,
    each later one a row where it branches, and the answer."""
    kind, first, rows = "root", 0, list[int]()
    while kind in pattern and len(rows) < 10:
        kind, n = next(iter(pattern[kind].items()))
        rows.append(n)
        first += n
    return first + (rollouts - 1) * (fmean(rows) / 2 + 1)


def _tokens_a_second(done: Sequence[NodeRecord]) -> float | None:
    """Measured generation speed in tokens per second, or None."""
    counts: list[Mapping[str, Any]] = [record.result.get("counts", record.result).get("tokens", {}) for record in done]
    tokens, seconds = sum(each.get("completion", 0) for each in counts), sum(record.seconds for record in done)
    return tokens / max(seconds, _LEAST_SECONDS) if tokens else None


def _tenths_up(seconds: float) -> float:
    """Round seconds up to a tenth, so that no cost shows as 0."""
    return math.ceil(10 * seconds) / 10
