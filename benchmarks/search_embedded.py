"""The embedded model: the search's output tokens a second as a share of plain requests on the same server.

python -m benchmarks.search_embedded     this part of `make bench-search` alone, 4 minutes on two cores
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from benchmarks.search_raw import Replay, replay
from benchmarks.search_stub import grow

from cotree.experiment.recipe import load_recipe
from cotree.models.endpoints import open_endpoints
from cotree.models.llama_cpp import serve
from cotree.models.settings import Model
from cotree.models.tokenizer import load_tokenizer
from cotree.models.weights import gguf_at_type, locate
from cotree.tasks import task

RECIPE = Path(__file__).parents[1] / "recipes" / "laptop.yaml"


@dataclass(frozen=True)
class Shares:
    """Output tokens a second: the search's, and plain requests' with as many in flight and with all slots in use."""

    search: float
    raw: float
    raw_all_slots: float


async def compare(*, questions: int, rounds: int, rollouts: int | None, seed: int) -> Shares:
    """Each round searches new questions with the laptop recipe's settings, then sends the same bodies plainly.

    The plain requests wait for nothing but a free place, so they keep the server as busy as it can be kept.
    """
    recipe = load_recipe(RECIPE)
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

    arithmetic, letters = task("arithmetic"), task("letters")
    half = questions * rounds // 2 + 1
    pairs = zip(arithmetic.questions("train", half), letters.questions("train", half), strict=True)
    asked = [item for a, b in pairs for item in ((arithmetic, a), (letters, b))]
    spent: dict[str, list[tuple[int, float]]] = {"search": [], "raw": [], "raw_all_slots": []}
    with serve(gguf_at_type(shipped, model.gguf), slots=model.max_in_flight, shared=True) as url:
        served = Model(url=url, tokenizer=str(shipped), max_in_flight=model.max_in_flight)
        async with open_endpoints({name: served}) as endpoints:
            for number in range(rounds):
                grown = await grow(endpoints, settings, asked[number * questions : (number + 1) * questions], seed)
                spent["search"].append((grown.tokens, grown.seconds))
                for side, in_flight in (
                    ("raw", settings.trees_in_flight * settings.leaves_per_round),
                    ("raw_all_slots", model.max_in_flight),
                ):
                    plain = await replay(grown.sent, in_flight)
                    spent[side].append((tokens(plain), plain.seconds))
    rates = {side: sum(t for t, _ in runs) / sum(s for _, s in runs) for side, runs in spent.items()}
    return Shares(**rates)


def main() -> None:
    shares = asyncio.run(compare(questions=16, rounds=2, rollouts=None, seed=0))
    print(f"search {shares.search:.1f} output tokens/s, plain requests with as many in flight {shares.raw:.1f}")
    print(f"with all slots in use {shares.raw_all_slots:.1f}; the search's share of the better: ", end="")
    print(f"{shares.search / max(shares.raw, shares.raw_all_slots):.2f}")


if __name__ == "__main__":
    main()
