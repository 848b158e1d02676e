"""What bringing a node up to date would cost: tokens, time, memory, disk and GPU-hours.

Tokens and seconds are from what was measured in the run so far, else from the recipe alone; what cannot be known is
None. Nothing is loaded or asked: where questions, rows or weights are not here, the recipe's counts and the models'
shapes stand in for them.
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
# Records keep tenths of seconds, so work that took less may have none.
_LEAST_SECONDS = 0.05
# Of `max_thought_tokens`, what a thought has on average before anything was measured (10.5 of 32 in laptop.yaml); so of
# `max_chain_tokens`.
_FILL = 1 / 3
# Tokens of a question, and the most that a reply is thought to have before one was measured.
_QUESTION, _REPLY = 100, 600
# Of the 989 dense bf16 TFLOP/s of an H100, the share that usual software reaches where it trains and where it writes.
CARD_FLOPS, TRAINING_SHARE, WRITING_SHARE = 989e12, 0.4, 0.1


@dataclass(frozen=True)
class Cost:
    """What a node would cost.

    tokens: that models would generate, or that training would see. seconds: on this machine. gpu_hours: of an H100, at
    the shares of its speed above. memory_mb: of training at its peak, in each of its `processes`. disk_mb: of training
    at its peak, checkpoints included. Each is None where it cannot be known.
    """

    tokens: int | None = None
    seconds: float | None = None
    gpu_hours: float | None = None
    memory_mb: int | None = None
    disk_mb: int | None = None
    processes: int | None = None


class Estimates:
    """Estimates from the speeds and sizes of what the run has done so far."""

    def __init__(self, recipe: Recipe, run: RunFolder, fingerprints: Fingerprints) -> None:
        self.recipe, self.run, self.fingerprints = recipe, run, fingerprints
        self.records, self.cells = run.nodes(), run.cells()

    def cost(self, node: Node[Any], left: Sequence[State]) -> Cost:
        """What a node costs. left: its state, or those of an evaluation's cells that are not done.

        Raises:
            UsageError: it cannot be known, as something is not here.
        """
        if node.kind == "datasets" or (node.kind == "trees" and node.settings.file is not None):
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
        """How many weights of a model a token uses: by its files, else by its name (72B, of 30B-A3B 3B)."""
        model = self.recipe.models[self.recipe.root_model(name)]
        called = model.weights or model.model
        if model.weights is not None:
            with suppress(UsageError):
                return parameter_count(locate(called))
        if found := re.findall(r"(?<![a-z0-9.])A?(\d+(?:\.\d+)?)B(?![a-z])", called, re.IGNORECASE):
            return min(map(float, found)) * 1e9
        return None

    def _count(self, node: Node[Any]) -> int:
        """How many questions a node asks; where they are not here, as many as the recipe names."""
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
        """Measured tokens a tree for those that are left, where this node has trees of its settings; else what its
        patterns write."""
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
        """The memory and disk that a student's shapes take, and the tokens and time of its rows; before these are here,
        the tokens if every tree gives all the rows that it may."""
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
        """About the tokens of a dataset's rows before they are there, if every tree gives all that it may; None for the
        rows of a file, unless another dataset says how many tokens."""
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
    """The transformers config of the weights that a student starts from, and how many they are.

    Raises:
        UsageError: they are not here and their shapes are not known, or torch is not installed.
    """
    if find_spec("torch") is None:
        raise UsageError("torch is not installed; pip install 'cotree[train]'")
    from cotree.train.memory import empty_model, shapes_of

    config = shapes_of(str(recipe.models[recipe.root_model(node.name)].weights))
    return config, empty_model(config).num_parameters()


def disk_bytes(parameters: int, settings: Optimizer, steps: int | None) -> int:
    """About the disk that training needs at its peak: when the model is stored beside the checkpoints, each of them its
    weights and two moments of each; later its GGUF.

    steps: how many there are; None where that is not known.
    """
    if settings.lora:
        kept = 0  # their weights are the adapter's
    elif settings.probe and settings.probe.keep == "best":
        kept = 3  # the last two and the best
    else:
        kept = 2 if steps is None else min(2, (steps - 1) // settings.save_steps)
    return max(4 + 12 * kept, 4 + 1) * parameters


def _tokens_of_chain(search: Search) -> float:
    """About how many tokens a whole chain has: thoughts of a line each, or as models write solutions."""
    if search.ends == "paragraph":
        return search.max_chain_tokens * _FILL
    return fmean(len(pattern) for pattern in search.patterns.values()) * search.max_thought_tokens * _FILL


def _thoughts_of_tree(pattern: Matrix, rollouts: int) -> float:
    """About how many thoughts a tree has: its first rollout writes one row of each type on the way to an answer, every
    other one a row where it parts from the others, and the answer."""
    kind, first, rows = "root", 0, list[int]()
    while kind in pattern and len(rows) < 10:
        kind, n = next(iter(pattern[kind].items()))
        rows.append(n)
        first += n
    return first + (rollouts - 1) * (fmean(rows) / 2 + 1)


def _tokens_a_second(done: Sequence[NodeRecord]) -> float | None:
    """The speed at which models wrote what is done."""
    counts: list[Mapping[str, Any]] = [record.result.get("counts", record.result).get("tokens", {}) for record in done]
    tokens, seconds = sum(each.get("completion", 0) for each in counts), sum(record.seconds for record in done)
    return tokens / max(seconds, _LEAST_SECONDS) if tokens else None


def _tenths_up(seconds: float) -> float:
    """Seconds rounded up to a tenth: what costs something never shows as nothing."""
    return math.ceil(10 * seconds) / 10
