"""Base class of benchmarks: tasks whose questions are published rows.

Invariant: ids and order are the source's own, and training rows are disjoint from evaluation rows. A training row's
split (`train` or `dev`) depends on its id only.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from functools import cache

from cotree.base.errors import UsageError
from cotree.base.rows import Row
from cotree.tasks.base import Question, Split, Task, WorkedExample, hash_digit
from cotree.tasks.loading import Source, load_rows, packaged_yaml


class Benchmark(Task):
    """The rows of `source` (split `test`), and of `training` if there is one: nine tenths `train`, one tenth `dev`.

    A task with training rows only sets `source` to the same object as `training`. id_field: the field with a row's id;
    rows without it get `Source.id_prefix` and their number.
    """

    source: Source
    training: Source | None = None
    generated = False
    id_field = "id"

    @abstractmethod
    def question(self, row: Row) -> Question | None:
        """Convert a row of the hub or of a local file to a question; None for a row of another task."""

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
        """Convert all rows to questions; UsageError with the number of the first invalid row."""
        questions = []
        for index, row in enumerate(load_rows(source, self.data)):
            own_id = {} if row.get(self.id_field) is not None else {self.id_field: f"{source.id_prefix}{index}"}
            try:
                questions.append(self.question(row | own_id))
            except Exception as error:  # noqa: BLE001 - the row may hold anything
                reason = error if isinstance(error, UsageError) else f"not a row of {source.hub} ({error!r})"
                raise UsageError(f"{self.name}, row {index + 1}: {reason}") from None
        return [question for question in questions if question is not None]


@cache  # used twice per tree
def shipped_examples(section: str, prompt: str = "{question}") -> tuple[WorkedExample, ...]:
    """The worked examples of a section of `worked_examples.yaml`, with questions formatted by `prompt`."""
    return tuple(worked_example(fields, prompt) for fields in packaged_yaml("worked_examples.yaml")[section])


def worked_example(fields: Mapping[str, str], prompt: str) -> WorkedExample:
    """A worked example from its fields: `question`, whatever else the prompt shows, steps by thought type, `answer`."""
    steps = {step: fields[step] for step in ("sub_task", "thinking", "double_check", "solution") if step in fields}
    return WorkedExample(fill_prompt(prompt, fields), steps, fields["answer"])


def fill_prompt(prompt: str, fields: Mapping[str, object]) -> str:
    r"""Replace each `{name}` of a field in a prompt by its value; other braces, as in `\boxed{}`, stay."""
    return re.sub(r"\{(\w+)\}", lambda match: str(fields.get(match[1], match[0])), prompt)
