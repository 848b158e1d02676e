"""`cotree plan`: every node's state and what bringing it up to date would cost, before anything is spent.

No server is asked, no model is loaded, no network is reached and nothing is written. Tokens and seconds are estimates
from what was measured in the run so far, or from the recipe; what cannot be known is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from cotree.base.errors import CotreeError
from cotree.base.numbers import duration, number
from cotree.base.run_folder import NodeRecord, RunFolder
from cotree.eval.settings import Evaluation
from cotree.experiment.engines import engine_lines, engines_of, with_engines
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.hub import offline, pinned
from cotree.experiment.recipe import Node, Recipe, Student
from cotree.experiment.state import State, equal_content, run_folder, states_of
from cotree.models.settings import Engine
from cotree.models.weights import locate
from cotree.search.settings import Matrix, Trees
from cotree.train.settings import Optimizer

_MB = 10**6
# Records keep tenths of seconds, so work that took less may have none.
_LEAST_SECONDS = 0.05
# Of `max_thought_tokens`, what a thought has on average before anything was measured (10.5 of 32 in laptop.yaml).
_THOUGHT_FILL = 1 / 3
_CARD = 80  # GB of the GPU that large students are planned for


@dataclass(frozen=True)
class Cell:
    """One model of an evaluation."""

    model: str
    state: str
    why: list[str]


@dataclass(frozen=True)
class NodePlan:
    """A node's state (done, partial, new, changed; why), and the cost of bringing it up to date.

    tokens: that models would generate, or that training would see. seconds: on this machine. memory_mb: of training at
    its peak, in each of its processes. disk_mb: of training at its peak, checkpoints included. Each is None where it
    cannot be known. cells: of evaluations only. engines: what would serve the weights that it asks, by the names of
    models and students.
    """

    name: str
    state: str
    why: list[str]
    reads: list[str]
    tokens: int | None = None
    seconds: float | None = None
    memory_mb: int | None = None
    disk_mb: int | None = None
    processes: int | None = None
    cells: list[Cell] | None = None
    engines: dict[str, Engine] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data; `cells` and `engines` only where there are any."""
        return {key: value for key, value in asdict(self).items() if key not in ("cells", "engines") or value}


def plan(recipe: Recipe, runs_dir: str | Path = "runs") -> list[NodePlan]:
    """The plan of a recipe's run as it stands, a node each, in order.

    Raises:
        UsageError: the run folder is something else.
    """
    folder = run_folder(recipe, runs_dir)
    recipe = pinned(recipe, folder, ask=False)
    with offline():
        recipe = with_engines(recipe, folder)
        fingerprints = Fingerprints(recipe)
        states = states_of(folder, fingerprints, recipe.nodes)
        equal = equal_content(folder, None, states)
        for index, state in enumerate(states):
            if state.name in equal:
                why = f"is the same as {equal[state.name].path.relative_to(folder.path)}"
                states[index] = replace(state, state="done", why=(why,))
        estimates = _Estimates(recipe, folder, fingerprints)
        return [
            _plan_of(node, [state for state in states if state.node is node], estimates)
            for node in recipe.nodes.values()
        ]


def plan_lines(plans: Sequence[NodePlan]) -> list[str]:
    """The plan for the terminal: a line a node, and below it a line for each cell that is not as the node is."""
    width = max(len(plan.name) for plan in plans)
    lines = []
    for each in plans:
        costs = [
            f"about {number(each.tokens)} tokens" if each.tokens else "",
            duration(each.seconds) if each.seconds else "",
            _memory(each.memory_mb / 1000, each.processes or 1) if each.memory_mb else "",
            f"{each.disk_mb / 1000:.1f} GB of disk" if each.disk_mb and each.disk_mb > 100 else "",
        ]
        cost = ", ".join(filter(None, costs))
        lines.append(f"{each.name:<{width}}  {_with_reasons(each)}{'; ' if cost else ''}{cost}")
        for cell in each.cells or ():
            if (cell.state, cell.why) != (each.state, each.why):
                lines.append(f"{'':<{width}}    {cell.model}: {_with_reasons(cell)}")
    lines += engine_lines({name: engine for each in plans for name, engine in (each.engines or {}).items()})
    known = [each.seconds for each in plans if each.seconds]
    unknown = any(each.state != "done" and each.seconds is None for each in plans)
    if known:
        lines.append(f"about {duration(sum(known))}{' and what is not known yet' if unknown else ''}")
    elif unknown:
        lines.append("how long it takes is known once a part of it has run here")
    return lines


def _memory(gigabytes: float, processes: int) -> str:
    """The memory of each process, and of what a laptop may not have, whether a card has it."""
    each = f" in each of {processes} processes" if processes > 1 else ""
    fits = f" (a card of {_CARD} GB has {'that' if gigabytes < _CARD else 'less'})" if gigabytes > _CARD / 8 else ""
    return f"{gigabytes:.1f} GB of memory{each}{fits}"


def _with_reasons(each: NodePlan | Cell) -> str:
    return f"{each.state} ({', '.join(each.why)})" if each.why else each.state


def _plan_of(node: Node[Any], states: Sequence[State], estimates: _Estimates) -> NodePlan:
    """The plan of a node from its state, or from those of an evaluation's cells."""
    alike = len({state.state for state in states}) == 1
    planned = NodePlan(node.id, states[0].state if alike else "partial", [], list(node.reads))
    if node.kind == "evaluations":
        planned = replace(planned, cells=[Cell(str(each.model), each.state, list(each.why)) for each in states])
    if alike:  # else each cell has its own reasons
        why = dict.fromkeys(reason for state in states for reason in state.why)
        regrow = [
            f"{each.regrow} finished trees would be grown again: needs --regrow" for each in states if each.regrow
        ]
        planned = replace(planned, why=[*why, *regrow])
    if planned.state == "done":
        return planned
    try:
        return estimates.add_to(planned, node, [each for each in states if each.state != "done"])
    except CotreeError:  # weights or questions are not here, as `why` says
        return planned


class _Estimates:
    """Estimates from the speeds and sizes of what the run has done so far."""

    def __init__(self, recipe: Recipe, run: RunFolder, fingerprints: Fingerprints) -> None:
        self.recipe, self.run, self.fingerprints = recipe, run, fingerprints
        self.records, self.cells = run.nodes(), run.cells()

    def add_to(self, planned: NodePlan, node: Node[Any], left: Sequence[State]) -> NodePlan:
        """The plan of a node with what it costs. left: its state, or those of an evaluation's cells not done."""
        if node.kind == "datasets":
            return planned
        if node.kind == "students":
            return self._add_training(planned, node)
        names = node.settings.writers if node.kind == "trees" else [str(each.model) for each in left]
        planned = replace(planned, engines=engines_of(self.recipe, names))
        if node.kind == "trees":
            tokens = self._tokens_of_trees(node, left[0].state)
            done = [record for name, record in self.records.items() if record.done and name.startswith("trees/")]
        else:
            done = [record for record in self.cells.values() if record.done]
            tokens = sum(self._tokens_of_cell(node, each, done) for each in left)
        speed = _tokens_a_second(done)
        return replace(planned, tokens=tokens, seconds=_tenths_up(tokens / speed) if speed else None)

    def _tokens_of_cell(self, node: Node[Evaluation], cell: State, done: Sequence[NodeRecord]) -> int:
        """The tokens of a budget or of replies with this max_tokens, else half of it, for each question left."""
        settings, limit = node.settings, node.settings.max_tokens
        each = settings.budget_tokens or limit / 2
        alike = [record.result for record in done if record.result["asking"]["max_tokens"] == limit]
        if alike and settings.budget_tokens is None:
            each = fmean(
                result["tokens"]["completion"] / max(sum(row["n"] * row["samples"] for row in result["rows"]), 1)
                for result in alike
            )
        questions = len(self.fingerprints.questions(node))
        record = self.cells.get((node.name, str(cell.model)))
        if cell.state == "partial" and record is not None:
            questions = max(questions - sum(row["n"] for row in record.result.get("rows", ())), 0)
        return round(questions * settings.samples * each)

    def _tokens_of_trees(self, node: Node[Trees], state: str = "new") -> int:
        """Measured tokens a tree for those that are left, where this node has trees of its settings; else what its
        patterns write."""
        settings = node.settings
        questions = len(self.fingerprints.questions(node))
        if settings.tokens_of is not None:
            other = self.recipe.nodes[f"trees/{settings.tokens_of}"]
            return round(self._tokens_of_trees(other) * questions / len(self.fingerprints.questions(other)))
        record = self.records.get(node.id)
        counts = record.result.get("counts", {}) if record else {}
        if counts.get("trees") and state != "changed":
            left = max(questions - int(counts["trees"]), 0) if state == "partial" else questions
            return round(float(counts["tokens"]["completion"]) * left / int(counts["trees"]))
        thoughts = fmean(_thoughts_of_tree(pattern, settings.rollouts) for pattern in settings.patterns.values())
        tree = thoughts * settings.max_thought_tokens * _THOUGHT_FILL
        return round(questions * min(tree, settings.stop.tokens or tree))

    def _add_training(self, planned: NodePlan, node: Node[Student]) -> NodePlan:
        """The plan of a student with the memory and disk that its shapes take and, once its rows and weights are here,
        its tokens and time."""
        from cotree.train.memory import empty_model, shapes_of, training_memory
        from cotree.train.plan import plan as plan_training
        from cotree.train.processes import process_count

        weights, training = str(self.recipe.models[self.recipe.root_model(node.name)].weights), node.settings.training
        config, processes = shapes_of(weights), process_count(training)
        memory = training_memory(config, training, processes=processes, tokens=training.pack_tokens).peak
        parameters, steps = empty_model(config).num_parameters(), None
        rows = self.run.node(f"datasets/{node.settings.data}").path / "train.parquet"
        with suppress(CotreeError):  # known shapes need no weights
            if rows.is_file():
                found = plan_training(rows, locate(weights), training, node.seed)
                memory, steps = found.peak_bytes, found.steps
                planned = replace(planned, tokens=found.tokens, seconds=_tenths_up(found.seconds))
        disk = disk_bytes(parameters, training, steps)
        return replace(planned, memory_mb=round(memory / _MB), disk_mb=round(disk / _MB), processes=processes)


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
