"""Determine each node's state (done, partial, new, changed) from its fingerprint and the run folder's content."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cotree.base.errors import UsageError
from cotree.base.run_folder import NodeFolder, NodeRecord, RunFolder, changed_keys, find_run
from cotree.base.shards import parts_beside
from cotree.experiment.fingerprints import Fingerprint, Fingerprints
from cotree.experiment.recipe import Node, Recipe
from cotree.search.settings import Trees
from cotree.search.store import count_trees
from cotree.search.stores import TreeStores

StateName = Literal["done", "partial", "new", "changed"]
# Parts of a fingerprint that stand for dependencies, not for settings of the node.
_REPLIES = ("trees.db", "journal.jsonl")  # files that cost tokens
_BEFORE_WORK = {".lock", "shards"}  # created in a run folder before the preflight checks
_READ = ("trees", "data", "from", "model", "size_of", "questions_of", "tokens_of")


@dataclass(frozen=True)
class State:
    """The state of a node, or of one model's cell of an evaluation.

    state: `done`; `partial` (started, or some questions are finished); `new`; `changed` (content of other settings).
    why: missing content, changed keys, or unresolved inputs. fingerprint: None if an input is missing.
    regrow: number of finished trees that would be grown again. asks: whether models may be called; False if only files
        derived from their replies are missing.
    """

    node: Node[Any]
    model: str | None
    state: StateName
    why: tuple[str, ...] = ()
    fingerprint: Fingerprint | None = None
    regrow: int = 0
    asks: bool = True

    @property
    def lost(self) -> str:
        """The finished content that is missing or damaged now: "train.parquet is damaged"."""
        return ", ".join(why for why in self.why if why.endswith((" is gone", " is damaged")))

    @property
    def name(self) -> str:
        """The node's id, with the model for a cell: "evaluations/test/dpo"."""
        return self.node.id if self.model is None else f"{self.node.id}/{self.model}"


def run_folder(recipe: Recipe, runs_dir: str | Path) -> RunFolder:
    """The folder of a recipe's run: the one that it was read from, or `runs_dir/NAME`; it may not exist yet.

    Raises:
        UsageError: the folder is not a run, or one of an older version.
    """
    runs_dir = Path(runs_dir)
    if recipe.home is not None:
        return find_run(recipe.home)
    path = runs_dir / recipe.name
    if runs_dir.exists() and not runs_dir.is_dir():
        raise UsageError(f"--runs-dir {runs_dir} is a file; name a folder, or one to be made")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; choose another name= or move it away")
    there = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if there - _BEFORE_WORK and not there & {"recipe.yaml", "manifest.json"}:
        raise UsageError(f"{path} exists and is no run folder; choose another name= or move it away")
    return find_run(path) if there - _BEFORE_WORK else RunFolder(path)


def records_of(run: RunFolder) -> dict[tuple[str, str | None], NodeRecord]:
    """{(node id, model or None): record} of all content of a run; a model for evaluation cells."""
    found: dict[tuple[str, str | None], NodeRecord] = {(node, None): record for node, record in run.nodes().items()}
    return found | {(f"evaluations/{name}", model): record for (name, model), record in run.cells().items()}


def states_of(run: RunFolder, fingerprints: Fingerprints, wanted: Iterable[str]) -> list[State]:
    """The states of the wanted nodes, and of the cells of evaluations, in the recipe's order."""
    nodes = [fingerprints.recipe.nodes[node_id] for node_id in wanted]
    return [
        _state(run, fingerprints, node, model)
        for node in nodes
        for model in (node.settings.models if node.kind == "evaluations" else (None,))
    ]


def equal_content(run: RunFolder, source: Path | None, states: Iterable[State]) -> dict[str, NodeFolder]:
    """{state name: folder with finished content of the same fingerprint} for unfinished states, found in the run at
    `source`, or under another name in this run.

    Raises:
        UsageError: `source` is not a run, or has no content for any of the states.
    """
    wanted = {state.name: state.fingerprint.of for state in states if state.fingerprint is not None}
    there = _finished(run)
    if source is not None:
        others = _finished(find_run(source))
        if not others.keys() & wanted.values():
            raise UsageError(
                f"--from {source}: nothing of it has the settings of this recipe; `cotree plan` on both shows why"
            )
        there |= others
    done = {state.name for state in states if state.state == "done"}
    return {name: there[of] for name, of in wanted.items() if of in there and name not in done}


def _finished(run: RunFolder) -> dict[str, NodeFolder]:
    """{fingerprint: folder} of a run's finished content."""
    found = {record.fingerprint: run.node(*place) for place, record in records_of(run).items()}
    return {fingerprint: node for fingerprint, node in found.items() if node.complete(fingerprint)}


def _state(run: RunFolder, fingerprints: Fingerprints, node: Node[Any], model: str | None) -> State:
    found = _state_in_folder(run, fingerprints, node, model)
    if node.kind != "trees" or not node.settings.parquet or found.state == "done" or found.fingerprint is None:
        return found
    return replace(found, regrow=0, asks=False) if _all_in_parquet(fingerprints, node) else found


def _all_in_parquet(fingerprints: Fingerprints, node: Node[Trees]) -> bool:
    """Whether the Parquet files of a trees node have the trees of all its questions.

    Raises:
        UsageError: one of them has none of the trees of these settings.
    """
    from cotree.search.trees import unfinished_turns

    config = fingerprints.of(node.id).base
    with TreeStores(files := node.settings.parquet_files()) as store:
        if foreign := [*{*files} - {*store.paths_with(config)}]:
            fix = "leave it out of `parquet` (null, if it came with `like`), or put the settings back"
            raise UsageError(f"{node.id}: no tree of {min(foreign)} was grown under these settings; {fix}")
        return not unfinished_turns(store, fingerprints.questions(node), config)


def _state_in_folder(run: RunFolder, fingerprints: Fingerprints, node: Node[Any], model: str | None) -> State:
    folder = run.node(node.id, model)
    record = folder.record()
    asks = not any((folder.path / name).is_file() for name in _REPLIES)
    try:
        wanted = fingerprints.of(node.id, model)
    except UsageError as error:
        return State(node, model, "new" if record is None else "partial", (f"unresolved: {error}",))
    if folder.complete(wanted.of):
        return State(node, model, "done", fingerprint=wanted)
    if record is not None and record.base == wanted.base:
        why = tuple(changed_keys(record.parts, wanted.parts)) or ("verdicts",)
        if same := record.fingerprint == wanted.of:
            why = tuple(folder.faults(record)) if record.done else ("not finished",)
        return State(node, model, "partial", why, wanted, asks=asks or not (same and record.done))
    if folder.older_record(wanted.base) is not None:
        whole = NodeFolder(folder.older / wanted.base).complete(wanted.of)
        return State(node, model, "done" if whole else "partial", ("comes back from older/",), wanted)
    if record is None and (lost := folder.without_record()):
        return State(node, model, "partial", (lost,), wanted, asks=asks)
    if record is None:
        return State(node, model, "new", fingerprint=wanted)
    keys = changed_keys(record.parts, wanted.parts)
    changed = [key for key in keys if key not in _READ]
    if read := [key for key in keys if key in _READ]:
        changed.append(f"what it reads ({', '.join(read)})")
    regrow = (
        _trees_to_regrow(run, fingerprints, node, record.base)
        if node.kind == "trees" and node.settings.file is None
        else 0
    )
    return State(node, model, "changed", tuple(changed), wanted, regrow)


def _trees_to_regrow(run: RunFolder, fingerprints: Fingerprints, node: Node[Any], base: str) -> int:
    """The number of trees of earlier settings in a run and its shards; 0 if all trees of the current settings exist."""
    stores = [part.node(node.id).path / "trees.db" for part in (run, *parts_beside(run))]
    wanted = sum(1 + len(question.later) for _, question in fingerprints.questions(node))
    if sum(count_trees(path, fingerprints.of(node.id).base) for path in stores[1:]) >= wanted:
        return 0
    return sum(count_trees(path, base) for path in stores)
