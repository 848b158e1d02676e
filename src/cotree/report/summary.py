"""What the report reads from a run folder, checked.

Invariant: files hold fractions in [0, 1] and raw counts; the rows about which something is claimed are checked, and a
wrong value is an error that names file and key; what is absent stays absent (None) and is shown as such, never as 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cotree.base.errors import UsageError
from cotree.eval.journal import read_lines
from cotree.experiment.run_folder import read_json

# From this share of one answer on, a row is called constant.
CONSTANT = 0.9
# `step`, and whatever was logged of it (`train.trainer`).
LogLine = dict[str, Any]
MODELS = ("base", "base+examples", "control", "sft", "dpo")


class Part(BaseModel):
    """A part of a run's files. Types are strict ("0.5" is no number); unknown keys belong to others and are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


class EvalRow(Part):
    """One model on one task: `accuracy` with its interval and the no-answer ratio, as fractions of all n samples."""

    model: str
    task: str
    n: int = Field(ge=1)
    accuracy: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    no_answer: float = Field(ge=0, le=1)
    loop: float | None = None
    truncated: float | None = None
    finished_without_answer: float | None = None
    accuracy_answered: float | None = None
    mean_tokens: float
    max_tokens: int
    commonest: str | None = None
    commonest_share: float | None = None

    @property
    def constant(self) -> str:
        """What is to be said of a row that gives nearly one answer to everything; "" otherwise."""
        if self.commonest_share is None or self.commonest_share < CONSTANT or self.n * (1 - self.no_answer) < 10:
            return ""
        share = "everything" if self.commonest_share == 1 else f"{100 * self.commonest_share:.0f}% of all"
        return f"{self.model} answers “{self.commonest}” to {share} that it answers"


class Baseline(Part):
    """The best constant answer of a task: what a model gets that ignores the question."""

    task: str
    answer: str
    accuracy: float = Field(ge=0, le=1)


class Summary(Part):
    """`summary.json`: every number that a run prints. Sections of stages that have not run are empty.

    instructions: rows of `outcome.instruction_scores`, each with its model. search: the counts of `search.summary`, and
    `compared`, rows of `search.baselines`. data: the counts of `data.build`. tokens: by stage those of its prompts
    (`prompt` evaluated, `cached` not), `completion` (generated) and `trained`.
    """

    name: str
    seed: int
    created: str
    student: str | None = None
    split: Literal["test", "dev"] | None = None
    machine: dict[str, Any] = {}
    eval: list[EvalRow] = []
    baselines: list[Baseline] = []
    instructions: list[dict[str, Any]] = []
    search: dict[str, Any] = {}
    data: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    tokens: dict[str, dict[str, int]] = {}

    @property
    def questions(self) -> str:
        """What the evaluated questions were, in words."""
        return {"test": "held-out questions", "dev": "dev questions (for tuning)", None: "questions"}[self.split]

    def tasks(self) -> list[str]:
        """The evaluated tasks, in the order of the file."""
        return list(dict.fromkeys(row.task for row in self.eval))

    def rows(self, task: str) -> list[EvalRow]:
        """A task's rows: the known models from base to final student, then any others in the order of the file."""
        order = {model: place for place, model in enumerate(MODELS)}
        return sorted((row for row in self.eval if row.task == task), key=lambda row: order.get(row.model, len(order)))

    def baseline(self, task: str) -> Baseline | None:
        """The task's constant-answer baseline, where there is one."""
        return next((baseline for baseline in self.baselines if baseline.task == task), None)


def read_summary(run: Path) -> Summary:
    """`run/summary.json`. Raises UsageError when it is missing or does not fit."""
    path = run / "summary.json"
    content = read_json(path)
    if content is None:
        raise UsageError(f"{path} does not exist: finish the run first, or name another run folder")
    try:
        return Summary.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_log(path: Path) -> list[LogLine]:
    """A trainer's `log.jsonl`, one line a step, empty when there is none.

    A resumed training repeats the steps since its last checkpoint: the later line counts.
    """
    try:
        by_step = {line["step"]: line for line in read_lines(path)}
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    except (KeyError, TypeError):
        raise UsageError(f"{path}: a line has no `step`; it is no log of a training") from None
    return [by_step[step] for step in sorted(by_step)]
