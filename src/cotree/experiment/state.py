"""What of an experiment is done: each node's state, from its fingerprint and what stands in the run folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cotree.base.errors import UsageError
from cotree.base.run_folder import NodeFolder, NodeRecord, RunFolder, find_run
from cotree.experiment.fingerprints import Fingerprint, Fingerprints, changed_keys
from cotree.experiment.recipe import Node
from cotree.search.store import count_trees

StateName = Literal["done", "partial", "new", "changed"]
# Parts of a fingerprint that stand for what a node reads, not for a setting of its own.
_READ = ("trees", "data", "from", "model", "size_of", "questions_of", "tokens_of")


@dataclass(frozen=True)
class State:
    """The state of a node, or of one model's cell of an evaluation.

    state: `done`; `partial` (begun, or some questions are there); `new`; `changed` (content is of other settings).
    why: what is missing, which keys changed, or what is unresolved. fingerprint: None where an input is not here.
    regrow: so many finished trees would be grown again.
    """

    node: Node
    model: str | None
    state: StateName
    why: tuple[str, ...] = ()
    fingerprint: Fingerprint | None = None
    regrow: int = 0

    @property
    def name(self) -> str:
        """The node's id, of a cell with its model: "evaluations/test/dpo"."""
        return self.node.id if self.model is None else f"{self.node.id}/{self.model}"


def states_of(run: RunFolder, fingerprints: Fingerprints, wanted: Iterable[str]) -> list[State]:
    """The states of the wanted nodes, of evaluations those of their cells, in the recipe's order."""
    found: list[State] = []
    for node_id in wanted:
        node = fingerprints.recipe.nodes[node_id]
        for model in node.evaluation.models if node.kind == "evaluations" else (None,):
            found.append(_state(run, fingerprints, node, model))
    return found


def equal_content(run: RunFolder, source: Path | None, states: Iterable[State]) -> dict[str, NodeFolder]:
    """For each state that is not done, by its name, a folder with finished content of its fingerprint: in the run at
    `source`, or under another name in this run.

    Raises:
        UsageError: there is no run at `source`, or it has nothing that any of the states wants.
    """
    states = list(states)
    there = _finished(run)
    if source is not None:
        there |= (others := _finished(find_run(source)))
        if not any(state.fingerprint is not None and state.fingerprint.of in others for state in states):
            raise UsageError(
                f"--from {source}: nothing of it has the settings of this recipe; `cotree plan` on both shows why"
            )
    return {
        state.name: there[state.fingerprint.of]
        for state in states
        if state.state != "done" and state.fingerprint is not None and state.fingerprint.of in there
    }


def _finished(run: RunFolder) -> dict[str, NodeFolder]:
    """The folders of a run whose content is finished, by its fingerprint."""
    found = {record.fingerprint: run.node(name) for name, record in run.nodes().items()}
    for (name, model), record in run.cells().items():
        found[record.fingerprint] = run.node(f"evaluations/{name}", model)
    return {fingerprint: node for fingerprint, node in found.items() if node.complete(fingerprint)}


def _state(run: RunFolder, fingerprints: Fingerprints, node: Node, model: str | None) -> State:
    folder = run.node(node.id, model)
    record = folder.record()
    try:
        wanted = fingerprints.of(node.id) if model is None else fingerprints.cell(node, model)
    except UsageError as error:
        return State(node, model, "new" if record is None else "partial", (f"unresolved: {error}",))
    if folder.complete(wanted.of):
        return State(node, model, "done", fingerprint=wanted)
    kept = folder.kept(wanted.base)
    if record is not None and record.base == wanted.base:
        return State(node, model, "partial", _missing(folder, record, wanted), wanted)
    if kept is not None:
        whole = kept.done and kept.fingerprint == wanted.of
        whole = whole and all((folder.older / wanted.base / name).exists() for name in kept.files)
        return State(node, model, "done" if whole else "partial", ("kept from before",), wanted)
    if record is None:
        return State(node, model, "new", fingerprint=wanted)
    keys = changed_keys(record.parts, wanted.parts)
    return State(node, model, "changed", tuple(_explained(node, keys)), wanted, _finished_trees(folder, node))


def _missing(folder: NodeFolder, record: NodeRecord, wanted: Fingerprint) -> tuple[str, ...]:
    if record.fingerprint != wanted.of:
        return tuple(changed_keys(record.parts, wanted.parts)) or ("verdicts",)
    gone = [name for name in record.files if not (folder.path / name).exists()]
    return tuple(f"{name} is gone" for name in gone) if record.done else ("not finished",)


def _explained(node: Node, keys: list[str]) -> Iterable[str]:
    """The changed keys; of what the node reads, that it changed."""
    own = [key for key in keys if key not in _READ]
    yield from own
    if read := [key for key in keys if key in _READ]:
        yield f"what it reads ({', '.join(read)})"


def _finished_trees(folder: NodeFolder, node: Node) -> int:
    return count_trees(folder.path / "trees.db") if node.kind == "trees" else 0
