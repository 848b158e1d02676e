"""Run an experiment: every node that is not up to date, each after those that it reads.

Whether a node is up to date is decided by its fingerprint and nothing else. Content that other settings made is kept in
the run's `older/` and found again when the settings go back; finished trees are never grown again in silence.
"""

from __future__ import annotations

import asyncio
import fcntl
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from cotree.base.atomic import atomic_draft, explain_write_errors, remove, write_text
from cotree.base.errors import UsageError, first_cotree_error
from cotree.base.progress import Output
from cotree.base.run_folder import NodeFolder, NodeRecord, RunFolder, find_run
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.hub import pinned
from cotree.experiment.preflight import preflight
from cotree.experiment.recipe import Node, Recipe, load_recipe, recipe_yaml
from cotree.experiment.state import State, equal_content, states_of
from cotree.experiment.work import Worker
from cotree.models.endpoints import check_servers
from cotree.models.settings import Model
from cotree.report.html import write_report
from cotree.report.summary import summarize_run, write_summary
from cotree.report.terminal import summary_lines


def run(
    recipe: Recipe,
    runs_dir: Path = Path("runs"),
    *,
    only: Sequence[str] = (),
    source: Path | None = None,
    regrow: bool = False,
    output: Output | None = None,
) -> RunFolder:
    """Bring the nodes of a recipe up to date; calling it again resumes.

    Args:
        runs_dir: where the run's folder is made (a recipe that was read from a run folder stays in that).
        only: ids of nodes ("students/dpo"), entries, or kinds ("trees"); what they read is included.
        source: another run, whose content of equal fingerprints is taken over.
        regrow: allow that finished trees are grown again because their settings changed.
        output: where progress is shown.

    Raises:
        UsageError: found before any work: something is missing, the folder is not a run's or is in use, or finished
            trees would be grown again.
        CotreeError: work failed after it had started; the same call resumes it.
    """
    output = output or Output()
    folder = run_folder(recipe, runs_dir)
    recipe = pinned(recipe, folder)
    fingerprints = Fingerprints(recipe)
    wanted = recipe.with_needed(only) if only else list(recipe.nodes)
    states = states_of(folder, fingerprints, wanted)
    for state in states:
        if state.fingerprint is None:
            raise UsageError(f"{state.name}: {state.why[0].removeprefix('unresolved: ')}")
    taken = equal_content(folder, source, states)
    ahead = [state for state in states if state.state != "done" and state.name not in taken]
    _refuse_regrowing(ahead, regrow, output)
    for _, _, look in preflight(recipe, fingerprints, [state.node for state in ahead]):
        look()
    asyncio.run(check_servers(_servers(recipe, ahead)))
    with _unchanged(source, folder) if taken else nullcontext():
        pass  # before anything is written
    with locked(folder.path):
        write_text(folder.path / "recipe.yaml", recipe_yaml(recipe))
        output.log = folder.path / "log.jsonl"
        _mark_outdated(folder, states_of(folder, fingerprints, recipe.nodes))
        if taken:
            _take(taken, folder, source, states=states, output=output)
        _work(recipe, folder, fingerprints, states=states, output=output)
        summary = summarize_run(folder, recipe_nodes(recipe))
        write_summary(folder, summary)
        report = write_report(folder, summary)
        for line in summary_lines(summary):
            output.print(line)
        output.print(f"report: {report}")
    return folder


def report_again(path: Path) -> Path:
    """Write summary and report of a run from its files; returns the page's path.

    Raises:
        UsageError: the folder is no run, or its files cannot be read.
    """
    folder = find_run(path)
    summary = summarize_run(folder, recipe_nodes(load_recipe(path)))
    write_summary(folder, summary)
    return write_report(folder, summary)


def recipe_nodes(recipe: Recipe) -> list[tuple[str, tuple[str, ...]]]:
    """The nodes of a recipe in order, each with the ids of what it reads; of evaluations the models too, as written."""

    def reads(node: Node) -> tuple[str, ...]:
        if node.kind != "evaluations":
            return node.reads
        asked = [f"{'models' if name in recipe.models else 'students'}/{name}" for name in node.evaluation.models]
        return (*asked, *(read for read in node.reads if read not in asked))

    return [(node.id, reads(node)) for node in recipe.nodes.values()]


def run_folder(recipe: Recipe, runs_dir: Path) -> RunFolder:
    """The folder of a recipe's run: the one that it was read from, or `runs_dir/NAME`; it may not be there yet.

    Raises:
        UsageError: there is something else, or a run of an older cotree.
    """
    if recipe.home is not None:
        return find_run(recipe.home)
    if runs_dir.exists() and not runs_dir.is_dir():
        raise UsageError(f"--runs-dir {runs_dir} is a file; name a folder, or one to be made")
    path = runs_dir / recipe.name
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; choose another name= or move it away")
    if path.is_dir() and any(entry.name != ".lock" for entry in path.iterdir()):
        if not (path / "recipe.yaml").is_file() and not (path / "manifest.json").is_file():
            raise UsageError(f"{path} exists and is no run folder; choose another name= or move it away")
        return find_run(path)
    return RunFolder(path)


def _work(
    recipe: Recipe, folder: RunFolder, fingerprints: Fingerprints, *, states: Sequence[State], output: Output
) -> None:
    worker = Worker(recipe, folder, fingerprints, output)
    for state in states:
        node = folder.node(state.node.id, state.model)
        assert state.fingerprint is not None
        wanted = state.fingerprint
        if node.complete(wanted.of):
            continue
        begun = any(
            there is not None and there.base == wanted.base for there in (node.record(), node.kept(wanted.base))
        )
        record = node.begin(NodeRecord(wanted.of, wanted.base, parts=wanted.parts, reads=state.node.reads))
        if record.done:
            output.print(f"{state.name}: kept from before")
            continue
        output.print(f"{state.name}: {'going on' if begun else 'begins'}")
        started = time.monotonic()
        with first_cotree_error(), node.working(record) as work:
            output.on_update = work.beat
            worker.work(state.node, state.model, work)
        output.on_update = lambda: None
        output.print(f"  {state.name} done in {time.monotonic() - started:.0f} s")


def _mark_outdated(folder: RunFolder, states: Sequence[State]) -> None:
    """Note of all content in the run whether it is of the recipe's settings, so that no table mixes the two."""
    wanted = {(state.node.id, state.model): state.fingerprint for state in states}
    there: dict[tuple[str, str | None], NodeRecord] = {(name, None): record for name, record in folder.nodes().items()}
    there |= {(f"evaluations/{name}", model): record for (name, model), record in folder.cells().items()}
    for (name, model), record in there.items():
        fingerprint = wanted.get((name, model))
        of_another = fingerprint is not None and fingerprint.base != record.base
        folder.node(name, model).mark(outdated=of_another or (name, model) not in wanted)


def _refuse_regrowing(ahead: Sequence[State], regrow: bool, output: Output) -> None:
    """Trees are paid work: growing finished ones again is said first, and needs `--regrow`."""
    for state in ahead:
        if not state.regrow:
            continue
        what = (
            f"{state.name}: {state.regrow} finished trees would be grown again (changed: {', '.join(state.why)}); "
            "requests that are the same are replayed from the journal, the others are made"
        )
        if not regrow:
            raise UsageError(f"{what}; add --regrow, or put the values back (the trees are kept either way)")
        output.print(what)


def _servers(recipe: Recipe, ahead: Sequence[State]) -> dict[str, Model]:
    asked: dict[str, Model] = {}
    for state in ahead:
        names = state.node.trees.writers if state.node.kind == "trees" else (state.model,) if state.model else ()
        asked |= {name: recipe.models[name] for name in names if name in recipe.models}
    return asked


def _take(
    taken: dict[str, NodeFolder], folder: RunFolder, source: Path | None, *, states: Sequence[State], output: Output
) -> None:
    """Bring content of equal fingerprints over: files are linked where the file system can, stores are copied."""
    draft = folder.path / ".taken"  # copied there first, so that a kill leaves no part of something in a node's folder
    with _unchanged(source, folder):
        for state in states:
            if state.name not in taken:
                continue
            node, content = folder.node(state.node.id, state.model), taken[state.name]
            record = content.record()
            assert record is not None
            with explain_write_errors(node.path, "set --runs-dir"):
                remove(draft)
                _copy(content.path, draft)
                node.begin(replace(record, done=False))
                # What shows that the content is whole comes last.
                for entry in sorted(draft.iterdir(), key=lambda entry: entry.name in record.files):
                    remove(node.path / entry.name)
                    entry.rename(node.path / entry.name)
            here = content.path.is_relative_to(folder.path)
            node.write(replace(record, outdated=False, origin=record.origin if here or source is None else source.name))
            output.print(f"{state.name}: taken from {content.path}")
        remove(draft)
        if source is not None and (source / "journal.db").is_file() and not (folder.path / "journal.db").exists():
            _copy(source / "journal.db", folder.path / "journal.db")


def _unchanged(source: Path | None, folder: RunFolder) -> AbstractContextManager[None]:
    """While the block runs, nothing works in the other run that content is taken from, if it is another."""
    if source is None or source.resolve() == folder.path.resolve():
        return nullcontext()
    return locked(source, fcntl.LOCK_SH)


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder, without its node.json."""
    if source.is_dir():
        target.mkdir(parents=True)
        for entry in source.iterdir():
            if entry.name != "node.json" and not entry.name.endswith(("-wal", "-shm")):
                _copy(entry, target / entry.name)
    elif source.suffix == ".db":  # its last changes may still be in a file beside it
        with (
            atomic_draft(target) as draft,
            closing(sqlite3.connect(source)) as old,
            closing(sqlite3.connect(draft)) as new,
        ):
            old.backup(new)
    elif source.suffix == ".jsonl" or not _linked(source, target):  # what is appended to must be a file of its own
        shutil.copy2(source, target)


def _linked(source: Path, target: Path) -> bool:
    try:
        target.hardlink_to(source)
    except OSError:
        return False
    return True


@contextmanager
def locked(path: Path, mode: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Have a run folder for oneself, or share it with others that change nothing (`fcntl.LOCK_SH`).

    Raises:
        UsageError: another process works in it.
        CotreeError: it cannot be made.
    """
    with explain_write_errors(path, "set --runs-dir"):
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a")
    with lock:
        try:
            fcntl.flock(lock, mode | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another cotree works in {path}; wait for it, or choose another name=") from None
        yield
