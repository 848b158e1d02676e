"""Which way of decoding is right most often at equal tokens? Search, best-of-n, the majority vote and beam search.

    python -m benchmarks.decode                      the packaged model, 60 test questions
    python -m benchmarks.decode --questions 12 --dev 4 --temperatures 0.7

Every method gets the same questions, worked examples, prefixes, model, token budget a question and grid of
temperatures; each is tuned on dev questions and reported, at its own best, on test questions. No method sees a gold
answer before its own is there. Writes benchmarks/out/decode.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from cotree.base.statistics import wilson_interval
from cotree.decode.strategies import Decoded, search_answer
from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.models.settings import Model
from cotree.search.journal import SearchModels
from cotree.search.settings import Search, Stop, Writer
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
Answers = Sequence[tuple[bool, Decoded]]  # whether it is right, and what was found


@dataclass(frozen=True)
class Result:
    """A method's accuracy with its 95% interval, and what it cost: means a question."""

    questions: int
    accuracy: float
    low: float
    high: float
    tokens: float
    uncached_prompt_tokens: float
    chains: float

    @classmethod
    def of(cls, answers: Answers) -> Result:
        """The result of a method's answers."""
        n, correct = len(answers), sum(is_correct for is_correct, _ in answers)
        low, high = wilson_interval(correct, n)
        spent = [best.spent for _, best in answers]
        return cls(
            questions=n,
            accuracy=correct / n,
            low=low,
            high=high,
            tokens=sum(s.completion_tokens for s in spent) / n,
            uncached_prompt_tokens=sum(s.prompt_tokens - s.cached_tokens for s in spent) / n,
            chains=sum(best.chains for _, best in answers) / n,
        )

    def line(self, name: str) -> str:
        """For the terminal."""
        accuracy = f"{self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return f"{name:24} {accuracy}  {self.tokens:5.0f} tokens  {self.chains:4.1f} chains a question"


async def answer_all(
    endpoints: Mapping[str, Endpoint],
    questions: Sequence[Question],
    method: tuple[str, str],
    settings: Search,
    *,
    seed: int,
) -> Answers:
    """A method's answers to all questions."""
    arithmetic, running = task("arithmetic"), asyncio.Semaphore(4)
    roles, models = {"thinker": (Writer(model="model"),)}, SearchModels(endpoints)

    async def answer(question: Question) -> tuple[bool, Decoded]:
        strategy, value = method
        async with running:
            best = await search_answer(
                arithmetic, question, models, settings, roles=roles, strategy=strategy, value=value, seed=seed
            )
        return best.answer is not None and arithmetic.verify(best.answer, question).kind == "correct", best

    # Family after family: a slot then has the worked examples of the next prompt warm.
    return list(await asyncio.gather(*map(answer, sorted(questions, key=lambda question: question.family))))


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Tune every method on dev questions, then ask the test questions; all results as JSON."""
    arithmetic = task("arithmetic")
    dev, test = arithmetic.questions("dev", options.dev), arithmetic.questions("test", options.questions)
    rows: dict[str, list[dict[str, Any]]] = {"dev": [], "test": []}

    def settings(temperature: float) -> Search:
        return Search(
            rollouts=options.budget,
            ends="line",
            patterns=["plain"],
            max_thought_tokens=32,
            max_reflections=1,
            temperature=temperature,
            stop=Stop(tokens=options.budget),
        )

    async with open_endpoints({"model": Model(weights=MODEL)}, widest=8) as endpoints:
        answers_to = partial(answer_all, endpoints, seed=options.seed)

        async def result(split: str, questions: Sequence[Question], method: tuple[str, str], t: float) -> Result:
            found = Result.of(await answers_to(questions, method, settings(t)))
            rows[split].append({"method": method, "temperature": t, **asdict(found)})
            print(found.line(f"{split:4} {' '.join(method)} at {t}"), flush=True)
            return found

        best: dict[tuple[str, str], float] = {}
        for method in METHODS:
            grid = options.temperatures if len(options.temperatures) > 1 else ()
            found = {t: await result("dev", dev, method, t) for t in grid}
            best[method] = max(found, key=lambda t: found[t].accuracy, default=options.temperatures[0])
        for method, temperature in best.items():
            await result("test", test, method, temperature)
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "seed": options.seed, "model": MODEL, "budget": options.budget, **rows}


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
