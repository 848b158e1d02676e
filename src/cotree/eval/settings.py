"""The `evaluations` section of a recipe: models, questions, sampling and decoding settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cotree.base.settings import Section
from cotree.models.settings import GGUFType
from cotree.tasks.base import Split

StrategyName = Literal["mcts", "vote", "best_of_n", "beam"]
ValueName = Literal["vote", "likelihood"]
# Sampling settings, recorded in each sample.
SAMPLING = ("max_tokens", "temperature", "top_p")


class AskSettings(Section):
    """Prompt, sampling and decoding settings, equal for all models of an evaluation.

    max_tokens: of a reply. samples: completions per question; more than one need a temperature.
    examples: put the search's worked examples before the question; always on with a strategy.
    strategy: decode by search (docs/decoding.md), with about `budget_tokens` generated tokens per sample; `value` ranks
        answers (default: votes if answers can vote, else likelihood).
    gguf: quantization type of weights; None serves a `.gguf` file as it is.
    """

    max_tokens: int = Field(1024, ge=1)
    samples: int = Field(1, ge=1)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    examples: bool = False
    strategy: StrategyName | None = None
    value: ValueName | None = None
    budget_tokens: int | None = Field(None, ge=1)
    gguf: GGUFType | None = "Q8_0"

    @model_validator(mode="after")
    def _consistent(self) -> AskSettings:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("greedy samples are all alike: several samples need a temperature, e.g. temperature 0.8")
        if self.strategy is None and (self.value is not None or self.budget_tokens is not None):
            raise ValueError("`value` and `budget_tokens` go with a `strategy`")
        if self.strategy is not None and self.temperature == 0:
            raise ValueError("a `strategy` needs a temperature to draw with, e.g. temperature 0.8")
        return self

    def sampling(self) -> dict[str, Any]:
        """The sampling settings, recorded in each sample."""
        return {name: getattr(self, name) for name in SAMPLING}


class Evaluation(AskSettings):
    """An `evaluations` node: one cell for each of `models` (models and students).

    questions: {task: count}, the first of `split`; use `split: dev` for tuning.
    tokens_of: another evaluation, whose tokens for the same model and question replace `budget_tokens`.
    gguf: quantization type of weights, the same for all models.
    """

    models: tuple[str, ...] = Field(min_length=1)
    questions: dict[str, Annotated[int, Field(ge=1)]] = Field(min_length=1)
    split: Split = "test"
    tokens_of: str | None = None
    gguf: GGUFType = "Q8_0"

    @model_validator(mode="after")
    def _budget(self) -> Evaluation:
        if self.tokens_of is not None and (self.strategy is None or self.budget_tokens is not None):
            raise ValueError("`tokens_of` is the budget of a `strategy`, in place of budget_tokens")
        if self.strategy is not None and self.tokens_of is None and self.budget_tokens is None:
            raise ValueError("a `strategy` needs `budget_tokens`, or `tokens_of` another evaluation")
        return self
