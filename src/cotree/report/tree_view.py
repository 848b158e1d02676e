"""Trees prepared for the terminal and the report: blocks of thoughts, verdicts, and uses of chains in datasets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nlargest
from itertools import chain, islice, zip_longest
from typing import Any

from cotree.base.progress import one_line
from cotree.base.run_folder import RunFolder
from cotree.base.shards import stores_of
from cotree.report.templates import sentence
from cotree.search.store import StoredNode, StoredTree
from cotree.search.stores import TreeStores

# Text columns of datasets, skipped here; the others identify a row's chain and why it was selected.
_TEXTS = {"prompt", "completion", "completions", "chosen", "rejected", "prefix", "chosen_step", "rejected_step"}
# Trees per node to search for the few that the report shows.
_CANDIDATES = 500
_LARGE = 40  # thoughts; a larger tree is hard to read on a page


@dataclass(frozen=True)
class DatasetUse:
    """A chain's use in a dataset. role: "SFT row", "chosen", "rejected", ...; why: a short reason."""

    dataset: str
    role: str
    why: str


@dataclass(frozen=True)
class ShownThought:
    """A thought, with the dataset uses of the chain that ends in it."""

    node: StoredNode
    uses: Sequence[DatasetUse]

    @property
    def prefix(self) -> str:
        """The prefix that the search forced, "" if the text does not start with it."""
        return self.node.prefix if self.node.text.startswith(self.node.prefix) else ""

    @property
    def remark(self) -> str:
        """A remark: cut by max_tokens, why it is wrong or undecided, or (a mini-step) that its line continues."""
        if self.node.verdict not in ("correct", "wrong", None) and self.node.finish_reason == "length":
            return "cut by max_tokens"
        if self.node.verdict in ("wrong", "undecided") and self.node.detail:
            return one_line(self.node.detail)[:200]
        return "…" if self.node.is_open else ""


@dataclass(frozen=True)
class Block:
    """A run of thoughts without branches, then the branches after its last thought."""

    thoughts: tuple[ShownThought, ...]
    branches: tuple[Block, ...]


@dataclass(frozen=True)
class DatasetRow:
    """A dataset row from a tree: its columns, the dataset's selection settings, and the row number."""

    dataset: str
    settings: Mapping[str, Any]
    columns: Mapping[str, Any]
    number: int

    @property
    def length(self) -> str:
        """The relative length by which the dataset selects chains first."""
        return str(self.settings.get("length", "shortest" if "chosen_leaf" in self.columns else "longest"))

    @property
    def place(self) -> tuple[str, int]:
        """Sort key: dataset, then order of selection."""
        tokens: int = self.columns.get("chosen_tokens") or self.columns.get("length_tokens") or 0
        return self.dataset, -tokens if self.length == "longest" else tokens


@dataclass(frozen=True)
class TreeView:
    """A stored tree with the dataset rows made from it. trees, settings: name and settings of its node."""

    trees: str
    tree: StoredTree
    rows: Sequence[DatasetRow]
    settings: Mapping[str, Any]

    @cached_property
    def verdicts(self) -> Counter[str]:
        """Counts of judged chains by verdict; always has the usual three."""
        found = Counter(correct=0, wrong=0, no_answer=0)
        found.update(node.verdict for node in self.tree.nodes if node.verdict is not None)
        return found

    @cached_property
    def uses(self) -> dict[int, list[DatasetUse]]:
        """{leaf id: dataset uses of its chain}."""
        places: Counter[str] = Counter()
        found: defaultdict[int, list[DatasetUse]] = defaultdict(list)
        for row in sorted(self.rows, key=lambda row: row.place):
            places[row.dataset] += 1
            roles = {"chosen_leaf": "chosen", "rejected_leaf": "rejected"}
            roles |= {"leaf_id": "SFT row" if "length_tokens" in row.columns else "process-reward row"}
            for column, role in roles.items():
                if column in row.columns:
                    why = sentence("why_taken", role, row, self.verdicts, places[row.dataset])
                    found[row.columns[column]].append(DatasetUse(row.dataset, role, why))
        return dict(found)

    @property
    def name(self) -> str:
        """The question's id, plus the turn if it is a later one."""
        return self.tree.question_id + (f", turn {self.tree.turn + 1}" if self.tree.turn else "")

    @property
    def thoughts(self) -> int:
        """The number of thoughts."""
        return len(self.tree.nodes) - 1

    @property
    def writers(self) -> list[str]:
        """The models that wrote its thoughts, in order of first appearance."""
        return list(dict.fromkeys(node.model for node in self.tree.nodes if node.model))

    @property
    def datasets(self) -> list[str]:
        """The datasets that contain a chain of it."""
        return sorted({use.dataset for uses in self.uses.values() for use in uses})

    def blocks(self) -> list[Block]:
        """Its thoughts as blocks, one per branch below the root."""
        children: defaultdict[int | None, list[StoredNode]] = defaultdict(list)
        for node in self.tree.nodes:
            children[node.parent_id].append(node)

        def block_from(node: StoredNode) -> Block:
            run = [node]
            while len(children[run[-1].node_id]) == 1:
                run += children[run[-1].node_id]
            thoughts = tuple(ShownThought(each, self.uses.get(each.node_id, ())) for each in run)
            return Block(thoughts, tuple(map(block_from, children[run[-1].node_id])))

        return [block_from(node) for node in children[0]]


def views_of(run: RunFolder, trees: Iterable[str], *, question: str | None = None) -> Iterator[TreeView]:
    """Iterate over the trees of some trees nodes, ordered by id; optionally of one question only.

    Args:
        trees: names of nodes.
    """
    rows = dataset_rows(run)
    for name in trees:
        node = run.node(f"trees/{name}")
        record, stores = node.record(), stores_of(run, name)
        if record is None:
            continue
        with TreeStores(stores) as store:
            for tree in store.trees(record.base):
                if question is None or tree.question_id == question:
                    yield TreeView(name, tree, rows[tree.tree_id], record.parts)


def dataset_rows(run: RunFolder, tree_id: str | None = None) -> defaultdict[str, list[DatasetRow]]:
    """{tree id: rows of all datasets of a run made from it}; optionally for one tree."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    found: defaultdict[str, list[DatasetRow]] = defaultdict(list)
    for node, record in run.nodes().items():
        path = run.node(node).path / "train.parquet"
        try:
            columns = set(pq.read_schema(path).names) - _TEXTS
            rows = pq.read_table(path, columns=sorted(columns)) if "tree_id" in columns else pa.table({})
        except (pa.ArrowException, OSError):
            continue  # no dataset, one that is being written, or damaged: the tree can be shown without it
        numbers = pa.array(range(len(rows)), pa.int64())
        if tree_id is not None and rows.num_rows:
            numbers = pc.indices_nonzero(pc.equal(rows["tree_id"], tree_id))
        for number, row in zip(numbers.to_pylist(), rows.take(numbers).to_pylist(), strict=True):
            found[row["tree_id"]].append(DatasetRow(node.partition("/")[2], record.parts, row, number))
    return found


def trees_to_show(run: RunFolder, trees: Iterable[str], number: int) -> list[TreeView]:
    """Pick a few instructive trees, from each task in turn: first those used by most datasets, then those with correct
    and wrong chains and a reflection; very large trees last."""
    best: dict[str, list[TreeView]] = {}
    for name in trees:
        for view in islice(views_of(run, [name]), _CANDIDATES):
            best[view.tree.task] = nlargest(number, [*best.get(view.tree.task, ()), view], key=_interest)
    in_turn = chain.from_iterable(zip_longest(*best.values()))
    return [view for view in in_turn if view is not None][:number]


def _interest(view: TreeView) -> tuple[bool, int, bool, bool, str]:
    """Sort key for `trees_to_show`, greater for more instructive trees."""
    both = min(view.verdicts["correct"], view.verdicts["wrong"]) > 0
    reflects = any(node.type == "reflection" for node in view.tree.nodes)
    return view.thoughts <= _LARGE, len(view.datasets), both, reflects, view.tree.tree_id
