"""Decode with search from the command line: which models, which settings, one question answered.

Invariant: whatever can be wrong with models, settings and question is found before a token is spent, by the checks that
a recipe gets.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from cotree.config import SearchRecipe
from cotree.errors import UsageError, spoken_for
from cotree.llm.endpoints import open_endpoints
from cotree.progress import Output
from cotree.search.calls import Calls, Progress
from cotree.search.decode import Decoded, Open, decode, settled
from cotree.tasks import Question, Task, task

# Without a budget.
_ROLLOUTS = 16


@dataclass(frozen=True, slots=True)
class Backend:
    """Where models are and how they are asked: of a server its name for the model (`served`), the tokenizer that
    renders its prompts (without one the server renders them) and the environment variable that holds its key.

    words: URLs, embedded names or GGUF files. overrides: `a.b=c`, of a recipe's models, roles and search.
    """

    words: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    served: str = "default"
    tokenizer: str | None = None
    api_key_env: str | None = None

    def names(self) -> list[str]:
        """What the models are called."""
        return [self.served if word.startswith(("http://", "https://")) else word for word in self.words]

    def recipe(self, budget_tokens: int | None, rollouts: int | None, seed: int) -> SearchRecipe:
        """The models and settings as a part of a recipe, which checks them."""
        models: dict[str, Any] = {}
        for name, word in zip(self.names(), self.words, strict=True):
            mode = "chat" if self.tokenizer is None else "completions"
            server = {"url": word, "model": self.served, "mode": mode, "tokenizer": self.tokenizer}
            models[name] = {"embedded": word} if name == word else server | {"api_key_env": self.api_key_env}
        if len(models) < len(self.words):
            raise UsageError("two models have one name; serve each from a process of its own, or name them by --served")
        bounds: dict[str, Any] = {"stop": {"tokens": budget_tokens}}
        if rollouts is not None or budget_tokens is None:
            bounds["rollouts"] = rollouts or _ROLLOUTS
        raw = {
            "seed": seed,
            "models": models,
            "roles": {"thinker": self.names()[0]},
            "search": {"patterns": ["plain"], "max_thought_tokens": 256, **bounds},
        }
        return SearchRecipe.parse(raw, "decoding", self.overrides)


def decode_question(
    asked: str | None,
    backend: Backend,
    *,
    task_name: str | None = None,
    question_id: str | None = None,
    boxed: bool = False,
    strategy: str = "mcts",
    value: str | None = None,
    budget_tokens: int | None = None,
    rollouts: int | None = None,
    seed: int = 0,
    output: Output | None = None,
) -> Decoded:
    """Answer one question, and say the answer, its chain, the votes and the tokens.

    Args:
        asked: the question's words; or none, and `question_id` of a task.
        boxed: the answer is short and stands in a box, so that answers can vote; else it is free text. A task knows.
        others: as of `search.decode.decode`.

    Raises:
        UsageError: found before any work.
        CotreeError: a model failed.
    """
    recipe = backend.recipe(budget_tokens, rollouts, seed)
    kind, question = _question(asked, task_name, question_id, boxed)
    value = settled(kind, strategy, value, recipe.search)
    output = output or Output()

    async def answer() -> Decoded:
        async with open_endpoints(recipe.used_models(), widest=recipe.search.widest) as endpoints:
            calls = Calls(None, endpoints, Progress())
            with output.progress("tokens") as update:

                def show(best: Decoded) -> None:
                    update(best.spent.completion_tokens, budget_tokens or 0, f"best so far: {best.answer}")

                return await decode(
                    kind, question, calls, recipe.roles, recipe.search,
                    strategy=strategy, value=value, seed=seed, on_round=show,
                )  # fmt: skip

    with spoken_for():
        best = asyncio.run(answer())
    output.say(f"answer: {best.answer if best.answer is not None else '(no chain has one)'}\n\n{best.text}\n")
    if best.votes:
        output.say("votes: " + ", ".join(f"{answer} {count:.3g}" for answer, count in best.votes.items()))
    spent = best.spent
    output.say(
        f"{best.chains} chains; {spent.completion_tokens} tokens generated, {spent.prompt_tokens} read "
        f"({spent.cached_tokens} cached) in {spent.calls} calls; stopped by: {best.stopped}"
    )
    return best


def _question(asked: str | None, task_name: str | None, question_id: str | None, boxed: bool) -> tuple[Task, Question]:
    if task_name is None:
        if not asked or question_id is not None:
            raise UsageError("give a question in quotes, or --task with --id")
        kind = Open(boxed=boxed)
        return kind, kind.ask([{"role": "user", "content": asked}])
    known = task(task_name)
    if asked is not None or question_id is None or boxed:
        raise UsageError("--task takes --id of one of its questions, and knows itself how it is answered")
    found = next((question for question in known.questions() if question.id == question_id), None)
    if found is None:
        raise UsageError(f"task `{known.name}` has no question `{question_id}`")
    return known, found
