"""Decode with search from the command line or a script: which models, which settings, one question answered.

Whatever can be wrong with models, settings and question is found before a token is spent, by the checks that a recipe
gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import model_validator

from cotree.base.errors import CotreeError, UsageError, first_cotree_error
from cotree.base.progress import Output
from cotree.base.settings import apply_override, parse_section, require_known
from cotree.decode.strategies import Decoded, OpenTask, choose_value
from cotree.decode.strategies import decode as search
from cotree.models.endpoints import open_endpoints
from cotree.models.naming import is_url, model_of
from cotree.models.settings import Model
from cotree.search.completer import Completer
from cotree.search.reward import load_reward_function
from cotree.search.settings import Role, Search
from cotree.tasks import task as task_of
from cotree.tasks.base import Asked

# Without a budget.
_ROLLOUTS = 16


class Decoding(Search):
    """The search settings of a recipe's `trees` node, with the models that it asks and their roles."""

    models: dict[str, Model]
    roles: dict[str, Role]

    @model_validator(mode="after")
    def _models_known(self) -> Decoding:
        self.check_roles(self.roles)
        require_known("unknown model", self.writers, list(self.models))
        process = None if self.reward is None else self.reward.process
        for name in self.writers:
            if (self.models[name].mode == "pooling") != (name == process):
                raise ValueError("`reward.process` names a model with `mode: pooling`, and nothing else may be one")
        return self

    @property
    def writers(self) -> tuple[str, ...]:
        """The models that are asked: those of a role, and the one that gives the reward."""
        names = [writer.model for role in self.roles.values() for writer in role]
        names += [] if self.reward is None else filter(None, (self.reward.judge, self.reward.process))
        return tuple(dict.fromkeys(names))

    def used(self, *also: str) -> dict[str, Model]:
        """The models that are asked, and others."""
        return {name: self.models[name] for name in (*self.writers, *also)}


@dataclass(frozen=True, slots=True)
class Backend:
    """The models that decode, and how they are asked.

    words: of the models: URLs, packaged names, GGUF files, ... (`models.naming.model_of`); the first is the thinker.
    overrides: `a.b=c`, settings of the search (`temperature=0.6`, `reward.judge=NAME`), of its roles
        (`roles.reflector=NAME`) and of more models (`models.NAME.url=...`).
    served, tokenizer, api_key_env: of servers, as `model`, `tokenizer` and `api_key_env` of a recipe's model; without a
        tokenizer the server renders the prompts.
    budget_tokens, rollouts: what a search may spend; 16 rollouts if neither is given.
    """

    words: Sequence[str]
    overrides: Sequence[str] = ()
    served: str = "default"
    tokenizer: str | None = None
    api_key_env: str | None = None
    budget_tokens: int | None = None
    rollouts: int | None = None
    seed: int = 0

    def names(self) -> list[str]:
        """What the models are called: a server's by their name there, others by their words."""
        return [self.served if is_url(word) else word for word in self.words]

    def settings(self) -> Decoding:
        """The checked settings.

        Raises:
            UsageError: a model or a setting is wrong.
        """
        raw: dict[str, Any] = {
            "models": dict(zip(self.names(), map(self._model, self.words), strict=True)),
            "roles": {"thinker": self.names()[0]},
            "patterns": ["plain"],
            "max_thought_tokens": 256,
            "stop": {"tokens": self.budget_tokens},
        }
        if len(raw["models"]) < len(self.words):
            raise UsageError("two models have one name; serve each from a process of its own, or name them by --served")
        if self.rollouts is not None or self.budget_tokens is None:
            raw["rollouts"] = self.rollouts or _ROLLOUTS
        for override in self.overrides:
            apply_override(raw, override, "temperature=0.6")
        decoding = parse_section(Decoding, raw, "")
        if decoding.reward is not None and decoding.reward.function is not None:
            load_reward_function(decoding.reward.function)
        return decoding

    def _model(self, word: str) -> dict[str, Any]:
        """A model's settings."""
        of_server: dict[str, Any] = {}
        if is_url(word):
            chat = self.tokenizer is None
            of_server = {"tokenizer": self.tokenizer, "chat": chat, "api_key_env": self.api_key_env}
        return model_of(word, served=self.served, **of_server).model_dump(exclude_defaults=True)


def decode(
    question: str | None = None,
    model: str = "smollm2-135m-instruct",
    *,
    task: str | None = None,
    question_id: str | None = None,
    boxed: bool = False,
    strategy: str = "mcts",
    value: str | None = None,
    output: Output | None = None,
    **options: Any,
) -> Decoded:
    """Answer one question by search that knows no gold answer; prints the answer, its chain, the votes and the tokens.

    Args:
        question: its words; or none, and `task` with the `question_id` of one of its questions.
        model: a server's URL, a packaged name, a `.gguf` file, `REPO_ID:FILE.gguf` or a transformers folder.
        boxed: the answer is short and stands in a box, so that answers can vote; else it is free text. Not for a
            question of a task, whose form of answer is known.
        strategy: `mcts`, `vote`, `best_of_n` or `beam`. value: `vote`, `likelihood` or `verifier` (docs/decoding.md).
        options: as in `Backend`:

            budget_tokens: about how many tokens to generate. rollouts: at most so many chains (16 without a budget).
            seed (0): another seed is another search.
            overrides: `a.b=c`, of the search's settings, `roles` and `models`.
            served, tokenizer, api_key_env: of a server, as `model`, `tokenizer` and `api_key_env` of a recipe's model.

    Raises:
        UsageError: found before any work.
        CotreeError: a model failed, or no chain has an answer.
    """
    backend, output = Backend((model,), **options), output or Output()
    settings = backend.settings()
    kind, asked = _asked(question, task, question_id, boxed=boxed)
    value = choose_value(kind, strategy, value, settings)

    async def answer() -> Decoded:
        async with open_endpoints(settings.used(), widest=settings.widest) as endpoints:
            return await search(
                kind,
                asked,
                Completer(endpoints),
                settings,
                roles=settings.roles,
                strategy=strategy,
                value=value,
                seed=backend.seed,
                on_round=lambda best: update(
                    best.spent.completion_tokens, backend.budget_tokens or 0, f"best so far: {best.answer}"
                ),
            )

    with first_cotree_error(), output.progress("tokens") as update:
        best = asyncio.run(answer())
    spent = best.spent
    output.print(f"answer: {best.answer if best.answer is not None else '(no chain has one)'}\n\n{best.text}\n")
    if best.votes:
        output.print("votes: " + ", ".join(f"{count:.3g} for “{answer}”" for answer, count in best.votes.items()))
    output.print(
        f"{best.chains} chains; {spent.completion_tokens} tokens generated, {spent.prompt_tokens} read "
        f"({spent.cached_tokens} cached) in {spent.requests} calls; stopped by: {best.stopped}"
    )
    if best.answer is None:
        why = ": max_tokens cut them off" if best.cut_off else ""
        raise CotreeError(
            f"none of the {best.chains} chains that were written has an answer{why}; raise --budget-tokens or "
            "--rollouts, or max_thought_tokens=..."
        )
    return best


def _asked(words: str | None, task: str | None, question_id: str | None, *, boxed: bool) -> Asked:
    if task is None:
        if not words or question_id is not None:
            raise UsageError("give a question in quotes, or --task with --id")
        open_task = OpenTask(boxed=boxed)
        return open_task, open_task.question_of([{"role": "user", "content": words}])
    if words is not None or question_id is None or boxed:
        raise UsageError("--task takes --id of one of its questions, and knows itself how it is answered")
    known = task_of(task)
    named = [question for question in known.questions() if question.id == question_id]
    if not named:
        raise UsageError(f"task `{known.name}` has no question `{question_id}`")
    return known, named[0]
