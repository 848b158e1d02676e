"""Long reflective chains for the distilled arms of the paper's data table, into runs/paper-chains/.

    python -m benchmarks.paper_chains small      on the train questions of recipes/paper_mini/small.yaml
    python -m benchmarks.paper_chains real       the train solutions of GSM8K, lengthened by rule

TIER.jsonl has a right chain for each train question of the recipe, written by rule: its steps, then loops of doubt as
in Sky-T1's outputs ("Wait", "Alternatively"), which check what was right already. sky_t1-TIER.parquet has real outputs
of Sky-T1-style models: those in COTREE_DATA whose answers are right and that have at most 1,024 tokens with their
prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper import RECIPES, ROOT

from cotree.base.atomic import write_text
from cotree.data.build import import_file
from cotree.experiment.recipe import load_recipe
from cotree.tasks import task
from cotree.tasks.base import Question
from cotree.tasks.loading import load_rows
from cotree.tasks.mathematics import GSM8K

FOLDER = ROOT / "runs" / "paper-chains"
SKY_T1 = "sky_t1_long_cot.jsonl.gz"
MAX_TOKENS = 1024
_DOUBTS = (
    "Wait, is that right?",
    "Hmm, let me check that again.",
    "Alternatively, let me look at it once more.",
    "Wait, maybe I made a mistake.",
)
_STEPS = {  # of an exercise with two numbers: what to do, the computation, its check
    "+": ("I have to add {a} and {b}.", "{a} + {b} = {gold}.", "{gold} - {b} = {a}, so it fits."),
    "-": ("I have to subtract {b} from {a}.", "{a} - {b} = {gold}.", "{gold} + {b} = {a}, so it fits."),
    "*": ("I have to multiply {a} by {b}.", "{a} * {b} = {gold}.", "{gold} / {b} = {a}, so it fits."),
}


def steps_of(question: Question) -> list[str]:
    """Right steps to the answer of an `arithmetic` or `letters` question; the last one is a check."""
    text, gold = question.messages[-1]["content"], question.gold
    if exercise := re.search(r"(\d+) ([-+*]) (\d+)", text):
        a, sign, b = exercise.groups()
        return [step.format(a=a, b=b, gold=gold) for step in _STEPS[sign]]
    if counting := re.search(r"the letter (\w) appear in ((?:\w )+\w)", text):
        letter, word = counting[1], counting[2].split()
        places = " and ".join(str(at) for at, each in enumerate(word, 1) if each == letter)
        return [
            f"I have to go through {' '.join(word)} and look for {letter}.",
            f"{letter} is at {places}, so there are {gold}.",
            f"{len(word)} letters, of which {len(word) - int(gold)} are not {letter}, so {gold} are.",
        ]
    numbers = re.findall(r"\d+", text)
    return [
        f"I have to find the largest of {', '.join(numbers)}.",
        f"The largest is {gold}.",
        f"No number in {', '.join(numbers)} is above {gold}.",
    ]


def doubting_chain(steps: Sequence[str], gold: str, seed: str) -> str:
    r"""The steps, then two loops of doubt, each of which repeats one of the last two; ends with `\boxed{gold}`."""
    rng = random.Random(seed)
    lines = [*steps]
    for place, doubt in enumerate(rng.sample(_DOUBTS, 2)):
        lines += [doubt, steps[-2 + place] if len(steps) > 1 else steps[0]]
    return "\n".join([*lines, f"The answer is: \\boxed{{{gold}}}"])


def gsm8k_solutions() -> dict[str, list[str]]:
    """The lines of each published train solution of GSM8K, by the question's id, without the calculator's marks."""
    solutions = {}
    assert GSM8K.training is not None
    for index, row in enumerate(load_rows(GSM8K.training)):
        text = str(row.get("solution") or row["answer"]).partition("####")[0]
        lines = [line.strip() for line in re.sub(r"<<.*?>>", "", text).splitlines() if line.strip()]
        solutions[str(row.get("id") or f"{GSM8K.training.id_prefix}{index}")] = lines
    return solutions


def rows_of(tier: str) -> Iterator[dict[str, Any]]:
    """A row for each train question of a tier's recipe: its prompt and its chain of doubts."""
    search = load_recipe(RECIPES / f"{tier}.yaml").nodes["trees/train"].settings
    solutions = gsm8k_solutions() if "gsm8k" in search.questions else {}
    for name, count in search.questions.items():
        for question in task(name).questions("train", count):
            steps = solutions.get(question.id) or steps_of(question)
            chain = doubting_chain(steps, question.gold, f"doubts-{question.id}")
            completion = [{"role": "assistant", "content": chain}]
            yield {
                "task": name,
                "question_id": question.id,
                "prompt": list(question.messages),
                "completion": completion,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", choices=("small", "real"))
    tier = parser.parse_args().tier
    rows = list(rows_of(tier))
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_text(FOLDER / f"{tier}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    print(f"{len(rows)} chains of doubts: {FOLDER / f'{tier}.jsonl'}")
    source = Path(os.environ.get("COTREE_DATA", "")) / SKY_T1
    if not source.is_file():
        print(f"no {SKY_T1} in COTREE_DATA, so the arm `sky_t1` cannot be trained; leave it out of `sources`")
        return
    weights = next(iter(load_recipe(RECIPES / f"{tier}.yaml").models.values())).weights
    out = FOLDER / f"sky_t1-{tier}.parquet"
    counts = import_file(source, str(weights), out, task="math500", held_out=[], max_tokens=MAX_TOKENS)
    print(f"{counts.rows} outputs of Sky-T1-style models: {out}; left out: {dict(counts.rows_left_out)}")


if __name__ == "__main__":
    main()
