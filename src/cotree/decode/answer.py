"""Decode with search from the command line or a script: which models, which settings, one question answered.

Invariant: whatever can be wrong with models, settings and question is found before a token is spent, by the checks that
a recipe gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cotree.base.errors import UsageError, spoken_for
from cotree.base.progress import Output
from cotree.decode.strategies import Decoded, Open, settled
from cotree.decode.strategies import decode as search
from cotree.experiment.recipe import SearchRecipe
from cotree.models.endpoints import open_endpoints
from cotree.search.calls import Calls, Progress
from cotree.search.reward import load_function
from cotree.tasks import task as task_of

# Without a budget.
_ROLLOUTS = 16


@dataclass(frozen=True, slots=True)
class Backend:
    """Where models are and how they are asked: of a server its name for the model (`served`), the tokenizer that
    renders its prompts (without one the server renders them) and the environment variable that holds its key.

    words: URLs, embedded names or GGUF files. overrides: `a.b=c`, of a recipe's models, roles and search.
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
        """What the models are called."""
        return [self.served if word.startswith(("http://", "https://")) else word for word in self.words]

    def recipe(self) -> SearchRecipe:
        """The models and settings as a part of a recipe, which checks them."""
        models: dict[str, Any] = {}
        for name, word in zip(self.names(), self.words, strict=True):
            mode = "chat" if self.tokenizer is None else "completions"
            server = {"url": word, "model": self.served, "mode": mode, "tokenizer": self.tokenizer}
            models[name] = {"embedded": word} if name == word else server | {"api_key_env": self.api_key_env}
        if len(models) < len(self.words):
            raise UsageError("two models have one name; serve each from a process of its own, or name them by --served")
        search: dict[str, Any] = {"stop": {"tokens": self.budget_tokens}}
        if self.rollouts is not None or self.budget_tokens is None:
            search["rollouts"] = self.rollouts or _ROLLOUTS
        raw = {
            "seed": self.seed,
            "models": models,
            "roles": {"thinker": self.names()[0]},
            "search": {"patterns": ["plain"], "max_thought_tokens": 256, **search},
        }
        recipe = SearchRecipe.parse(raw, "decoding", self.overrides)
        if recipe.search.reward is not None and recipe.search.reward.function is not None:
            load_function(recipe.search.reward.function)
        return recipe


def decode(
    question: str | None = None,
    model: str = "smollm2-135m-instruct",
    *,
    task: str | None = None,
    question_id: str | None = None,
    boxed: bool = False,
    strategy: str = "mcts",
    value: str | None = None,
    budget_tokens: int | None = None,
    rollouts: int | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    served: str = "default",
    tokenizer: str | None = None,
    api_key_env: str | None = None,
    output: Output | None = None,
) -> Decoded:
    """Answer one question by search that knows no gold answer, and say the answer, its chain, the votes and the tokens.

    Args:
        question: its words; or none, and `task` with the `question_id` of one of its questions.
        model: a server's URL, a `.gguf` or an embedded name.
        boxed: the answer is short and stands in a box, so that answers can vote; else it is free text. A task knows.
        strategy: `mcts`, `vote`, `best_of_n` or `beam`. value: `vote`, `likelihood` or `verifier` (docs/decoding.md).
        budget_tokens: about how many tokens to generate. rollouts: at most so many chains (16 without a budget).
        overrides: `a.b=c`, of a recipe's models, roles and search.
        served, tokenizer, api_key_env: of a server, as `model`, `tokenizer` and `api_key_env` of a recipe's model.

    Raises:
        UsageError: found before any work.
        CotreeError: a model failed.
    """
    backend = Backend((model,), overrides, served, tokenizer, api_key_env, budget_tokens, rollouts, seed)
    recipe, output = backend.recipe(), output or Output()
    kind = Open(boxed=boxed) if task is None else task_of(task)
    value = settled(kind, strategy, value, recipe.search)
    if isinstance(kind, Open):
        if not question or question_id is not None:
            raise UsageError("give a question in quotes, or --task with --id")
        asked = kind.ask([{"role": "user", "content": question}])
    else:
        if question is not None or question_id is None or boxed:
            raise UsageError("--task takes --id of one of its questions, and knows itself how it is answered")
        named = [item for item in kind.questions() if item.id == question_id]
        if not named:
            raise UsageError(f"task `{kind.name}` has no question `{question_id}`")
        asked = named[0]

    async def answer() -> Decoded:
        async with open_endpoints(recipe.used_models(), widest=recipe.search.widest) as endpoints:
            calls = Calls(None, endpoints, Progress())
            with output.progress("tokens") as update:

                def show(best: Decoded) -> None:
                    update(best.spent.completion_tokens, budget_tokens or 0, f"best so far: {best.answer}")

                return await search(
                    kind, asked, calls, recipe.roles, recipe.search,
                    strategy=strategy, value=value, seed=seed, on_round=show,
                )  # fmt: skip

    with spoken_for():
        best = asyncio.run(answer())
    output.say(f"answer: {best.answer if best.answer is not None else '(no chain has one)'}\n\n{best.text}\n")
    if best.votes:
        output.say("votes: " + ", ".join(f"{count:.3g} for “{answer}”" for answer, count in best.votes.items()))
    spent = best.spent
    output.say(
        f"{best.chains} chains; {spent.completion_tokens} tokens generated, {spent.prompt_tokens} read "
        f"({spent.cached_tokens} cached) in {spent.requests} calls; stopped by: {best.stopped}"
    )
    return best
