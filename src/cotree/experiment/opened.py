"""Read-only Python access to a run: its nodes, trees, dataset rows, students and tables; and `cotree preview`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.base.errors import UsageError
from cotree.base.rows import Row, read_rows
from cotree.base.run_folder import NodeRecord, RunFolder, find_run
from cotree.base.settings import nearest
from cotree.base.shards import stores_of
from cotree.experiment.recipe import Recipe
from cotree.experiment.state import run_folder
from cotree.experiment.work import tokenizer_of
from cotree.report.summary import summarize_run
from cotree.search.store import StoredTree
from cotree.search.stores import TreeStores

if TYPE_CHECKING:
    from rich.text import Text


class Run:
    """A run folder, opened for reading.

    run = cotree.open_run("runs/laptop")
    for tree in run.trees("train"):
        print(tree.question_id, [node.verdict for node in tree.nodes])
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.path
        self._folder = folder

    @property
    def nodes(self) -> Mapping[str, NodeRecord]:
        """The records of trees, datasets and students nodes by id ("students/dpo")."""
        return self._folder.nodes()

    @property
    def cells(self) -> Mapping[tuple[str, str], NodeRecord]:
        """The records of evaluated models, by (evaluation, model)."""
        return self._folder.cells()

    def trees(self, name: str) -> Iterator[StoredTree]:
        """Iterate over the trees of a trees node; `node.verdict` is correct, wrong, no_answer, undecided or None.

        Raises:
            UsageError: the run has no such trees.
        """
        node = f"trees/{name}"
        stores = stores_of(self._folder, name) or [self._content(node, "trees.db")]
        return _trees_in(stores, self._record(node).base)

    def dataset(self, name: str) -> Iterator[Row]:
        """Iterate over the rows of a dataset.

        Raises:
            UsageError: the run has no such dataset.
        """
        return read_rows(self._content(f"datasets/{name}", "train.parquet"))

    def student(self, name: str) -> Path:
        """The transformers folder of a trained student.

        Raises:
            UsageError: the run has no such student.
        """
        return self._content(f"students/{name}", "model")

    def table(self) -> list[dict[str, Any]]:
        """The rows of the evaluation table, as in `summary.json`; fractions, not percents."""
        return [row.model_dump() for row in summarize_run(self._folder).eval]

    def _content(self, node: str, name: str) -> Path:
        self._record(node)
        path = self._folder.node(node).path / name
        if not path.exists():
            raise UsageError(f"{path} is not there (yet); `cotree run {self.path} --only {node}` makes it")
        return path

    def _record(self, node: str) -> NodeRecord:
        if node not in (nodes := self.nodes):
            raise UsageError(f"{self.path} has no {node}; {nearest(node, nodes)}")
        return nodes[node]


def open_run(path: str | Path) -> Run:
    """Open a run folder for reading.

    Raises:
        UsageError: not a run, or one of an older version.
    """
    return Run(find_run(Path(path)))


def preview_dataset(recipe: Recipe, runs_dir: Path, name: str, rows: int) -> Text:
    """Render the first rows of a dataset node as the trainer sees them, token by token.

    Raises:
        UsageError: the recipe has no such dataset, or it is not built yet.
    """
    from cotree.data.preview import preview

    known = {node.name: node for node in recipe.of_kind("datasets")}
    if name not in known:
        raise UsageError(f"unknown dataset `{name}`; {nearest(name, known)}")
    path = run_folder(recipe, runs_dir).node(f"datasets/{name}").path / "train.parquet"
    if not path.is_file():
        raise UsageError(f"no rows at {path}; make them with `cotree run RECIPE --only datasets/{name}`")
    settings = known[name].settings
    return preview(path, tokenizer_of(recipe, settings.tokenizer), settings.max_tokens, rows)


def _trees_in(stores: Sequence[Path], config: str) -> Iterator[StoredTree]:
    with TreeStores(stores) as store:
        yield from store.trees(config)
