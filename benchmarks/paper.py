"""The paper's tables in miniature: run them arm by arm, and keep every finished arm's numbers in docs/results/.

    python -m benchmarks.paper small step alpha      these tables of recipes/paper_mini/small.yaml
    python -m benchmarks.paper small step alpha 'students.sft.seeds=[0]' --out runs/paper-quick
    python -m benchmarks.paper --page                docs/results.md and its figures, from what is in docs/results/

A table is an evaluation of the recipe, with those whose name begins with its name and `_`. An arm is one of its models
or students (a seed of it): it is trained and asked, then TABLE.json gets its rows, so a table can be stopped and
completed later, by the same command. Arms of the first seed come first. Trees are grown once for all tables.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import paper_page

from cotree.base.atomic import write_json
from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.base.run_folder import NodeRecord, RunFolder
from cotree.base.settings import nearest
from cotree.experiment.recipe import Recipe, build_recipe, load_recipe
from cotree.experiment.run import run
from cotree.report.summary import read_log, read_recipe, split_seed, summarize_model

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "paper_mini"
OUT = ROOT / "docs" / "results"
Entry = dict[str, Any]
# What names an entry of each part of a table's file; a new one takes the place of one with the same names.
KEYS = {
    "rows": ("tier", "evaluation", "model", "seed", "task"),
    "students": ("tier", "model", "seed"),
    "datasets": ("tier", "name"),
    "trees": ("tier", "name"),
}
_SCORES = (
    *("n", "samples", "temperature", "max_tokens", "decoding", "accuracy", "low", "high", "no_answer", "loop"),
    *("truncated", "finished_without_answer", "over_reflection", "instruction_failure", "undecided"),
    *("mean_tokens", "tokens_p90", "test_at", "majority", "detectable"),
)
_TRAINED = ("parent", "method", "data", "rows", "steps", "tokens", "seconds")
_PROBED = ("probe_tokens", "probe_loop", "probe_no_answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", nargs="?", help=f"{', '.join(sorted(path.stem for path in RECIPES.glob('*.yaml')))}")
    parser.add_argument("tables", nargs="*", help="evaluations of its recipe, and settings: students.sft.epochs=1")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--out", type=Path, default=OUT, help="of the tables' files; the page is written beside it")
    parser.add_argument("--page", action="store_true", help="write the page only")
    options = parser.parse_intermixed_args()
    left_out: list[str] = []
    if not options.page:
        overrides = [word for word in options.tables if "=" in word]
        tables = [word for word in options.tables if "=" not in word]
        left_out = run_tables(
            RECIPES / f"{options.tier}.yaml", tables, overrides, runs_dir=options.runs_dir, out=options.out
        )
    print(paper_page.write_page(options.out))
    if left_out:
        raise SystemExit("\n".join(["left out:", *left_out]))


def run_tables(
    file: Path, tables: Sequence[str], overrides: Sequence[str] = (), *, runs_dir: Path, out: Path
) -> list[str]:
    """Bring tables of a recipe up to date, arm by arm; after each arm its table's file has its numbers.

    Returns:
        A line for each arm that could not begin, because something that it needs is not here.

    Raises:
        UsageError: there is no such table, or no such recipe.
        CotreeError: an arm failed; what was finished before is kept.
    """
    recipe, left_out = load_recipe(file, overrides), list[str]()
    parts = [(table, name) for table in tables for name in _evaluations_of(recipe, table)]
    for table, name in parts:
        models: list[str] = []
        for model in arms(recipe, name):
            one_more = _asking(recipe, name, [*models, model])
            try:
                folder = run(one_more, runs_dir, only=f"evaluations/{name}", output=Output())
            except UsageError as error:
                left_out.append(f"{name}/{model}: {error}")
                continue
            models.append(model)
            add_to_table(out / f"{table}.json", arm_entries(folder, file.stem, name, model))
    return left_out


def _asking(recipe: Recipe, evaluation: str, models: Sequence[str]) -> Recipe:
    """The recipe with these models alone in an evaluation, and in those that spend what it spent (`tokens_of`)."""
    written = copy.deepcopy({**recipe.written})  # the file itself may be changed meanwhile
    for name, entry in written["evaluations"].items():
        if name == evaluation or entry.get("tokens_of") == evaluation:
            entry["models"] = list(models)
    return build_recipe(written)


def _evaluations_of(recipe: Recipe, table: str) -> Iterator[str]:
    known = [node.name for node in recipe.of_kind("evaluations")]
    if table not in known:
        raise UsageError(f"no table `{table}` in {recipe.name}; {nearest(table, known)}")
    yield from (name for name in known if name == table or name.startswith(f"{table}_"))


def arms(recipe: Recipe, evaluation: str) -> list[str]:
    """The models of an evaluation in the order in which they are run: seed after seed, each in the recipe's order."""
    models: Sequence[str] = recipe.nodes[f"evaluations/{evaluation}"].settings.models
    return sorted(models, key=lambda name: split_seed(name)[1] or 0)


def arm_entries(folder: RunFolder, tier: str, evaluation: str, model: str) -> dict[str, list[Entry]]:
    """What a finished arm adds to its table's file: the entries of each part (`KEYS`)."""
    nodes, cell = folder.nodes(), folder.cells()[evaluation, model]
    where = folder.node(f"evaluations/{evaluation}", model).path / "node.json"
    summary = summarize_model(evaluation, model, cell, where)
    entries: dict[str, list[Entry]] = {part: [] for part in KEYS}
    for row in summary.eval:
        named = {"tier": tier, "evaluation": evaluation, **_named(folder, model), "task": row.task}
        entries["rows"].append(named | {key: getattr(row, key) for key in _SCORES} | _origin(cell))
    for node, record in nodes.items():
        kind, _, short = node.partition("/")
        if node not in _behind(nodes, f"students/{model}") or not record.done:
            continue
        if kind == "students":
            log = read_log(folder.node(node).path / "log.jsonl")
            curve = [[line["step"], *(line[key] for key in _PROBED)] for line in log if _PROBED[-1] in line]
            found = {**record.result, **record.result["train"]}
            numbers = {key: found[key] for key in _TRAINED if key != "seconds"} | {"curve": curve}
            entries[kind].append({"tier": tier, **_named(folder, short)} | numbers | _origin(record))
        else:
            entries[kind].append({"tier": tier, "name": short, "counts": record.result["counts"]} | _origin(record))
    return entries


def _named(folder: RunFolder, model: str) -> Entry:
    """A model's or student's name without its seed, and the seed; of a student without one the recipe's, of a model
    none."""
    recipe, (name, seed) = read_recipe(folder), split_seed(model)
    return {"model": name, "seed": None if name in recipe["models"] else recipe["seed"] if seed is None else seed}


def _origin(record: NodeRecord) -> Entry:
    """Where numbers are from: what names their settings, when and how long they were made, on what machine."""
    about = {"fingerprint": record.fingerprint, "date": record.created, "seconds": round(record.seconds, 1)}
    return about | {"machine": dict(record.machine), "git": record.versions.get("git")}


def _behind(nodes: Mapping[str, NodeRecord], node: str) -> set[str]:
    """A node of a run with all that it reads, directly or not."""
    if node not in nodes:
        return set()
    return {node}.union(*(_behind(nodes, read) for read in nodes[node].reads))


def add_to_table(path: Path, entries: Mapping[str, Iterable[Entry]]) -> None:
    """Put entries into a table's file, in place of those of the same names; the others stay."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {part: [] for part in KEYS}
    for part, added in entries.items():
        by_name = {tuple(entry[key] for key in KEYS[part]): entry for entry in [*table[part], *added]}
        table[part] = list(by_name.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table)


if __name__ == "__main__":
    main()
