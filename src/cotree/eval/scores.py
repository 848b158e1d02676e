"""What an evaluation found: the scores of one model, as they stand in node.json, results_*.json and summary.json.

Shares are fractions in [0, 1]; None where nothing defines a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Estimate = Sequence[float]  # a mean over questions, and the two ends of its 95% interval


class StrictModel(BaseModel):
    """Immutable, with strict types ("0.5" is no number); keys that it does not declare are kept as they are."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class FamilyScores(StrictModel):
    """The questions of one family of a task. optimal: the share of shortest plans among the correct ones, of plans."""

    n: int
    accuracy: float
    no_answer: float
    optimal: float | None = None


class TaskScores(StrictModel):
    """One model on the questions of one task, or of one later turn of its conversations: a row of the table.

    task: `EvalSample.task_turn`. n, samples: questions, and samples of each.
    temperature, top_p, decoding, max_tokens: as in `EvalSample`.
    undecided: samples that could not be judged; their questions are in no other number of the row.
    accuracy: the share of correct samples (avg@n), with its 95% interval `low` to `high`; `lenient` is that under
        lenient extraction, `accuracy_answered` that of the samples with an answer.
    no_answer: `loop` (the text repeats itself) plus `truncated` (no loop, cut off by max_tokens) plus
        `finished_without_answer`.
    over_reflection, instruction_failure: shares of samples that show the paper's two other kinds of formalistic
        thinking, by the rules of `cotree diagnose`.
    commonest: the answer given most often, with its share of the samples with an answer: near 1, a model has learnt a
        constant.
    test_at: the paper's Test@k for each k up to `samples`, of sampled answers only; of trees for each k up to the
        chains of the largest one, if there are enough trees.
    majority: how often the answer that most samples give is right; None where answers do not vote.
    mean_tokens, tokens_p50, ...: mean and percentiles of generated tokens.
    seconds_p50, seconds_p95: of the wall time of a reply, while others were asked at the same time.
    detectable: the least difference that two such rows can show.
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
    """Shares of prompts and of single instructions that one model followed, in one language group of a task.

    turn: from 1; None for the mean of the group's turns. average: of the four shares, as Multi-IF reports it.
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
    """The best constant answer to a task's questions and its accuracy: what a model gets that ignores the question."""

    task: str
    answer: str
    accuracy: Fraction


class TokensUsed(StrictModel):
    """Tokens of all samples of an evaluation: read as prompts, and generated."""

    prompt: int
    completion: int


class ModelScores(StrictModel):
    """One model's scores.

    repeats: requests that were sent again after a failure, when last asked. folder: where their files are; it is in
        none of them.
    """

    model: str
    rows: list[TaskScores]
    instructions: list[InstructionScores]
    baselines: list[ConstantBaseline]
    tokens: TokensUsed
    repeats: int = 0
    folder: Path = Field(exclude=True)
