"""Which way of decoding is right most often at equal tokens? Search, best-of-n, the majority vote and beam search.

    python -m benchmarks.decode                      the embedded model, 60 test questions
    python -m benchmarks.decode --questions 12 --dev 4 --temperatures 0.7

Every method gets the same questions, worked examples, prefixes, model, token budget a question and grid of
temperatures; each is tuned on dev questions and reported, at its own best, on test questions. Nobody sees gold until
the answers are there. Writes benchmarks/out/decode.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cotree.base.statistics import wilson
from cotree.decode.strategies import Decoded, decode
from cotree.experiment.recipe import Model, Search, Stop, Writer
from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.search.calls import Calls, Progress
from cotree.tasks import Question, task

OUT = Path(__file__).parent / "out" / "decode.json"
MODEL = "smollm2-135m-instruct"
METHODS = (
    ("mcts", "vote"),
    ("mcts", "likelihood"),
    ("vote", "vote"),
    ("best_of_n", "likelihood"),
    ("beam", "likelihood"),
)


async def answers(
    endpoints: dict[str, Endpoint], questions: Sequence[Question], method: tuple[str, str], settings: Search, seed: int
) -> list[tuple[bool, Decoded]]:
    """What a method answers to each question, and whether that is right."""
    kind, gate = task("arithmetic"), asyncio.Semaphore(4)
    calls, roles = Calls(None, endpoints, Progress()), {"thinker": (Writer(model="model"),)}

    async def one(question: Question) -> tuple[bool, Decoded]:
        async with gate:
            strategy, value = method
            best = await decode(kind, question, calls, roles, settings, strategy=strategy, value=value, seed=seed)
        return best.answer is not None and kind.verify(best.answer, question).kind == "correct", best

    # Family after family: a slot then has the worked examples of the next prompt warm.
    return list(await asyncio.gather(*map(one, sorted(questions, key=lambda question: question.family))))


def row(found: Sequence[tuple[bool, Decoded]]) -> dict[str, Any]:
    """Accuracy with its interval, and what it cost a question."""
    n, right = len(found), sum(correct for correct, _ in found)
    low, high = wilson(right, n)
    spent = [best.spent for _, best in found]
    return {
        "questions": n,
        "accuracy": right / n,
        "low": low,
        "high": high,
        "tokens": sum(s.completion_tokens for s in spent) / n,
        "uncached_prompt_tokens": sum(s.prompt_tokens - s.cached_tokens for s in spent) / n,
        "chains": sum(best.chains for _, best in found) / n,
    }


def told(name: str, found: dict[str, Any]) -> str:
    accuracy = f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{name:24} {accuracy}  {found['tokens']:5.0f} tokens  {found['chains']:4.1f} chains a question"


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    kind = task("arithmetic")
    dev, test = kind.questions("dev", options.dev), kind.questions("test", options.questions)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "seed": options.seed, "model": MODEL, "budget": options.budget,
        "dev": [], "test": [],
    }  # fmt: skip

    def settings(temperature: float) -> Search:
        return Search(
            rollouts=options.budget, patterns=["plain"], max_thought_tokens=32, max_reflections=1,
            temperature=temperature, stop=Stop(tokens=options.budget),
        )  # fmt: skip

    async with open_endpoints({"model": Model(embedded=MODEL)}, widest=8) as endpoints:
        best: dict[tuple[str, str], float] = {}
        for method in METHODS:
            rows = {}
            for temperature in options.temperatures if len(options.temperatures) > 1 else ():
                rows[temperature] = row(await answers(endpoints, dev, method, settings(temperature), options.seed))
                result["dev"].append({"method": method, "temperature": temperature, **rows[temperature]})
                print(told(f"dev  {' '.join(method)} at {temperature}", rows[temperature]), flush=True)
            best[method] = max(rows, key=lambda t: float(rows[t]["accuracy"]), default=options.temperatures[0])
        for method, temperature in best.items():
            found = await answers(endpoints, test, method, settings(temperature), options.seed)
            result["test"].append({"method": method, "temperature": temperature, **row(found)})
            print(told(f"test {' '.join(method)} at {temperature}", result["test"][-1]), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=60, help="test questions, reported")
    parser.add_argument("--dev", type=int, default=24, help="dev questions, for tuning")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 0.8, 1.1])
    parser.add_argument("--budget", type=int, default=300, help="generated tokens a question")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    result = asyncio.run(measure(options))
    result["seconds"] = round(time.monotonic() - started)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['seconds']} s")


if __name__ == "__main__":
    main()
