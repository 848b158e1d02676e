"""Load a user's own task: a YAML file with rows, fields, prompt, extractor and verifier, or a class in a Python file.

Invariant: a loaded task is complete; an invalid file gives one error line with the file and the key. Examples are in
`docs/tasks.md`.
"""

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cotree.base.errors import UsageError
from cotree.base.rows import Row
from cotree.tasks.base import Question, Split, Task, Verdict, WorkedExample, split_of, user_prompt, without_question
from cotree.tasks.benchmark import Benchmark, fill_prompt, worked_example
from cotree.tasks.loading import Source, field_value
from cotree.tasks.math_text import same_number
from cotree.tasks.math_verdicts import check_math_answer, gold_problem

# verifier(gold, answer) -> (whether it is correct (None: undecided), detail)
VERIFIERS: dict[str, Callable[[str, str], tuple[bool | None, str]]] = {
    "math": check_math_answer,
    "number": lambda gold, answer: (same_number(answer, gold), ""),
    "text": lambda gold, answer: (answer.casefold().split() == gold.casefold().split(), ""),
}


class TaskFile(BaseModel):
    """The content of a task's YAML file; unknown keys are errors.

    data: a file beside it, a folder or a hub id. fields: the rows' field names of the id, the question, the gold answer
    and other fields in the prompt. prompt: a template with `{name}` for a field. extractor: `answer` as in the shipped
    tasks, or `text` for the whole reply after thinking and the answer tag. examples: solved questions for the search
    prompt: `question` and other fields of the prompt, `sub_task`, `thinking`, `double_check`, `answer`, and a
    `solution` in paragraphs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    data: str
    fields: dict[str, str] = {"id": "id", "question": "question", "gold": "answer"}
    prompt: Annotated[str, Field(pattern=r"\{question\}")]
    prompt_version: str = "1"
    extractor: Literal["answer", "text"] = "answer"
    verifier: Literal["math", "number", "text"] = "math"
    examples: tuple[dict[str, str], ...] = ()


class YamlTask(Benchmark):
    """The task of a YAML file. Splits: 70% train, 10% dev, 20% test, by the hash of each row's id."""

    def __init__(self, path: Path, data: str | Path | None = None) -> None:
        """data: overrides the file's `data`; as in `loading.load_rows`."""
        self.file = _read_task_file(path)
        self.name, self.description = self.file.name, self.file.description
        self.prompt_version = f"{self.name}/{self.file.prompt_version}"
        self.verifier_version = f"{self.file.extractor}/{self.file.verifier}"
        self.comparable = self.file.extractor != "text"
        self.answer_form = "boxed" if self.comparable else "text"
        self.id_field = self.file.fields["id"]
        beside = path.parent / self.file.data
        place = str(beside) if beside.exists() else self.file.data
        self.source = Source(Path(self.file.data).name, place, "its own", 0)
        super().__init__(place if data is None else data)

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """The rows as questions, in order; UsageError if a row lacks a field or there are fewer than `limit`."""
        questions = [q for q in self._read_questions(self.source) if split in (None, split_of(q.id))]
        return self._first(questions, split, limit)

    def question(self, row: Row) -> Question:
        """Convert a row to a question, with the file's field names."""
        fields = {name: str(field_value(row, column)) for name, column in self.file.fields.items()}
        prompt = user_prompt(fill_prompt(self.file.prompt, fields))
        return Question(fields["id"], self.name, prompt, fields["gold"].strip())

    def verify(self, answer: str, question: Question) -> Verdict:
        """Verify with the file's verifier."""
        correct, detail = VERIFIERS[self.file.verifier](question.gold, answer)
        return Verdict.of(correct, answer, detail)

    def _gold_problem(self, question: Question) -> str:
        return gold_problem(question.gold) if self.file.verifier == "math" else ""

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """The file's examples, formatted by its prompt."""
        examples = (worked_example({"double_check": "", **fields}, self.file.prompt) for fields in self.file.examples)
        return without_question(examples, question)


def load_own_task(name: str, data: str | Path | None) -> Task:
    """Load the task `task.yaml` or `file.py:Class`. data: overrides the file's `data`.

    Raises:
        UsageError: the file is missing or has no such task.
    """
    if name.endswith((".yaml", ".yml")):
        return YamlTask(Path(name), data)
    path, _, class_name = name.rpartition(":")
    try:
        found = runpy.run_path(path, run_name=f"cotree_own.{Path(path).stem}").get(class_name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's file may raise anything
        raise UsageError(f"cannot load {path}: {type(error).__name__}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UsageError(f"{path} has no subclass of cotree.Task called `{class_name}`")
    own = found(data)
    own.verifier_version = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return own


def _read_task_file(path: Path) -> TaskFile:
    """Read and validate a task's YAML file; UsageError with the file and the key."""
    try:
        file = TaskFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    missing = {"id", "question", "gold"} - file.fields.keys()
    if missing:
        raise UsageError(f"{path}: `fields` says nothing about {', '.join(sorted(missing))}; name the column")
    shown = {name for name in file.fields if f"{{{name}}}" in file.prompt}
    wanted = shown | {"sub_task", "thinking", "answer"}
    for number, example in enumerate(file.examples):
        if example.keys() - {"double_check", "solution"} != wanted:
            keys = f"{', '.join(sorted(wanted))}, and double_check and solution if you like"
            raise UsageError(f"{path}: `examples.{number}`: its keys must be {keys}")
    return file
