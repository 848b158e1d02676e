"""The embedded model: the search's output tokens a second beside plain requests and beside an evaluation.

python -m benchmarks.search_embedded     this part of `make bench-search` alone, 5 minutes on two cores
python -m benchmarks.search_embedded --recipe recipes/gsm8k.yaml --questions 8 --rounds 1     another recipe's search
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.search_raw import Replay, Sent, replay
from benchmarks.search_stub import grow

from cotree.experiment.recipe import load_recipe
from cotree.models.endpoints import open_endpoints
from cotree.models.llama_cpp import serve
from cotree.models.resolve import gguf_at_type
from cotree.models.settings import Model
from cotree.models.tokenizer import load_tokenizer
from cotree.models.weights import locate
from cotree.tasks import task

RECIPE = Path(__file__).parents[1] / "recipes" / "laptop.yaml"


@dataclass(frozen=True)
class Shares:
    """Output tokens a second: the search's, plain requests' with as many in flight and with all slots in use, and an
    evaluation's of the same prompts."""

    search: float
    raw: float
    raw_all_slots: float
    evaluation: float


async def compare(
    *, questions: int, rounds: int, rollouts: int | None, seed: int, recipe_file: Path = RECIPE
) -> Shares:
    """Each round searches new questions with the recipe's settings, then sends the same bodies plainly.

    The plain requests wait for nothing but a free place, so they keep the server as busy as it can be kept. The
    evaluation asks for whole replies to the prompts at which the trees began (`whole_replies`), one a request, on a
    server whose slots share nothing.
    """
    recipe = load_recipe(recipe_file)
    settings, ((name, model),) = recipe.nodes["trees/train"].settings, recipe.models.items()
    settings = settings.model_copy(update={"rollouts": rollouts or settings.rollouts})
    assert model.weights is not None
    shipped = locate(model.weights)
    tokenizer = load_tokenizer(shipped)

    def tokens(replies: Replay) -> int:
        total = 0
        for reply in replies.replies:
            alone = len(reply["choices"]) == 1  # llama.cpp reports only the first of several choices
            for choice in reply["choices"]:
                counted = len(tokenizer(choice["text"], add_special_tokens=False)["input_ids"])
                counted += choice["finish_reason"] == "stop"
                total += reply["usage"]["completion_tokens"] if alone else counted
        return total

    tasks = [task(name) for name in settings.questions]
    drawn = [one.questions("train", -(-questions * rounds // len(tasks))) for one in tasks]
    asked = list(chain(*(zip(tasks, row, strict=True) for row in zip(*drawn, strict=True))))
    spent: dict[str, list[tuple[int, float]]] = {"search": [], "raw": [], "raw_all_slots": [], "evaluation": []}
    file, slots = gguf_at_type(shipped, model.gguf), model.max_in_flight
    with serve(file, slots=slots, shared=True) as url, serve(file, slots=slots) as apart:
        served = Model(url=url, tokenizer=str(shipped), max_in_flight=slots)
        async with open_endpoints({name: served}) as endpoints:
            for number in range(rounds):
                grown = await grow(endpoints, settings, asked[number * questions : (number + 1) * questions], seed)
                spent["search"].append((grown.tokens, grown.seconds))
                whole = whole_replies(grown.sent, settings.max_chain_tokens, grown.tokens)
                whole = [Sent(one.url.replace(url, apart), one.body) for one in whole]
                for side, sent, in_flight in (
                    ("raw", grown.sent, settings.trees_in_flight * settings.leaves_per_round),
                    ("raw_all_slots", grown.sent, slots),
                    ("evaluation", whole, slots),
                ):
                    plain = await replay(sent, in_flight)
                    spent[side].append((tokens(plain), plain.seconds))
                print(
                    "; ".join(f"{side} {runs[-1][0] / runs[-1][1]:.1f}/s" for side, runs in spent.items()), flush=True
                )
    rates = {side: sum(t for t, _ in runs) / sum(s for _, s in runs) for side, runs in spent.items()}
    return Shares(**rates)


def whole_replies(sent: Sequence[Sent], longest: int, tokens: int) -> list[Sent]:
    """Requests for whole replies to the prompts at which the searches of `sent` began, in turn, each with a seed of its
    own; so many that replies of half the greatest length make about as many tokens."""
    bodies: list[dict[str, Any]] = [json.loads(one.body) for one in sent]
    prompts: list[str] = []
    for prompt in sorted({body["prompt"] for body in bodies}):  # a prompt comes before those that go on from it
        if not prompts or not prompt.startswith(prompts[-1]):
            prompts.append(prompt)
    whole = {key: value for key, value in bodies[0].items() if key != "stop"} | {"n": 1, "max_tokens": longest}
    count = max(len(prompts), 2 * tokens // longest)
    asked = [whole | {"prompt": prompts[i % len(prompts)], "seed": i} for i in range(count)]
    return [Sent(sent[0].url, json.dumps(body).encode()) for body in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="whose `trees.train` is searched with")
    parser.add_argument("--questions", type=int, default=16, help="a round")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    how: dict[str, Any] = {"questions": options.questions, "rounds": options.rounds, "recipe_file": options.recipe}
    shares = asyncio.run(compare(rollouts=None, seed=0, **how))
    print(f"search {shares.search:.1f} output tokens/s; plain requests with as many in flight {shares.raw:.1f},")
    print(f"with all slots in use {shares.raw_all_slots:.1f}; the search's share of the better: ", end="")
    print(f"{shares.search / max(shares.raw, shares.raw_all_slots):.2f}")
    print(f"an evaluation of the same prompts {shares.evaluation:.1f}; the search's share of it: ", end="")
    print(f"{shares.search / shares.evaluation:.2f}")


if __name__ == "__main__":
    main()
