"""Two models on the same questions: who gained, who lost, and whether chance would do as much.

Invariant: what is compared was asked alike (the same questions in the same words, as many samples, one temperature,
top_p and max_tokens); anything else is refused. Ways of decoding may differ: they are named. Tests and intervals are
paired by question.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cotree.base.errors import UsageError
from cotree.base.statistics import Z_POWER, Z, bootstrap_interval
from cotree.eval.journal import JOURNAL, SAMPLES_ARE, EvalSample, by_part, read_samples

_DRAWS = 10_000
Answered = Mapping[str, Sequence[EvalSample]]  # by a question's id


@dataclass(frozen=True, slots=True)
class Difference:
    """The second model minus the first on one row of the table; fractions.

    low, high: 95% interval of `difference`. p_value: of `test`, two-sided. changed: both scores of every question on
    which they differ. detectable: the least difference that would be found with probability 0.8, given how much the
    questions changed.
    """

    part: str
    n: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    test: str
    p_value: float
    changed: Mapping[str, tuple[float, float]]
    detectable: float

    def lines(self) -> list[str]:
        """For the terminal."""
        gained, lost = list[str](), list[str]()
        for id_, (before, after) in self.changed.items():
            moved = id_ if abs(after - before) == 1 else f"{id_} ({before:.2f} -> {after:.2f})"
            (gained if after > before else lost).append(moved)
        least = f"{100 * self.detectable:.1f} points or more" if self.detectable <= 1 else "no difference"
        return [
            f"{self.part}: {100 * self.first:.1f}% -> {100 * self.second:.1f}% of {self.n} questions, "
            f"{100 * self.difference:+.1f} points (95% interval {100 * self.low:+.1f} to {100 * self.high:+.1f}), "
            f"p = {self.p_value:.3g} ({self.test}); {least} can be expected to show",
            *(f"  {word} {len(ids)}: {', '.join(ids)}" for word, ids in (("gained", gained), ("lost", lost)) if ids),
        ]


def compare(first: Path, second: Path) -> list[Difference]:
    """Compare two evaluations (folders of `cotree eval`, or `eval/samples_*.jsonl` of runs), row by row.

    Raises:
        UsageError: they did not ask the same questions in the same way.
    """
    left, right = _read(first), _read(second)
    return [
        compare_answers(part, left.get(part, {}), right.get(part, {}), (str(first), str(second)))
        for part in dict.fromkeys([*left, *right])
    ]


def _read(path: Path) -> Mapping[str, Answered]:
    journal = path / JOURNAL if path.is_dir() else path
    samples = read_samples(journal)
    if not samples:
        raise UsageError(f"no samples at {journal}; {SAMPLES_ARE}")
    return by_part(samples)


def compare_answers(part: str, first: Answered, second: Answered, names: Sequence[str]) -> Difference:
    """Compare two models' samples of one row of the table; `names` are for errors."""
    if only := sorted(first.keys() ^ second.keys()):
        has, lacks = names if only[0] in first else reversed(names)
        fix = "evaluate both on the same questions"
        raise UsageError(f"{lacks} lacks question `{only[0]}` of {part} that {has} has ({len(only)} differ); {fix}")
    for id_, found in first.items():
        theirs = _settings(second[id_])
        for what, ours in _settings(found).items():
            if ours != theirs[what]:
                said = f"{part}, question `{id_}`: {names[0]} has {what} {ours}, {names[1]} has {theirs[what]}"
                raise UsageError(f"{said}; evaluate both alike")
    decoded = [next(iter(side.values()))[0].decoding or "plain" for side in (first, second)]
    if decoded[0] != decoded[1]:
        part = f"{part}, {decoded[0]} -> {decoded[1]}"
    pairs = {id_: (_score(found), _score(second[id_])) for id_, found in first.items()}
    changes = [after - before for before, after in pairs.values()]
    low, high = paired_interval(changes)
    if all(len(found) == 1 for found in first.values()):
        test, p_value = "exact McNemar", mcnemar(changes.count(1), changes.count(-1))
    else:
        test, p_value = "sign-flip permutation", sign_flip(changes)
        least, most = bootstrap_interval(changes)
        low, high = min(low, least), max(high, most)
    before, after = (fmean(side) for side in zip(*pairs.values(), strict=True))
    changed = {id_: pair for id_, pair in pairs.items() if pair[0] != pair[1]}
    detectable = (high - low) / 2 * (1 + Z_POWER / Z)
    detectable = max(detectable, 6 / len(pairs))  # fewer changes are never significant, be they all one way
    return Difference(part, len(pairs), before, after, after - before, low, high, test, p_value, changed, detectable)


def _score(samples: Sequence[EvalSample]) -> float:
    return fmean(sample.kind == "correct" for sample in samples)


def _settings(samples: Sequence[EvalSample]) -> dict[str, object]:
    """How a question was asked; later turns hold the models' own replies."""
    found = {name: getattr(samples[0], name) for name in ("max_tokens", "temperature", "top_p")}
    return {"samples": len(samples), **found, "prompt": "" if samples[0].turn else samples[0].prompt_hash[:12]}


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided exact McNemar test: the chance that a fair coin splits gains and losses at least as unevenly."""
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / (1 << n))


def sign_flip(changes: Sequence[float], *, draws: int = _DRAWS, seed: int = 0) -> float:
    """The two-sided permutation test of a mean change: each question's change could as well have the other sign.

    The share of all choices of signs whose sum is at least as far from 0; of `draws` random ones (seeded), the observed
    one counted in, where there are more.
    """
    import numpy as np

    moved = np.array([change for change in changes if change])
    if 2 ** len(moved) <= draws:
        signs = 1 - 2 * (np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1)
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, (draws, len(moved)), dtype=np.int8)
        signs = 1 - 2 * np.vstack([np.zeros_like(drawn[:1]), drawn])
    as_far: list[bool] = (np.abs(signs @ moved) >= abs(moved.sum()) - 1e-9).tolist()
    return sum(as_far) / len(as_far)


def paired_interval(changes: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a mean paired change, of shares in [0, 1].

    Agresti and Min (2005): Wald's, after half an observation was added to each cell of the paired 2x2 table, that is a
    gain, a loss and two more questions; so it has a width where nothing changed.
    """
    n, total = len(changes) + 2, sum(changes)
    spread = math.sqrt(sum(c * c for c in changes) + 1 - total * total / n) / n * Z
    return max(total / n - spread, -1.0), min(total / n + spread, 1.0)
