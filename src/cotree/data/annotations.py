"""`annotations.db` of a run: human annotations of chains, by annotator.

Invariant: append-only: each save is a new row, and an annotator's last row for a chain counts. A chain is identified by
tree, leaf and a hash of its text, so annotations do not apply to a changed text.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from cotree.base.errors import NotFoundError, UsageError
from cotree.base.progress import one_line
from cotree.base.rows import Row
from cotree.base.run_folder import RunFolder
from cotree.base.shards import stores_of
from cotree.search.database import Database, checksum
from cotree.search.store import StoredNode, StoredTree
from cotree.search.stores import TreeStores
from cotree.search.thoughts import chain_text

FILE = "annotations.db"
AnnotationVerdict = Literal["accept", "reject", "fix"]
Key = tuple[str, int]  # (tree id, leaf id)
_LONGEST_NAME = 100


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One annotator's annotation of a chain.

    node: name of the trees node. config: of the tree (`StoredTree.config`). chain: hash of the chain's text. verdict:
    None if withdrawn. text: corrected text of a `fix`. time: Unix time of the save. version: number of the save in the
    run, from 1.
    """

    version: int = 0
    node: str
    config: str
    tree: str
    leaf: int
    chain: str
    annotator: str
    verdict: AnnotationVerdict | None
    note: str = ""
    text: str = ""
    time: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        """Raises UsageError if a field is missing or invalid."""
        if not self.annotator.strip() or self.annotator != one_line(self.annotator)[:_LONGEST_NAME]:
            raise UsageError(f"give the annotator's name, in one line of at most {_LONGEST_NAME} characters")
        if self.verdict not in (*get_args(AnnotationVerdict), None):
            raise UsageError(f"an annotation is {', '.join(get_args(AnnotationVerdict))}, not `{self.verdict}`")
        if (self.verdict == "fix") != bool(self.text.strip()):
            raise UsageError("a corrected text goes with `fix`, and with nothing else")

    @property
    def shown(self) -> Row:
        """The fields for the viewer's page."""
        names = ("version", "leaf", "annotator", "verdict", "note", "text", "time")
        return {name: getattr(self, name) for name in names}


class ConflictError(UsageError):
    """The same annotator saved in another browser meanwhile. found: that annotation; None: withdrawn."""

    def __init__(self, found: Annotation | None) -> None:
        super().__init__("you have annotated this chain elsewhere in between; look at it and save again")
        self.found = found


@dataclass(frozen=True)
class ChainAnnotation:
    """A chain's annotations combined: whether any annotator accepts it, whether any rejects it, the newest corrected
    text ("": none), and the hash of the annotated text."""

    accepted: bool
    rejected: bool
    fixed: str
    chain: str


class Annotations(Database):
    """The annotations of one run, in SQLite."""

    kind = "store of annotations"
    items = "annotations"
    main_table = "annotations"
    tables_of_items = ("annotations",)
    key = "version"
    schema_version = 1
    upgrade = ()
    schema = (
        """CREATE TABLE annotations (version INTEGER NOT NULL UNIQUE, node TEXT NOT NULL, config TEXT NOT NULL,
            tree TEXT NOT NULL, leaf INTEGER NOT NULL, chain TEXT NOT NULL, annotator TEXT NOT NULL, verdict TEXT,
            note TEXT NOT NULL, text TEXT NOT NULL, time REAL NOT NULL, checksum INTEGER)""",
        "CREATE INDEX annotations_by_chain ON annotations (tree, leaf, annotator)",
    )

    def damaged_items(self) -> dict[int, str]:
        """The versions of damaged annotations, as keys."""
        rows = self._db.execute("SELECT checksum, * FROM annotations")
        return {row[0]: "" for kept, *row, _ in rows if kept is not None and kept != checksum(*row)}

    def _write_checksums(self, keys: Iterable[Any] | None = None) -> None:
        rows = self._db.execute("SELECT * FROM annotations WHERE checksum IS NULL").fetchall()
        query = "UPDATE annotations SET checksum = ? WHERE version = ?"
        self._db.executemany(query, [(checksum(*row[:-1]), row[0]) for row in rows])

    def save(self, new: Annotation, seen: int | None) -> int:
        """Add an annotation; returns its version.

        Args:
            seen: the version of the annotator's previous annotation of this chain that the page showed, or None.

        Raises:
            ConflictError: a newer one exists; nothing is saved.
        """
        with self._transaction():
            about = (new.tree, new.leaf, new.annotator)
            last = self._last("tree = ? AND leaf = ? AND annotator = ?", about)
            if (last[0].version if last else None) != seen:
                raise ConflictError(last[0] if last else None)
            (version,) = self._db.execute("SELECT coalesce(max(version), 0) + 1 FROM annotations").fetchone()
            row = (version, *astuple(new)[1:])
            self._db.execute("INSERT INTO annotations VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", (*row, checksum(*row)))
        return int(version)

    def all(self, *, node: str | None = None, tree: str | None = None) -> list[Annotation]:
        """The latest annotation per chain and annotator (of a node or a tree), in order of saving."""
        with self._guard():
            return self._last("node = coalesce(?, node) AND tree = coalesce(?, tree)", (node, tree))

    def _last(self, where: str, values: Sequence[Any]) -> list[Annotation]:
        query = f"""SELECT * FROM annotations WHERE version IN (SELECT max(version) FROM annotations WHERE {where}
            GROUP BY tree, leaf, annotator) AND verdict IS NOT NULL ORDER BY version"""  # noqa: S608
        names = [each.name for each in fields(Annotation)]
        return [Annotation(**dict(zip(names, row, strict=False))) for row in self._db.execute(query, values)]

    def counts(self, node: str) -> dict[str, int]:
        """{tree id: number of annotated chains} for the annotated trees of a node."""
        chains = {(each.tree, each.leaf) for each in self.all(node=node)}
        return dict(Counter(tree for tree, _ in chains))

    def saves(self) -> int:
        """The total number of saves."""
        with self._guard():
            return int(self._db.execute("SELECT count(*) FROM annotations").fetchone()[0])


def read_annotations(run: Path) -> Annotations | None:
    """Open a run's annotations for reading (a context manager); None if there are none."""
    return Annotations(run / FILE, reading=True) if (run / FILE).is_file() else None


def chain_annotations(run: Path, configs: Collection[str]) -> dict[Key, ChainAnnotation]:
    """Read the combined annotations of all chains in trees of these configs."""
    if (opened := read_annotations(run)) is None:
        return {}
    by_chain: defaultdict[Key, list[Annotation]] = defaultdict(list)
    with opened:
        for each in opened.all():
            if each.config in configs:
                by_chain[each.tree, each.leaf].append(each)
    return {key: _together(found) for key, found in by_chain.items()}


def _together(found: Sequence[Annotation]) -> ChainAnnotation:
    newest = found[-1].chain  # ignore annotations of earlier texts
    found = [each for each in found if each.chain == newest]
    said = {each.verdict for each in found}
    fixes = [each.text for each in found if each.verdict == "fix"]
    return ChainAnnotation("accept" in said, "reject" in said, "".join(fixes[-1:]), newest)


def chain_hash(chain: Iterable[StoredNode]) -> str:
    """A hash of a chain's text."""
    return hashlib.sha256(chain_text(chain).encode("utf-8", "replace")).hexdigest()[:16]


def annotate(tree: StoredTree, leaf: int, node: str, **said: Any) -> Annotation:
    """Create an annotation of the chain that ends at a leaf of a tree.

    Raises:
        UsageError: not a judged leaf, or an invalid field.
    """
    if not 0 < leaf < len(tree.nodes) or tree.nodes[leaf].verdict is None:
        raise NotFoundError(f"no chain of tree {tree.tree_id} ends in thought {leaf}")
    chain = chain_hash(tree.chain(leaf))
    return Annotation(node=node, config=tree.config, tree=tree.tree_id, leaf=leaf, chain=chain, **said)


def agreement(annotations: Iterable[Annotation]) -> dict[str, Any]:
    """Inter-annotator agreement.

    Returns:
        pairs: of annotations of the same chain. equal: pairs that agree. kappa: Cohen's; over several pairs of
        annotators, expected agreement is their mean weighted by chains; None without pairs, or if expected agreement
        is 1.
    """
    said: defaultdict[str, dict[Key, str]] = defaultdict(dict)
    for each in annotations:
        said[each.annotator][each.tree, each.leaf] = str(each.verdict)
    pairs = equal = 0
    expected = 0.0
    for first, second in combinations(said.values(), 2):
        both = first.keys() & second.keys()
        pairs, equal = pairs + len(both), equal + sum(first[key] == second[key] for key in both)
        shares = [Counter(answers[key] for key in both) for answers in (first, second)]
        expected += sum(shares[0][verdict] * shares[1][verdict] for verdict in shares[0]) / max(len(both), 1)
    kappa = (equal - expected) / (pairs - expected) if pairs > expected else None
    return {"pairs": pairs, "equal": equal, "kappa": kappa}


def annotation_rows(run: RunFolder) -> list[Row]:
    """All annotations of a run as rows with question and chain text (no text if the tree has changed since).

    Raises:
        UsageError: there are no annotations.
    """
    if (opened := read_annotations(run.path)) is None:
        raise UsageError(f"{run.path} has no annotations; make some with `cotree view {run.path}`")
    rows = []
    with opened:
        found = opened.all()
    for node in dict.fromkeys(each.node for each in found):
        with TreeStores(stores_of(run, node)) as stores:
            there = stores.finished()
            for each in (each for each in found if each.node == node):
                tree = stores.tree(each.tree) if each.tree in there else None
                chain = tree.chain(each.leaf) if tree is not None and each.leaf < len(tree.nodes) else []
                row = {name: getattr(each, name) for name in ("node", "tree", "leaf", "annotator", "verdict", "note")}
                row |= {"text": each.text or None, "time": each.time}
                if tree is not None and chain_hash(chain) == each.chain:
                    row |= {"task": tree.task, "question_id": tree.question_id, "prompt": tree.messages}
                    row |= {"completion": chain_text(chain), "judged": chain[-1].verdict, "gold": tree.gold}
                rows.append(row)
    return rows
