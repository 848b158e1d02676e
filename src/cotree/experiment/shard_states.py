"""Progress of a run's shards, read from their records without opening stores, so it is cheap on any file system."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cotree.base.run_folder import NodeFolder, RunFolder
from cotree.base.shards import SHARDED, Shard, ShardFolder
from cotree.experiment.fingerprints import Fingerprints


@dataclass(frozen=True)
class ShardsSeen:
    """Counts of a run's shards and questions.

    of: number of shards. done, begun: finished ones, and others with content. questions, wanted: finished questions and
    their total, counted per node and model.
    """

    of: int
    done: int
    begun: int
    questions: int
    wanted: int

    def __str__(self) -> str:
        begun = f", {self.begun} begun" if self.begun else ""
        return f"{self.done} of {self.of} shards done{begun}, {self.questions:,} of {self.wanted:,} questions"


class ShardStates:
    """Polls the shards of some nodes; skips those found finished.

    left: the ranks of shards unfinished at the last poll.
    """

    def __init__(self, run: RunFolder, fingerprints: Fingerprints, wanted: Iterable[str], world_size: int) -> None:
        """wanted: ids of nodes; only trees and evaluations count.

        Raises:
            UsageError: an input is missing.
        """
        nodes = [n for n in map(fingerprints.recipe.nodes.__getitem__, wanted) if n.kind in SHARDED]
        cells = [(n, m) for n in nodes for m in (n.settings.models if n.kind != "trees" else [None])]
        # {rank: [(folder, expected fingerprint, number of questions)]}
        self._wanted: dict[int, list[tuple[NodeFolder, str, int]]] = {}
        for rank in range(world_size):
            own = Fingerprints(fingerprints.recipe, Shard(world_size, rank), whole=fingerprints)
            folder = ShardFolder(run, Shard(world_size, rank))
            self._wanted[rank] = [
                (folder.node(node.id, model), own.of(node.id, model).of, len(own.questions(node)))
                for node, model in cells
            ]
        self._world_size, self.left = world_size, [*range(world_size)]

    def look(self) -> ShardsSeen:
        """Poll all shards that were unfinished last time."""
        total = sum(count for wanted in self._wanted.values() for *_, count in wanted)
        begun, missing = 0, 0
        for rank in [*self.left]:
            left = [(folder, count) for folder, of, count in self._wanted[rank] if not folder.complete(of)]
            if not left:
                self.left.remove(rank)
                continue
            begun += any(folder.record() is not None for folder, *_ in self._wanted[rank])
            for folder, count in left:
                record = folder.record()
                done, of = (0, 0) if record is None else record.progress
                missing += count - (count * done // of if of else 0)
        return ShardsSeen(self._world_size, self._world_size - len(self.left), begun, total - missing, total)
