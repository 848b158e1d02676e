"""How far the shards of a run are, from the records that they keep: no store is opened, so it costs little anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cotree.base.run_folder import NodeFolder, RunFolder
from cotree.base.shards import DEALT, Shard, ShardFolder
from cotree.experiment.fingerprints import Fingerprints


@dataclass(frozen=True)
class ShardsSeen:
    """How far they are.

    of: how many shards there are to be. done, begun: how many are finished, and how many others have content.
    questions, wanted: how many questions are finished, and of how many; each is counted once for each node and model.
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
    """Looks at the shards of some nodes again and again; what is done is looked at once.

    left: the ranks of those that were not done when they were last looked at.
    """

    def __init__(self, run: RunFolder, fingerprints: Fingerprints, wanted: Iterable[str], world_size: int) -> None:
        """wanted: ids of nodes; only trees and evaluations are looked at.

        Raises:
            UsageError: an input is not here.
        """
        nodes = [fingerprints.recipe.nodes[name] for name in wanted]
        cells = [(n, m) for n in nodes if n.kind in DEALT for m in (n.settings.models if n.kind != "trees" else [None])]
        # Of each rank its folders, each with the fingerprint that it is to have and how many questions that is.
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
        """Look at all that were not done the last time."""
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
