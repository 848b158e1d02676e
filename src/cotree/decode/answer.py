"""`cotree decode`: answer one question with search, given models and settings on the command line or in Python.

Models, settings and question are validated like a recipe before any request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pydantic import model_validator

from cotree.base.errors import CotreeError, UsageError, first_cotree_error
from cotree.base.progress import Output
from cotree.base.settings import apply_override, parse_section, require_known
from cotree.decode.strategies import Decoded, OpenTask, choose_value, search_answer
from cotree.models.endpoints import open_endpoints
from cotree.models.resolve import is_url, parse_model
from cotree.models.settings import Model
from cotree.search.journal import SearchModels
from cotree.search.reward import load_reward_function
from cotree.search.settings import SearchWithRoles
from cotree.tasks import task as task_of
from cotree.tasks.base import Asked

# Without a budget.
_ROLLOUTS = 16


class Decoding(SearchWithRoles):
    """The search settings of a recipe's `trees` node plus a `models` section."""

    models: dict[str, Model]

    @model_validator(mode="after")
    def _models_known(self) -> Decoding:
        require_known("unknown model", self.writers, list(self.models))
        process = None if self.reward is None else self.reward.process
        for name in self.writers:
            if (self.models[name].mode == "pooling") != (name == process):
                raise ValueError("`reward.process` names a model with `mode: pooling`, and nothing else may be one")
        return self

    def asked_models(self, *also: str) -> dict[str, Model]:
        """The models that a search uses, plus those with these names."""
        return {name: self.models[name] for name in (*self.writers, *also)}


def read_settings(
    models: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    served: str = "default",
    tokenizer: str | None = None,
    api_key_env: str | None = None,
    engine: str | None = None,
    engine_args: Sequence[str] | None = None,
    budget_tokens: int | None = None,
    rollouts: int | None = None,
) -> Decoding:
    """Build and validate the settings of a search with these models.

    Args:
        models: URLs, packaged names, GGUF files, ... (`resolve.parse_model`); the first is the thinker. A server's
            model is named as at the server, others as given.
        overrides: `a.b=c`, settings of the search (`temperature=0.6`, `reward.judge=NAME`), of its roles
            (`roles.reflector=NAME`) and of more models (`models.NAME.url=...`).
        served, tokenizer, api_key_env: for servers, as `model`, `tokenizer` and `api_key_env` of a recipe's model;
            without a tokenizer the server renders the prompts.
        engine, engine_args: for weights, as of a recipe's model; arguments as `key=value`.
        budget_tokens, rollouts: limits of the search; 16 rollouts if neither is given.

    Raises:
        UsageError: an invalid model or setting.
    """
    of_server: dict[str, Any] = {"tokenizer": tokenizer, "chat": tokenizer is None, "api_key_env": api_key_env}
    of_weights: dict[str, Any] = {"engine": engine, "engine_args": engine_args}
    known: dict[str, Any] = {}
    for word in models:
        name, given = (served, of_server) if is_url(word) else (word, of_weights)
        if name in known:
            raise UsageError("two models have one name; serve each from a process of its own, or name them by --served")
        known[name] = parse_model(word, served=served, **given).model_dump(exclude_defaults=True)
    raw: dict[str, Any] = {"models": known, "roles": {"thinker": next(iter(known))}}
    limits = {"max_thought_tokens": 256, "max_chain_tokens": 1024}
    if budget_tokens is not None:  # a request for more would overrun it
        limits = {name: min(limit, budget_tokens) for name, limit in limits.items()}
    raw |= {**limits, "stop": {"tokens": budget_tokens}}
    if rollouts is not None or budget_tokens is None:
        raw["rollouts"] = rollouts or _ROLLOUTS
    for override in overrides:
        apply_override(raw, override, "temperature=0.6")
    settings = parse_section(Decoding, raw, "")
    if settings.reward is not None and settings.reward.function is not None:
        load_reward_function(settings.reward.function)
    return settings


def decode(
    question: str | None = None,
    model: str = "smollm2-135m-instruct",
    *,
    task: str | None = None,
    question_id: str | None = None,
    boxed: bool = False,
    strategy: str = "mcts",
    value: str | None = None,
    seed: int = 0,
    output: Output | None = None,
    **options: Any,
) -> Decoded:
    """Answer one question by search without a gold answer; prints the answer, its chain, the votes and the tokens.

    Args:
        question: its text; or None, and `task` with the `question_id` of one of its questions.
        model: a server's URL, a packaged name, a `.gguf` file, `REPO_ID:FILE.gguf` or a transformers folder.
        boxed: expect a short answer in a box, so that answers can vote; else free text. Not for a question of a task,
            which has its own answer form.
        strategy: `mcts`, `vote`, `best_of_n` or `beam`. value: `vote`, `likelihood` or `verifier` (docs/decoding.md).
        seed: of the search.
        options: of `read_settings`:

            budget_tokens: approximate tokens to generate. rollouts: maximum chains (16 without a budget).
            overrides: `a.b=c`, of the search's settings, `roles` and `models`.
            served, tokenizer, api_key_env: for a server, as `model`, `tokenizer` and `api_key_env` of a recipe's model.
            engine, engine_args: for weights, as of a recipe's model; arguments as `key=value`.

    Raises:
        UsageError: before any work.
        CotreeError: a model failed, or no chain has an answer.
    """
    settings, output = read_settings((model,), **options), output or Output()
    kind, asked = _find_question(question, task, question_id, boxed=boxed)
    value = choose_value(kind, strategy, value, settings)

    def show(best: Decoded) -> None:
        update(best.spent.completion_tokens, settings.stop.tokens or 0, f"best so far: {best.answer}")

    async def search() -> Decoded:
        async with open_endpoints(settings.asked_models(), widest=settings.widest) as endpoints:
            models, roles = SearchModels(endpoints), settings.roles
            best = await search_answer(
                kind, asked, models, settings, roles=roles, strategy=strategy, value=value, seed=seed, on_round=show
            )
            best.spent.repeats = sum(client.counters.repeats for one in endpoints.values() for client in one.clients)
            return best

    with first_cotree_error(), output.progress("tokens") as update:
        best = asyncio.run(search())
    spent = best.spent
    output.print(f"answer: {best.answer if best.answer is not None else '(no chain has one)'}\n\n{best.text}\n")
    if best.votes:
        output.print("votes: " + ", ".join(f"{count:.3g} for “{answer}”" for answer, count in best.votes.items()))
    output.print(
        f"{best.chains} chains; {spent.completion_tokens} tokens generated, {spent.prompt_tokens} read "
        f"({spent.cached_tokens} cached) in {spent.requests} calls"
        f"{f' (sent again after failures: {spent.repeats})' if spent.repeats else ''}; stopped by: {best.stopped}"
    )
    if best.answer is None:
        why = ": max_tokens cut them off" if best.cut_off else ""
        more = "raise --budget-tokens or --rollouts, or max_thought_tokens=..."
        raise CotreeError(f"none of the {best.chains} chains that were written has an answer{why}; {more}")
    return best


def _find_question(words: str | None, task: str | None, question_id: str | None, *, boxed: bool) -> Asked:
    """The question to answer and its task: a task's question by id, or the user's text with an `OpenTask`."""
    if task is None:
        if not words or question_id is not None:
            raise UsageError("give a question in quotes, or --task with --id")
        open_task = OpenTask(boxed=boxed)
        return open_task, open_task.question_of([{"role": "user", "content": words}])
    if words is not None or question_id is None or boxed:
        raise UsageError("--task needs --id, one of its questions, and takes neither words nor --boxed")
    known = task_of(task)
    named = [question for question in known.questions() if question.id == question_id]
    if not named:
        raise UsageError(f"task `{known.name}` has no question `{question_id}`")
    return known, named[0]
