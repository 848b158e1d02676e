"""The shards of a run: its questions split into N parts, each with its own folder and store.

    runs/NAME/shards/K-of-N/{journal.db, trees/NODE/{node.json, trees.db}, evaluations/NODE/MODEL/{node.json, ...}}

K is the rank of a shard, from 0 to N-1. A hash of the question's name gives its shard, independent of other questions.
Nodes that need all questions (datasets, students) are in the run's own folder, never in a shard's.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from cotree.base.errors import UsageError
from cotree.base.run_folder import Kind, NodeFolder, NodeRecord, RunFolder

SHARDED: tuple[Kind, ...] = ("trees", "evaluations")  # kinds of nodes stored by question


@dataclass(frozen=True, order=True)
class Shard:
    """One of `world_size` parts of a run's questions. rank: from 0."""

    world_size: int
    rank: int

    def __post_init__(self) -> None:
        """Raises UsageError if the rank is out of range."""
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            last = f"0/{self.world_size} to {self.world_size - 1}/{self.world_size}" if self.world_size > 0 else "0/1"
            raise UsageError(f"there is no shard {self}; give one of {last}")

    def __str__(self) -> str:
        return f"{self.rank}/{self.world_size}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse "3/8".

        Raises:
            UsageError: not a shard.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise UsageError(f"`{text}` is no shard; write K/N, e.g. --shard 0/8 for the first of eight")
        return cls(int(found[2]), int(found[1]))


def rank_of(task: str, question_id: str, world_size: int) -> int:
    """The rank of a question's shard."""
    digest = hashlib.sha256(f"{task}/{question_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % world_size


class ShardFolder(RunFolder):
    """`runs/NAME/shards/K-of-N/`: trees and evaluations of the shard's questions; other nodes are in the run folder."""

    def __init__(self, run: RunFolder, shard: Shard) -> None:
        super().__init__(run.path / "shards" / f"{shard.rank}-of-{shard.world_size}")
        self.whole, self.shard = run, shard

    def node(self, node: str, model: str | None = None) -> NodeFolder:
        """The folder of a node, or of one model's cell of an evaluation."""
        if node.partition("/")[0] not in SHARDED:
            return self.whole.node(node, model)
        return super().node(node, model)


def shards_of(run: RunFolder) -> list[ShardFolder]:
    """The existing shard folders of a run, ordered by N and rank."""
    names = [re.fullmatch(r"(\d+)-of-(\d+)", path.name) for path in (run.path / "shards").glob("*-of-*")]
    found = [Shard(int(name[2]), int(name[1])) for name in names if name and int(name[1]) < int(name[2])]
    return [ShardFolder(run, shard) for shard in sorted(found)]


def parts_beside(folder: RunFolder) -> list[RunFolder]:
    """The other folders of a run that may have content of the same questions: for the run all shards; for a shard the
    run, and shards with another N."""
    if not isinstance(folder, ShardFolder):
        return [*shards_of(folder)]
    same = folder.shard.world_size
    return [folder.whole, *(part for part in shards_of(folder.whole) if part.shard.world_size != same)]


def files_in_parts(run: RunFolder, node: str, name: str) -> list[Path]:
    """The existing files of a node with this name in a run and its shards, the run's own first."""
    paths = [part.node(node).path / name for part in (run, *shards_of(run))]
    return [path for path in paths if path.is_file()]


def stores_of(run: RunFolder, name: str) -> list[Path]:
    """Where the trees of a trees node are: its stores in a run and its shards, the run's own first, and the Parquet
    files that its recipe named, whether or not these are still there."""
    node = f"trees/{name}"
    return [*files_in_parts(run, node, "trees.db"), *parquet_of(run.node(node).record())]


def parquet_of(record: NodeRecord | None) -> list[Path]:
    """The Parquet files that hold trees of a trees node."""
    return [] if record is None else [Path(name) for name in record.files if name.endswith(".parquet")]
