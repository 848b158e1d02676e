"""A benchmark: a task whose questions are published rows, not generated ones.

Invariant: ids are the source's own, the order is the origin's, and rows for training never come from the rows that
evaluate. Which training rows are `dev` depends on a row's id alone.
"""

from __future__ import annotations

from abc import abstractmethod

from cotree.base.errors import UsageError
from cotree.tasks.base import Question, Split, Task, tenth
from cotree.tasks.loading import Row, Source, load_rows


class Benchmark(Task):
    """Rows of `source` (split `test`), and of `training` where there is one: nine tenths `train`, a tenth `dev`.

    A task that has rows for training only sets `source` to the same object as `training`.
    """

    source: Source
    training: Source | None = None
    generated = False

    @abstractmethod
    def question(self, row: Row) -> Question:
        """A row as a question."""

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """The first `limit` questions (all by default). Without a split: all rows of `source`.

        Raises:
            UsageError: the benchmark has no such split or fewer questions, or its data cannot be found.
        """
        source = self.source if split in (None, "test") else self.training
        if source is None:
            raise UsageError(f"{self.name} has a test set only, no `{split}` split; train on another task")
        if split == "test" and source is self.training:
            raise UsageError(f"{self.name} is for training and has no `test` split; evaluate on another task")
        questions = self._asked(source)
        if split in ("train", "dev"):
            questions = [question for question in questions if (tenth(question.id) == 0) == (split == "dev")]
        return self._first(questions, split, limit)

    def _asked(self, source: Source) -> list[Question]:
        questions = []
        for index, row in enumerate(self._rows(source)):
            try:
                known = row if row.get("id") is not None else row | {"id": f"{source.ids}{index}"}
                questions.append(self.question(known))
            except Exception as error:  # noqa: BLE001 - the row may hold anything
                said = error if isinstance(error, UsageError) else f"not a row of {source.hub} ({error!r})"
                raise UsageError(f"{self.name}, row {index + 1}: {said}") from None
        return questions

    def _rows(self, source: Source) -> list[Row]:
        return load_rows(source, self.data)
