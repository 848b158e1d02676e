"""A benchmark: a task whose questions are published rows, not generated ones.

Invariant: ids and order are the source's own, and rows for training never come from the rows that evaluate. Whether a
training row belongs to `dev` depends on its id alone.
"""

from __future__ import annotations

from abc import abstractmethod

from cotree.base.errors import UsageError
from cotree.base.rows import Row
from cotree.tasks.base import Question, Split, Task, hash_digit
from cotree.tasks.loading import Source, load_rows


class Benchmark(Task):
    """The rows of `source` (split `test`), and of `training` if there is one: nine tenths `train`, one tenth `dev`.

    A task that has rows for training only sets `source` to the same object as `training`. id_field: the field of a
    row's id, which rows that lack it get from `Source.id_prefix` and their number.
    """

    source: Source
    training: Source | None = None
    generated = False
    id_field = "id"

    @abstractmethod
    def question(self, row: Row) -> Question:
        """The question of a row of the hub or of a local file."""

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
        questions = self._read_questions(source)
        if split in ("train", "dev"):
            questions = [question for question in questions if (hash_digit(question.id) == 0) == (split == "dev")]
        return self._first(questions, split, limit)

    def _read_questions(self, source: Source) -> list[Question]:
        """Every row as a question; UsageError with the number of the first row that is not one of this task."""
        questions = []
        for index, row in enumerate(self._rows(source)):
            own_id = {} if row.get(self.id_field) is not None else {self.id_field: f"{source.id_prefix}{index}"}
            try:
                questions.append(self.question(row | own_id))
            except Exception as error:  # noqa: BLE001 - the row may hold anything
                reason = error if isinstance(error, UsageError) else f"not a row of {source.hub} ({error!r})"
                raise UsageError(f"{self.name}, row {index + 1}: {reason}") from None
        return questions

    def _rows(self, source: Source) -> list[Row]:
        return load_rows(source, self.data)
