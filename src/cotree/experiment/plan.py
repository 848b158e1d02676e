"""`cotree plan`: every node's state and what bringing it up to date would cost, before anything is spent.

No server is asked, no model is loaded, no network is reached and nothing is written. Tokens and seconds are estimates
from what was measured in the run so far, or from the recipe; what cannot be known is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from cotree.base.errors import CotreeError
from cotree.base.numbers import duration, number
from cotree.base.run_folder import NodeRecord, RunFolder
from cotree.data.settings import Dataset
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.hub import offline, pinned
from cotree.experiment.recipe import Node, Recipe, Student
from cotree.experiment.run import run_folder
from cotree.experiment.state import State, equal_content, states_of
from cotree.models.weights import locate, parameter_count
from cotree.search.settings import Matrix, Trees

_MB = 10**6
# Of `max_thought_tokens`, what a thought has on average before anything was measured.
_THOUGHT_FILL = 0.5


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
    its peak. disk_mb: that its content takes. Each is None where it cannot be known. cells: of evaluations only.
    """

    name: str
    state: str
    why: list[str]
    reads: list[str]
    tokens: int | None = None
    seconds: float | None = None
    memory_mb: int | None = None
    disk_mb: int | None = None
    cells: list[Cell] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data; nodes that are no evaluation have no `cells`."""
        found = asdict(self)
        if self.cells is None:
            del found["cells"]
        return found


def plan(recipe: Recipe, runs_dir: Path = Path("runs")) -> list[NodePlan]:
    """The plan of a recipe's run as it stands, a node each, in order.

    Raises:
        UsageError: the run folder is something else.
    """
    folder = run_folder(recipe, runs_dir)
    recipe = pinned(recipe, folder, ask=False)
    with offline():
        fingerprints = Fingerprints(recipe)
        states = states_of(folder, fingerprints, recipe.nodes)
        for name, content in equal_content(folder, None, states).items():
            why = f"is the same as {content.path.relative_to(folder.path)}"
            states = [replace(state, state="done", why=(why,)) if state.name == name else state for state in states]
        estimates = _Estimates(recipe, folder, fingerprints)
        plans = []
        for node in recipe.nodes.values():
            plans.append(_plan_of(node, [state for state in states if state.node.id == node.id], estimates))
    return plans


def plan_lines(plans: Sequence[NodePlan]) -> list[str]:
    """The plan for the terminal: a line a node, and below it a line for each cell that is not as the node is."""
    width = max(len(plan.name) for plan in plans)
    lines = []
    for each in plans:
        costs = [
            f"about {number(each.tokens)} tokens" if each.tokens else "",
            duration(each.seconds) if each.seconds else "",
            f"{each.memory_mb / 1000:.1f} GB of memory" if each.memory_mb else "",
            f"{each.disk_mb / 1000:.1f} GB of disk" if each.disk_mb and each.disk_mb > 100 else "",
        ]
        why = f" ({', '.join(each.why)})" if each.why else ""
        cost = ", ".join(filter(None, costs))
        lines.append(f"{each.name:<{width}}  {each.state}{why}{'; ' if cost else ''}{cost}")
        for cell in each.cells or ():
            if (cell.state, cell.why) == (each.state, each.why):
                continue
            why = f" ({', '.join(cell.why)})" if cell.why else ""
            lines.append(f"{'':<{width}}    {cell.model}: {cell.state}{why}")
    known = [each.seconds for each in plans if each.seconds]
    if known:
        unknown = any(each.state != "done" and each.seconds is None for each in plans)
        lines.append(f"about {duration(sum(known))}{' and what is not known yet' if unknown else ''}")
    return lines


def _plan_of(node: Node, states: Sequence[State], estimates: _Estimates) -> NodePlan:
    why = list(dict.fromkeys(reason for state in states for reason in state.why))
    regrow = sum(state.regrow for state in states)
    if regrow:
        why.append(f"{regrow} finished trees would be grown again: needs --regrow")
    names = [state.state for state in states]
    state = names[0] if len({*names}) == 1 else "partial"
    cells = [Cell(str(s.model), s.state, list(s.why)) for s in states] if node.kind == "evaluations" else None
    shown = [] if cells and len({*names}) > 1 else why
    if state == "done":
        return NodePlan(node.id, state, shown, list(node.reads), cells=cells)
    try:
        cost = estimates.of(node, [s for s in states if s.state != "done"])
    except CotreeError:  # weights or questions are not here, as `why` says
        cost = _Cost()
    return NodePlan(
        node.id, state, shown, list(node.reads), cost.tokens, cost.seconds, cost.memory_mb, cost.disk_mb, cells=cells
    )


@dataclass(frozen=True)
class _Cost:
    tokens: int | None = None
    seconds: float | None = None
    memory_mb: int | None = None
    disk_mb: int | None = None


class _Estimates:
    """Estimates from the speeds and sizes of what the run has done so far."""

    def __init__(self, recipe: Recipe, run: RunFolder, fingerprints: Fingerprints) -> None:
        self.recipe, self.run, self.fingerprints = recipe, run, fingerprints
        self.records = run.nodes()
        self.cells = run.cells()

    def of(self, node: Node, left: Sequence[State]) -> _Cost:
        """The cost of a node, or of the cells of it that are left."""
        if isinstance(node.settings, Trees):
            tokens = self._tokens_of_trees(node)
            return _Cost(tokens, _over(tokens, _speed(self.records, "trees/")))
        if isinstance(node.settings, Dataset):
            return _Cost()
        if isinstance(node.settings, Student):
            return self._of_training(node, node.settings)
        questions = len(self.fingerprints.questions(node))
        spent = [
            record.result["tokens"]["completion"]
            / max(sum(row["n"] * row["samples"] for row in record.result["rows"]), 1)
            for record in self.cells.values()
            if record.done
        ]
        each = fmean(spent) if spent else node.evaluation.max_tokens / 2
        each = node.evaluation.budget_tokens or each
        tokens = round(questions * len(left) * node.evaluation.samples * each)
        return _Cost(tokens, _over(tokens, _speed(self.cells)))

    def _tokens_of_trees(self, node: Node) -> int | None:
        """Measured tokens a tree where this node has trees, else what its patterns write."""
        settings = node.trees
        if settings.tokens_of is not None:
            return self._tokens_of_trees(self.recipe.nodes[f"trees/{settings.tokens_of}"])
        questions = len(self.fingerprints.questions(node))
        record = self.records.get(node.id)
        counts = record.result.get("counts", {}) if record else {}
        if counts.get("trees"):
            return round(float(counts["tokens"]["completion"]) * questions / int(counts["trees"]))
        each = settings.max_thought_tokens * _THOUGHT_FILL
        tree = fmean(_thoughts_of_tree(pattern, settings.rollouts) for pattern in settings.patterns.values()) * each
        return round(questions * min(tree, settings.stop.tokens or tree))

    def _of_training(self, node: Node, student: Student) -> _Cost:
        root = self.recipe.models[self.recipe.root_model(node.name)]
        assert root.weights is not None
        weights = locate(root.weights)
        disk = round(5 * parameter_count(weights) / _MB)
        rows = self.run.node(f"datasets/{student.data}").path / "train.parquet"
        if not rows.is_file():
            return _Cost(disk_mb=disk)
        from cotree.train.plan import plan as plan_training

        planned = plan_training(rows, weights, student.training, node.seed)
        return _Cost(planned.tokens, round(planned.seconds, 1), round(planned.peak_bytes / _MB), disk)


def _thoughts_of_tree(pattern: Matrix, rollouts: int) -> float:
    """About how many thoughts a tree has: its first rollout writes one row of each type on the way to an answer, every
    other one a row where it parts from the others, and the answer."""
    kind, first, rows = "root", 0, list[int]()
    while kind in pattern and len(rows) < 10:
        kind, n = next(iter(pattern[kind].items()))
        rows.append(n)
        first += n
    return first + (rollouts - 1) * (fmean(rows) / 2 + 1)


def _speed(records: Mapping[Any, NodeRecord], kind: str = "") -> float | None:
    """Generated tokens a second over what is done."""
    done = [record for name, record in records.items() if record.done and (not kind or str(name).startswith(kind))]
    tokens = 0
    for record in done:
        counted = record.result.get("counts", record.result).get("tokens", {})
        tokens += counted.get("completion", 0)
    seconds = sum(record.seconds for record in done)
    return tokens / seconds if tokens and seconds else None


def _over(tokens: int | None, speed: float | None) -> float | None:
    return None if tokens is None or speed is None else round(tokens / speed, 1)
