"""The scores of an evaluation as stored in node.json, results_*.json and summary.json.

Shares are fractions in [0, 1]; None if undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Estimate = Sequence[float]  # (mean over questions, low, high) with a 95% interval


class StrictModel(BaseModel):
    """Immutable, with strict types ("0.5" is no number); undeclared keys are kept."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class FamilyScores(StrictModel):
    """Scores of one family of a task's questions. optimal: for plans, the share of shortest ones among the correct."""

    n: int
    accuracy: float
    no_answer: float
    optimal: float | None = None


class TaskScores(StrictModel):
    """Scores of one model on one task, or on one later turn of its conversations: a row of the table.

    task: `EvalSample.task_turn`. n, samples: questions, and samples per question.
    temperature, top_p, decoding, max_tokens: as in `EvalSample`.
    undecided: samples that could not be judged; their questions are excluded from all other numbers.
    accuracy: share of correct samples (avg@n), with 95% interval `low` to `high`; `lenient`: with lenient extraction;
        `accuracy_answered`: of the samples with an answer.
    no_answer: `loop` (the text repeats itself) plus `truncated` (no loop, cut off by max_tokens) plus
        `finished_without_answer`.
    over_reflection, instruction_failure: shares of samples with the paper's two other kinds of formalistic thinking, by
        the rules of `cotree diagnose`.
    commonest: the most frequent answer and its share of answered samples; near 1, the model has learnt a constant.
    test_at: the paper's Test@k (pass@k) for k up to `samples`, sampled answers only; for trees, k up to the chains of
        the largest one, if there are enough trees.
    majority: accuracy of the majority vote; None if answers cannot vote.
    mean_tokens, tokens_p50, ...: mean and percentiles of generated tokens.
    seconds_p50, seconds_p95: wall time of a reply, with others in flight.
    detectable: minimum detectable difference between two such rows.
    """

    task: str
    n: int = Field(ge=1)
    samples: int = 1
    undecided: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    decoding: str = ""
    max_tokens: int
    accuracy: Fraction
    low: Fraction
    high: Fraction
    lenient: float | None = None
    no_answer: Fraction
    loop: float | None = None
    truncated: float | None = None
    finished_without_answer: float | None = None
    over_reflection: float | None = None
    instruction_failure: float | None = None
    accuracy_answered: float | None = None
    commonest: str | None = None
    commonest_share: float | None = None
    test_at: dict[str, Estimate] = {}
    majority: Estimate | None = None
    mean_tokens: float
    tokens_p50: int | None = None
    tokens_p90: int | None = None
    tokens_p99: int | None = None
    seconds_p50: float | None = None
    seconds_p95: float | None = None
    detectable: float | None = None
    families: dict[str, FamilyScores] = {}


class InstructionScores(StrictModel):
    """Shares of prompts and of single instructions that a model followed, in one language group of a task.

    turn: from 1; None for the mean of the group's turns. average: of the four shares, as in Multi-IF.
    """

    group: str
    turn: int | None = None
    prompts: int = 0
    prompt_strict: float
    instruction_strict: float
    prompt_loose: float
    instruction_loose: float
    average: float
    task: str
    no_answer: float


class ConstantBaseline(StrictModel):
    """The best constant answer to a task's questions and its accuracy: the score of ignoring the question."""

    task: str
    answer: str
    accuracy: Fraction


class TokensUsed(StrictModel):
    """Prompt and generated tokens of all samples of an evaluation."""

    prompt: int
    completion: int


class ModelScores(StrictModel):
    """All scores of one model.

    repeats: retries in the last run. folder: of the results files; not stored in them.
    """

    model: str
    rows: list[TaskScores]
    instructions: list[InstructionScores]
    baselines: list[ConstantBaseline]
    tokens: TokensUsed
    repeats: int = 0
    folder: Path = Field(exclude=True)
