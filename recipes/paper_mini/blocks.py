"""Blocksworld with three blocks: the problems of the task `blocksworld` on which a small model's plans may succeed."""

from __future__ import annotations

from cotree.tasks.base import Question, Split
from cotree.tasks.blocksworld import Blocksworld


class ThreeBlocks(Blocksworld):
    """`blocks3`: the three-block problems of `blocksworld`, with its prompt and verifier."""

    name = "blocks3"
    description = "Blocksworld with three blocks"

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """The first `limit` of them (all by default)."""
        return self._first([each for each in super().questions(split) if each.family == "3 blocks"], split, limit)
