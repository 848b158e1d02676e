"""`cotree plan`: every node's state and the estimated cost of bringing it up to date.

Calls no server, loads no model, uses no network and writes nothing. Tokens and seconds are estimated from measurements
in the run so far, or from the recipe; unknown values are None.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cotree.base.errors import CotreeError, UsageError
from cotree.base.numbers import duration, number
from cotree.base.shards import SHARDED, shards_of
from cotree.data.gates import annotated_chains
from cotree.data.settings import Dataset
from cotree.experiment.engines import engine_lines, engines_of, with_engines
from cotree.experiment.estimates import TRAINING_SHARE, WRITING_SHARE, Cost, Estimates
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.hub import offline, pinned
from cotree.experiment.recipe import Node, Recipe
from cotree.experiment.shard_states import ShardsSeen, ShardStates
from cotree.experiment.state import State, equal_content, run_folder, states_of
from cotree.models.settings import Engine

_CARD = 80  # GB of the GPU that large students are planned for
_LEAST_HOURS = 0.1  # of a GPU that are worth a word


@dataclass(frozen=True)
class Cell:
    """The state of one model's cell of an evaluation."""

    model: str
    state: str
    why: list[str]


@dataclass(frozen=True, kw_only=True)
class NodePlan(Cost):
    """A node's state (done, partial, new, changed; why), and the cost of bringing it up to date.

    reads: the nodes that it needs. cells: of evaluations only. shards: progress, for each number of shards found.
    engines: {model or student: engine} that would serve its weights.
    """

    name: str
    state: str
    why: list[str]
    reads: list[str]
    cells: list[Cell] | None = None
    shards: list[ShardsSeen] | None = None
    engines: dict[str, Engine] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data; without empty `cells`, `shards` and `engines`."""
        optional = ("cells", "shards", "engines")
        return {key: value for key, value in asdict(self).items() if key not in optional or value}


def plan(recipe: Recipe, runs_dir: str | Path = "runs") -> list[NodePlan]:
    """Plan a recipe's run: one entry per node, in order.

    Raises:
        UsageError: the run folder is not a run.
    """
    folder = run_folder(recipe, runs_dir)
    recipe = pinned(recipe, folder, ask=False)
    with offline():
        recipe = with_engines(recipe, folder)
        fingerprints = Fingerprints(recipe, run=folder.path)
        states = states_of(folder, fingerprints, recipe.nodes)
        equal = equal_content(folder, None, states)
        for index, state in enumerate(states):
            if state.name in equal:
                why = f"is the same as {equal[state.name].path.relative_to(folder.path)}"
                states[index] = replace(state, state="done", why=(why,))
        estimates = Estimates(recipe, folder, fingerprints)
        planned = [
            _plan_of(node, [state for state in states if state.node is node], estimates)
            for node in recipe.nodes.values()
        ]
        sizes = sorted({part.shard.world_size for part in shards_of(folder)})
        for index, each in enumerate(planned):
            if sizes and each.state != "done" and recipe.nodes[each.name].kind in SHARDED:
                with suppress(UsageError):  # a missing input, reported in `why`
                    seen = [ShardStates(folder, fingerprints, [each.name], n).look() for n in sizes]
                    planned[index] = replace(each, shards=seen)
        return planned


def plan_lines(plans: Sequence[NodePlan]) -> list[str]:
    """Terminal lines of a plan: one per node, and below it one per cell whose state differs from the node's."""
    width = max(len(plan.name) for plan in plans)
    lines, said = [], dict[str, str]()
    for each in plans:
        costs = [
            f"about {number(each.tokens)} tokens" if each.tokens else "",
            duration(each.seconds) if each.seconds else "",
            _gpu_hours(each.gpu_hours),
            _memory(each.memory_mb / 1000, each.processes or 1) if each.memory_mb else "",
            f"{each.disk_mb / 1000:.1f} GB of disk" if each.disk_mb and each.disk_mb > 100 else "",
        ]
        cost = ", ".join(filter(None, costs))
        why = [
            reason if said.setdefault(reason, each.name) == each.name else f"as {said[reason]}" for reason in each.why
        ]
        reasons = each.why if each.state != "new" else why  # one missing input often blocks many nodes
        lines.append(f"{each.name:<{width}}  {_with_reasons(each.state, reasons)}{'; ' if cost else ''}{cost}")
        lines += [f"{'':<{width}}    {seen}" for seen in each.shards or () if seen.done or seen.begun]
        for cell in each.cells or ():
            if (cell.state, cell.why) != (each.state, each.why) and (cell.state, each.state) != ("new", "new"):
                lines.append(f"{'':<{width}}    {cell.model}: {_with_reasons(cell.state, cell.why)}")
    lines += engine_lines({name: engine for each in plans for name, engine in (each.engines or {}).items()})
    known = [each.seconds for each in plans if each.seconds]
    unknown = any(each.state != "done" and each.seconds is None for each in plans)
    if known:
        lines.append(f"about {duration(sum(known))}{' and what is not known yet' if unknown else ''}")
    elif unknown:
        lines.append("how long it takes is known once a part of it has run here")
    if hours := _gpu_hours(sum(each.gpu_hours or 0 for each in plans)):
        shares = f"{TRAINING_SHARE:.0%} of its bf16 FLOP/s where models train and {WRITING_SHARE:.0%} where they write"
        lines.append(f"{hours} in all, of an H100 at {shares}")
    return lines


def _memory(gigabytes: float, processes: int) -> str:
    """Memory per process, with a note if it exceeds a large GPU's."""
    each = f" in each of {processes} processes" if processes > 1 else ""
    fix = "lora" if processes > 1 else "gpus=8 and shard, or lora"
    fits = f" (more than a card of {_CARD} GB has: {fix})" if gigabytes > _CARD else ""
    return f"{gigabytes:.1f} GB of memory{each}{fits}"


def _gpu_hours(hours: float | None) -> str:
    return f"{hours:.{1 if hours < 10 else 0}f} GPU-hours" if hours and hours > _LEAST_HOURS else ""


def _with_reasons(state: str, why: Sequence[str]) -> str:
    return f"{state} ({', '.join(why)})" if why else state


def _plan_of(node: Node[Any], states: Sequence[State], estimates: Estimates) -> NodePlan:
    """The plan of a node from its state, or from those of an evaluation's cells."""
    alike = len({state.state for state in states}) == 1
    planned = NodePlan(name=node.id, state=states[0].state if alike else "partial", why=[], reads=list(node.reads))
    if node.kind == "evaluations":
        planned = replace(planned, cells=[Cell(str(each.model), each.state, list(each.why)) for each in states])
    if alike:  # else each cell reports its own reasons
        why = dict.fromkeys(reason for state in states for reason in state.why)
        regrow = [
            f"{each.regrow} finished trees would be grown again: needs --regrow" for each in states if each.regrow
        ]
        planned = replace(planned, why=[*why, *regrow])
    if node.kind == "datasets" and node.settings.annotations is not None:
        with suppress(CotreeError):  # inputs of its trees are missing
            planned = replace(planned, why=[*planned.why, _annotations(node, planned.state, estimates)])
    if planned.state == "done":
        return planned
    left = [each for each in states if each.state != "done"]
    try:
        planned = replace(planned, **asdict(estimates.cost(node, left)))
    except CotreeError as error:
        planned = replace(planned, why=planned.why or [f"its cost is not known: {error}"])
    with suppress(CotreeError):
        if node.kind in ("trees", "evaluations"):
            names = node.settings.writers if node.kind == "trees" else [str(each.model) for each in left]
            planned = replace(planned, engines=engines_of(estimates.recipe, names))
    return planned


def _annotations(node: Node[Dataset], state: str, estimates: Estimates) -> str:
    """The number of annotated chains that a dataset has used, or will consider."""
    record = estimates.records.get(node.id)
    if state == "done" and record is not None:
        return annotated_chains(record.result["counts"]["annotated"])
    return f"annotated chains: {len(estimates.fingerprints.annotations(node))} by now"
