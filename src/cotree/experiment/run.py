"""Run an experiment: bring all nodes up to date in topological order.

Only a node's fingerprint decides whether it is up to date. Content of other settings is moved to the run's `older/`
and restored when the settings return; finished trees are regrown only with the user's consent.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cotree.base.atomic import atomic_draft, explain_write_errors, remove, write_text
from cotree.base.disk import one_machine_locks, shared_file_system
from cotree.base.errors import UsageError, first_cotree_error
from cotree.base.lock import locked
from cotree.base.progress import Output
from cotree.base.run_folder import NodeFolder, NodeRecord, RunFolder, find_run
from cotree.base.shards import SHARDED, Shard, ShardFolder, parquet_of, parts_beside, shards_of
from cotree.data.annotations import FILE
from cotree.experiment.check import preflight
from cotree.experiment.engines import engine_lines, engines_of, with_engines
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.hub import pinned
from cotree.experiment.recipe import Recipe, load_recipe, recipe_yaml
from cotree.experiment.shard_states import ShardStates
from cotree.experiment.state import State, equal_content, records_of, run_folder, states_of
from cotree.experiment.work import Worker
from cotree.models.endpoints import check_servers
from cotree.report.html import write_report
from cotree.report.summary import NodeReads, summarize_run, write_summary
from cotree.report.table import summary_lines
from cotree.search.merge import merge_journals, merge_stores
from cotree.search.store import TreeStore
from cotree.search.stores import TreeStores
from cotree.train.processes import first_process


@dataclass(frozen=True)
class _Options:
    """Options of `run`."""

    regrow: bool
    scratch: str | None  # unexpanded: environment variables are expanded where a shard runs
    output: Output

    @property
    def disk(self) -> Path | None:
        """The scratch folder on this machine, with environment variables expanded.

        Raises:
            UsageError: a variable is not set.
        """
        if self.scratch is None:
            return None
        if "$" in (place := os.path.expandvars(self.scratch)):
            raise UsageError(f"--scratch {self.scratch}: the variable is not set here")
        return Path(place)


def run(
    recipe: Recipe,
    runs_dir: str | Path = "runs",
    *,
    only: str | Sequence[str] = (),
    source: str | Path | None = None,
    regrow: bool = False,
    shard: Shard | None = None,
    on: str | None = None,
    shards: int | None = None,
    scratch: str | Path | None = None,
    output: Output | None = None,
) -> RunFolder:
    """Bring the nodes of a recipe up to date; the same call resumes.

    Works under torchrun.

    Args:
        runs_dir: parent of the run folder (a recipe that was read from a run folder stays there).
        only: ids of nodes ("students/dpo"), entries, or kinds ("trees"), with their dependencies.
        source: another run, from which content with equal fingerprints is copied.
        regrow: allow growing finished trees again because their settings changed.
        shard: run the trees and evaluations for this part of the questions only, in a folder of its own.
        on: run trees and evaluations of `only` first, in `shards` parts: `local:PROCESSES`, `slurm:FILE.yaml`
            (returns after submission) or `ray:ADDRESS` (docs/scale.md).
        scratch: a folder on a local disk for stores and journals, with periodic copies to the run folder; for run
            folders on network file systems.
        output: shows progress.

    Raises:
        UsageError: before any work: something is missing, the folder is not a run or in use, or finished trees would be
            grown again.
        CotreeError: work failed after it started; the same call resumes it.
    """
    only = [only] if isinstance(only, str) else only
    source = None if source is None else Path(source)
    folder = run_folder(recipe, runs_dir)
    if (on is None) != (shards is None) or (on and shard):
        raise UsageError("write --on with --shards N and without --shard: it runs all of them")
    if source is not None and (on or shard):
        raise UsageError("--from takes content over into a whole run; run it once without shards")
    how = _Options(regrow, None if scratch is None else str(scratch), output or Output())
    with first_process() as first:
        if first and shard is not None:
            _run_shard(recipe, ShardFolder(folder, shard), only, how)
        elif first and (on is None or _run_fleet(recipe, folder, only, how, on=on, shards=shards or 0)):
            _run(recipe, folder, only, how, source=source)
    return folder


def search_shard(
    recipe: Recipe | str | Path,
    node: str | Sequence[str],
    rank: int,
    world_size: int,
    *,
    runs_dir: str | Path = "runs",
    regrow: bool = False,
    scratch: str | Path | None = None,
    output: Output | None = None,
) -> Path:
    """Run trees or evaluations for one shard of the questions; returns the shard's folder.

    A hash assigns questions to ranks 0 to `world_size` - 1. The calls may run in any order, concurrently, and on any
    machine with the run folder; together they give the result of one run. The same call resumes.

    Args:
        recipe: a recipe, its path, or a run folder.
        node: ids of nodes: "trees/train", "evaluations/test". The other arguments are those of `run`.

    Raises:
        UsageError: before any work.
        CotreeError: work failed after it started; the same call resumes it.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    shard = Shard(world_size, rank)
    folder = run(loaded, runs_dir, only=node, regrow=regrow, shard=shard, scratch=scratch, output=output)
    return ShardFolder(folder, shard).path


def _run(recipe: Recipe, folder: RunFolder, only: Sequence[str], how: _Options, *, source: Path | None) -> None:
    output = how.output
    recipe = with_engines(pinned(recipe, folder), folder)
    with_annotations = [place for place in (folder.path, source) if place is not None and (place / FILE).is_file()]
    fingerprints = Fingerprints(recipe, run=next(iter(with_annotations), None))
    wanted = recipe.with_needed(only) if only else list(recipe.nodes)
    if folder.nodes():
        with locked(folder.path):
            for part in (*shards_of(folder), folder):
                _mend_stores(part, output)
    states = states_of(folder, fingerprints, wanted)
    taken = equal_content(folder, source, states)
    _check_disk(folder, states, how)
    _preflight(fingerprints, states, [s for s in states if s.name not in taken], regrow=how.regrow, output=output)
    reading = ExitStack()  # locks the other run while content is copied from it
    if taken and source is not None and source.resolve() != folder.path.resolve():
        reading.enter_context(locked(source, fcntl.LOCK_SH))
    with reading, locked(folder.path):
        write_text(folder.path / "recipe.yaml", recipe_yaml(recipe))
        output.log = folder.path / "log.jsonl"
        _mark_outdated(folder, states_of(folder, fingerprints, recipe.nodes))
        if taken:
            _take_over(taken, folder, source, states=states, output=output)
        reading.close()
        worker = Worker(recipe, folder, fingerprints, output, scratch=how.disk)
        for state in states:
            _bring_up_to_date(worker, state)
        output.print(f"report: {_write_results(folder, recipe, output)}")


def _run_fleet(recipe: Recipe, folder: RunFolder, only: Sequence[str], how: _Options, *, on: str, shards: int) -> bool:
    """Run all shards; returns whether they are finished, so that the run can continue with later nodes."""
    from cotree.experiment.fleet import Fleet, run_shards

    recipe = with_engines(pinned(recipe, folder), folder)
    wanted = _dealt_nodes(recipe, only)
    states = ShardStates(folder, Fingerprints(recipe, run=folder.path), wanted, Shard(shards, 0).world_size)
    _make_folder(folder)
    _write_recipe(folder, recipe)
    options = ["--regrow"] if how.regrow else []
    if how.scratch is not None:
        options += ["--scratch", how.scratch if how.scratch.startswith("$") else os.path.abspath(how.scratch)]
    same: dict[str, Any] = {"world_size": shards, "regrow": how.regrow, "scratch": how.scratch}
    work = partial(search_shard, folder.path.resolve(), list(only), **same)
    return run_shards(Fleet(folder, only, options, work, states, shards, how.output), on)


def _dealt_nodes(recipe: Recipe, only: Sequence[str]) -> list[str]:
    """The ids of the wanted nodes and their dependencies, checked to be shardable.

    Raises:
        UsageError: a node cannot be run in shards.
    """
    wanted = recipe.with_needed(only) if only else []
    nodes = [recipe.nodes[name] for name in wanted]
    if not any(node.kind in SHARDED for node in nodes):
        raise UsageError("a shard grows trees or asks evaluations; name them with --only, e.g. --only trees/train")
    for node in nodes:
        if node.kind == "trees" and node.settings.adaptive:
            raise UsageError(f"{node.id}: `adaptive` shares rollouts over all questions; leave it out to use shards")
    return wanted


def _make_folder(run: RunFolder) -> None:
    """Create a run folder with its lock file; safe for concurrent processes."""
    with explain_write_errors(run.path, "set --runs-dir"):
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / ".lock").touch()


def _write_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Write a run's recipe file, if it differs."""
    text, kept = recipe_yaml(recipe), run.path / "recipe.yaml"
    if not kept.is_file() or kept.read_text(encoding="utf-8") != text:
        write_text(kept, text)


def _run_shard(recipe: Recipe, folder: ShardFolder, only: Sequence[str], how: _Options) -> None:
    """Bring the trees and evaluations of a shard up to date; their dependencies must be finished."""
    output, run, shard = how.output, folder.whole, folder.shard
    recipe = with_engines(pinned(recipe, run), run)
    fingerprints = Fingerprints(recipe, shard, run=run.path)
    wanted = _dealt_nodes(recipe, only)
    _make_folder(run)
    # No other process works in the whole run meanwhile, but other shards do.
    with locked(run.path, fcntl.LOCK_SH), locked(folder.path, other="leave this shard to it"):
        _mend_stores(folder, output)
        states = states_of(folder, fingerprints, wanted)
        for state in states:
            if state.node.kind not in SHARDED and state.state != "done":
                raise UsageError(
                    f"{state.name} is made of all questions and is not done; make it before the shards that need it: "
                    f"`cotree run {run.path} --only {state.node.id}`"
                )
        before = {state.name: state for state in states_of(run, fingerprints.whole, wanted)}
        paid = [replace(state, regrow=max(state.regrow, before[state.name].regrow)) for state in states]
        _check_disk(folder, states, how)
        _preflight(fingerprints, paid, paid, regrow=how.regrow, output=output)
        _write_recipe(run, recipe)
        output.log = folder.path / "log.jsonl"
        worker = Worker(recipe, folder, fingerprints, output, scratch=how.disk)
        for state in states:
            whole = run.node(state.node.id, state.model)
            if whole.record() is None and not whole.without_record():  # marks it as started
                of = before[state.name].fingerprint
                assert of is not None
                whole.write(NodeRecord(of.of, of.base, parts=of.parts, reads=state.node.reads))
            _bring_up_to_date(worker, state)
        output.print(f"shard {shard} is done: {folder.path}")


def _check_disk(folder: RunFolder, states: Sequence[State], how: _Options) -> None:
    """Check that SQLite is safe at the run folder, and warn if its file locks work on one machine only.

    Raises:
        UsageError: the folder is on a network file system, and `scratch` is not on a local disk.
    """
    if option := one_machine_locks(folder.path):
        how.output.print(
            f"{folder.path}: other machines do not see file locks there (mounted with {option}); let no two work in it"
        )
    if not any(state.node.kind == "trees" and state.state != "done" for state in states):
        return
    kind = shared_file_system(folder.path)
    if kind and how.scratch is None:
        fix = "add --scratch DIR with a folder on a local disk, or set --runs-dir to one"
        raise UsageError(f"{folder.path} is on {kind}, where SQLite's WAL is not safe; {fix}")
    if how.disk is not None and (kind := shared_file_system(how.disk)):
        raise UsageError(f"--scratch {how.scratch} is on {kind}; name a folder on a local disk")


def _preflight(
    fingerprints: Fingerprints, states: Sequence[State], ahead: Sequence[State], *, regrow: bool, output: Output
) -> None:
    """Run the preflight checks, and print what will be done.

    Args:
        ahead: the states of all wanted nodes, finished ones included.

    Raises:
        UsageError: something is missing, or finished trees would be grown again.
    """
    for state in states:
        if state.fingerprint is None:
            raise UsageError(f"{state.name}: {state.why[0].removeprefix('unresolved: ')}")
    recipe, ahead = fingerprints.recipe, [state for state in ahead if state.state != "done"]
    for state in ahead:  # trees cost tokens
        if state.regrow:
            what = (
                f"{state.name}: {state.regrow} finished trees would be grown again (changed: {', '.join(state.why)}); "
                "requests that are the same are replayed from the journal, the others are made"
            )
            if not regrow:
                raise UsageError(f"{what}; add --regrow, or put the values back (the trees are kept either way)")
            output.print(what)
    for _, _, look in preflight(fingerprints, [state.node for state in ahead]):
        look()
    asked = _models_used([state for state in ahead if state.asks])
    for line in engine_lines(engines_of(recipe, asked)):
        output.print(line)
    for line in asyncio.run(check_servers({name: recipe.models[name] for name in asked if name in recipe.models})):
        output.print(line)


def rewrite_report(path: Path, out: Path | None = None) -> Path:
    """Write summary and HTML report of a run from its files; returns the report's path (`out`, if given).

    Raises:
        UsageError: the folder is not a run, or its files cannot be read.
    """
    return _write_results(find_run(path), load_recipe(path), Output(quiet=True), out)


def _write_results(folder: RunFolder, recipe: Recipe, output: Output, out: Path | None = None) -> Path:
    """Write and print the summary of a run, and write its report."""

    summary = summarize_run(folder, nodes_of(recipe))
    if out is None or os.access(folder.path, os.W_OK):  # the run folder may be read-only
        write_summary(folder, summary)
    page = write_report(folder, summary, out)  # before printing, which fails on a closed pipe
    for line in summary_lines(summary):
        output.print(line)
    return page


def nodes_of(recipe: Recipe) -> list[NodeReads]:
    """The nodes of a recipe with their dependencies; for an evaluation first its models in written order."""
    found: list[NodeReads] = []
    for node in recipe.nodes.values():
        models = node.settings.models if node.kind == "evaluations" else ()
        asked = [f"{'models' if name in recipe.models else 'students'}/{name}" for name in models]
        found.append((node.id, tuple(dict.fromkeys([*asked, *node.reads]))))
    return found


def view_run(path: Path, **options: Any) -> None:
    """Serve the viewer of a run until Ctrl-C; options: those of `view.server.view`.

    Raises:
        UsageError: the folder is not a run, its recipe does not load, or the address cannot be bound.
    """
    from cotree.view.server import view

    view(find_run(path), nodes_of(load_recipe(path)), **options)


def _bring_up_to_date(worker: Worker, state: State) -> None:
    """Compute the content of a node or cell, unless it is complete or can be restored from `older/`."""
    wanted, output = state.fingerprint, worker.output
    folder = worker.run.node(state.node.id, state.model)
    assert wanted is not None
    if folder.complete(wanted.of):
        return
    record = folder.begin(NodeRecord(wanted.of, wanted.base, parts=wanted.parts, reads=state.node.reads))
    if record.done:
        output.print(f"{state.name}: taken back from older/")
        return
    if state.lost:
        output.print(f"{state.name}: {state.lost}; made again from what is whole")
    output.print(f"{state.name}: {'going on' if state.state == 'partial' else 'begins'}")
    started = time.monotonic()
    with first_cotree_error(), folder.working(record) as work:
        output.on_update = work.save_periodically
        worker.work(state.node, state.model, work)
    output.on_update = lambda done, total: None
    output.print(f"  {state.name} done in {time.monotonic() - started:.0f} s")


def _mend_stores(folder: RunFolder, output: Output) -> None:
    """Recover the readable trees of damaged stores. A node that lost trees is no longer done.

    Writes nothing on file systems where SQLite's WAL is not safe.
    """
    if shared_file_system(folder.path):
        return
    for name, record in folder.nodes().items():
        path = folder.node(name).path / "trees.db"
        if not record.done or not path.is_file() or not path.stat().st_size:
            continue  # not counted yet, of another kind, or lost wholly, which is found otherwise
        parquet = parquet_of(record)
        others = [*(part.node(name).path / "trees.db" for part in parts_beside(folder)), *parquet]
        with TreeStore(path) as store, TreeStores(filter(Path.is_file, others), store) as stores:
            counted = record.result["counts"]["trees"] - len(stores.finished(record.base))
            if not all(map(Path.is_file, parquet)):
                counted = 0  # the recipe says where they are now
            if store.rescued:
                output.print(f"{name}: {store.rescued}")
        if lost := max(counted, store.lost):
            output.print(f"{name}: {lost} of its trees are gone and will be grown again")
            folder.node(name).write(replace(record, done=False))


def _mark_outdated(folder: RunFolder, states: Sequence[State]) -> None:
    """Mark in the records which content has outdated settings, so that tables do not mix both."""
    wanted = {(state.node.id, state.model): state.fingerprint for state in states}
    for place, record in records_of(folder).items():
        fingerprint = wanted.get(place)
        of_another = fingerprint is not None and fingerprint.base != record.base
        folder.node(*place).mark_outdated(of_another or place not in wanted)


def _models_used(states: Sequence[State]) -> list[str]:
    """The distinct models and students that will generate or be evaluated."""
    names: list[str] = []
    for state in states:
        names += state.node.settings.writers if state.node.kind == "trees" else [state.model] if state.model else []
    return list(dict.fromkeys(names))


def _take_over(
    taken: Mapping[str, NodeFolder], run: RunFolder, source: Path | None, *, states: Sequence[State], output: Output
) -> None:
    """Copy content with equal fingerprints into the run: files are hard-linked if possible, stores are copied."""
    draft = run.path / ".taken"  # copied there first, so that a kill leaves no part of something in a node's folder
    for state in states:
        if state.name not in taken:
            continue
        folder, content = run.node(state.node.id, state.model), taken[state.name]
        record = content.record()
        assert record is not None
        with explain_write_errors(folder.path, "set --runs-dir"):
            remove(draft)
            _copy(content.path, draft)
            if shards := [content.path / name for name in record.files if name.startswith("..")]:
                merge_stores(shards, draft / "trees.db")
                record = replace(record, files=dict.fromkeys(["trees.db", *map(str, parquet_of(record))], ""))
            folder.begin(replace(record, done=False))
            # The record, which marks the content as complete, comes last.
            for entry in sorted(draft.iterdir(), key=lambda entry: entry.name in record.files):
                remove(folder.path / entry.name)
                entry.rename(folder.path / entry.name)
        elsewhere = not content.path.is_relative_to(run.path)
        origin = source.name if source is not None and elsewhere else record.origin
        folder.write(replace(record, outdated=False, origin=origin))
        output.print(f"{state.name}: taken from {content.path}")
    remove(draft)
    for name in ("journal.db", FILE):
        if source is not None and not (run.path / name).exists():
            for file in (f"{name}-wal", name):
                if (source / file).is_file():
                    _copy(source / file, run.path / file)
            if name == "journal.db":
                journals = [part.path / name for part in shards_of(RunFolder(source))]
                merge_journals(filter(Path.is_file, journals), run.path / name)


def _copy(source: Path, target: Path) -> None:
    """Copy a file or folder without its node.json; files that never change are hard-linked if possible. A store is
    copied with its WAL, which SQLite applies when the copy is opened."""
    if source.is_dir():
        target.mkdir(parents=True)
        for entry in source.iterdir():
            if entry.name != "node.json" and not entry.name.endswith(("-shm", ".log")):
                _copy(entry, target / entry.name)
    elif source.suffix in (".db", ".db-wal", ".jsonl"):
        with atomic_draft(target) as draft:
            shutil.copyfile(source, draft)  # without its mode: the source may be read-only
    else:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
