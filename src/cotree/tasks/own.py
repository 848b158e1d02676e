"""A user's own task: a YAML file that names rows, fields, prompt, extractor and verifier, or a class in a Python file.

Invariant: a task that loads is complete; a fault in the file is one line that names the file and the key.
`docs/tasks.md` has an example of each.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cotree.base.errors import UsageError
from cotree.tasks.base import Question, Split, Task, Verdict, WorkedExample, split_of
from cotree.tasks.benchmark import Benchmark
from cotree.tasks.loading import Row, Source, value
from cotree.tasks.math_verdicts import compare
from cotree.tasks.numbers import same_number

# Each takes (answer, gold) and says whether the answer is right, and what else there is to say.
VERIFIERS: dict[str, Callable[[str, str], tuple[bool, str]]] = {
    "math": lambda answer, gold: compare(gold, answer),
    "number": lambda answer, gold: (same_number(answer, gold), ""),
    "text": lambda answer, gold: (answer.casefold().split() == gold.casefold().split(), ""),
}


class Section(BaseModel):
    """A part of the file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Example(Section):
    """A solved question for the search prompt, with whatever other fields the prompt shows."""

    model_config = ConfigDict(extra="allow", frozen=True)
    question: str
    sub_task: str
    thinking: str
    double_check: str = ""
    answer: str


class OwnTask(Section):
    """The file. `data` is a file beside it, a folder or a hub id.

    fields: what the rows call the id, the question, the gold answer and whatever else the prompt uses. prompt: each
    `{name}` in it stands for a field. extractor: `answer` as for the shipped tasks, or `text` for all of the reply
    after its thinking and the answer tag.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    data: str
    fields: dict[str, str] = {"id": "id", "question": "question", "gold": "answer"}
    prompt: str
    prompt_version: str = "1"
    extractor: Literal["answer", "text"] = "answer"
    verifier: Literal["math", "number", "text"] = "math"
    examples: tuple[Example, ...] = ()


class FileTask(Benchmark):
    """The task of a YAML file. Its splits are 70, 10 and 20 of a hundred rows, fixed by each row's id."""

    def __init__(self, path: Path, data: str | Path | None = None) -> None:
        self.own = _load(path)
        self.name, self.description = self.own.name, self.own.description
        self.answer_form = "text" if self.own.extractor == "text" else "boxed"
        self.comparable = self.own.extractor != "text"
        self.prompt_version = f"{self.name}/{self.own.prompt_version}"
        beside = path.parent / self.own.data
        given = str(beside) if beside.exists() else self.own.data
        self.source = Source(Path(self.own.data).name, given, "its own", 0)
        super().__init__(given if data is None else data)

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """The rows in their order; UsageError when a row lacks a field or there are fewer than `limit`."""
        questions = [q for q in self._asked(self.source) if split in (None, split_of(q.id))]
        return self._first(questions, split, limit)

    def _rows(self, source: Source) -> list[Row]:
        # Rows without ids are called by their place.
        column, rows = self.own.fields["id"], super()._rows(source)
        return [row if row.get(column) is not None else row | {column: str(at)} for at, row in enumerate(rows)]

    def question(self, row: Row) -> Question:
        """A row with the file's fields."""
        known = {name: str(value(row, column)) for name, column in self.own.fields.items()}
        message = {"role": "user", "content": _filled(self.own.prompt, known)}
        return Question(known["id"], self.name, (message,), known["gold"].strip())

    def verify(self, answer: str, question: Question) -> Verdict:
        """By the file's verifier."""
        correct, detail = VERIFIERS[self.own.verifier](answer, question.gold)
        return Verdict("correct" if correct else "wrong", float(correct), answer, detail)

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """The file's examples, in the prompt's words; the question itself is left out."""
        steps = {"sub_task", "thinking", "double_check"}
        shown = [
            WorkedExample(_filled(self.own.prompt, e.model_dump()), e.model_dump(include=steps), e.answer)
            for e in self.own.examples
        ]
        return [example for example in shown if example.question != question.messages[-1]["content"]]


def own_task(name: str, data: str | Path | None) -> Task:
    """The task that `task.yaml` or `file.py:Class` names.

    Raises:
        UsageError: the file is not there or does not hold a task.
    """
    if name.endswith((".yaml", ".yml")):
        return FileTask(Path(name), data)
    path, _, kind = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"cotree_own.{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's file may raise anything
        raise UsageError(f"cannot load {path}: {type(error).__name__}: {error}") from None
    found = getattr(module, kind, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UsageError(f"{path} has no subclass of cotree.Task called `{kind}`")
    return found(data)


def _load(path: Path) -> OwnTask:
    try:
        own = OwnTask.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    missing = {"id", "question", "gold"} - own.fields.keys()
    if missing:
        raise UsageError(f"{path}: `fields` says nothing about {', '.join(sorted(missing))}; name the column")
    if "{question}" not in own.prompt:
        raise UsageError(f"{path}: `prompt` has no {{question}}; put it where the question goes")
    shown = {name for name in own.fields.keys() - Example.model_fields.keys() if f"{{{name}}}" in own.prompt}
    for number, example in enumerate(own.examples):
        if set(example.model_extra or ()) != shown:
            extra = ", ".join(sorted(shown)) or "none"
            raise UsageError(f"{path}: `examples.{number}`: its fields beside the steps must be the prompt's: {extra}")
    return own


def _filled(prompt: str, known: Mapping[str, object]) -> str:
    r"""The prompt with its fields; other braces, as in `\boxed{}`, stay."""
    return re.sub(r"\{(\w+)\}", lambda match: str(known.get(match[1], match[0])), prompt)
