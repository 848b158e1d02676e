"""Two models on the same questions: which questions changed, and whether chance would do as much.

What is compared was asked alike (the same questions in the same words, as many samples, one temperature, top_p and
max_tokens); anything else is refused. Ways of decoding may differ: they are named. Tests and intervals are paired by
question.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cotree.base.errors import UsageError
from cotree.base.run_folder import read_json
from cotree.base.statistics import Z_POWER, Z, bootstrap_interval
from cotree.eval.journal import (
    HAVE_JOURNALS,
    JOURNAL,
    EvalSample,
    by_task_turn,
    damaged_lines,
    read_all_lines,
    read_samples,
)
from cotree.eval.settings import SAMPLING

_DRAWS = 10_000
SamplesOf = Mapping[str, Sequence[EvalSample]]  # of each question, by its id


@dataclass(frozen=True, slots=True)
class Difference:
    """The second model minus the first on one row of the table; fractions.

    row: the task (and turn), and both ways of decoding where they differ. n: questions.
    low, high: 95% interval of `difference`. p_value: of `test`, two-sided. changed: both scores of every question on
    which they differ. detectable: the least difference that would be found with probability 0.8, given how much the
    questions changed.
    """

    row: str
    n: int
    first: float
    second: float
    low: float
    high: float
    test: str
    p_value: float
    changed: Mapping[str, tuple[float, float]]
    detectable: float

    @property
    def difference(self) -> float:
        """The second model's accuracy minus the first's."""
        return self.second - self.first

    def lines(self) -> list[str]:
        """The difference in words, then the ids of the questions that were gained and lost."""
        gained, lost = list[str](), list[str]()
        for id_, (before, after) in self.changed.items():
            shown = id_ if abs(after - before) == 1 else f"{id_} ({before:.2f} -> {after:.2f})"
            (gained if after > before else lost).append(shown)
        least = f"{100 * self.detectable:.1f} points or more" if self.detectable <= 1 else "no difference"
        return [
            f"{self.row}: {100 * self.first:.1f}% -> {100 * self.second:.1f}% of {self.n} questions, "
            f"{100 * self.difference:+.1f} points (95% interval {100 * self.low:+.1f} to {100 * self.high:+.1f}), "
            f"p = {self.p_value:.3g} ({self.test}); {least} can be expected to show",
            *(f"  {word} {len(ids)}: {', '.join(ids)}" for word, ids in (("gained", gained), ("lost", lost)) if ids),
        ]


def compare_evaluations(first: str | Path, second: str | Path) -> list[Difference]:
    """Compare two evaluations row by row: folders of `cotree eval`, or of one model in an evaluation of a run.

    Raises:
        UsageError: one is no such folder, or they did not ask the same questions in the same way.
    """
    left, right = samples_by_row(Path(first)), samples_by_row(Path(second))
    names = (str(first), str(second))
    return [compare_row(row, left.get(row, {}), right.get(row, {}), names) for row in dict.fromkeys([*left, *right])]


def samples_by_row(path: Path) -> Mapping[str, SamplesOf]:
    """The samples of an evaluation's questions by row; its journal may have more, of earlier questions."""
    journal = path / JOURNAL if path.is_dir() else path
    samples = read_samples(journal)
    if not samples:
        inner = sorted(path.glob(f"**/{JOURNAL}"))
        fix = f"name one model's folder in it, e.g. {inner[0].parent}" if inner else HAVE_JOURNALS
        raise UsageError(f"no samples at {journal}; {fix}")
    asked = _questions_asked(journal.parent)
    lacking = (asked or set()) - {(sample.task, sample.id) for sample in samples}
    if lacking and (damaged := read_all_lines(journal)[1]):
        what = f"{journal} has {damaged_lines(damaged)} and lacks replies to {len(lacking)} of its questions"
        raise UsageError(f"{what}; run the same evaluation again, which asks these")
    return by_task_turn(sample for sample in samples if asked is None or (sample.task, sample.id) in asked)


def _questions_asked(folder: Path) -> set[tuple[str, str]] | None:
    """(task, question id) of what the results in a folder are about; None where none are written yet."""
    for path in folder.glob("results_*.json"):
        with suppress(KeyError, TypeError, AttributeError):  # of another program
            asked = (read_json(path) or {})["cotree"]["questions"]
            return {(task, id_) for task, ids in asked.items() for id_ in ids}
    return None


def compare_row(row: str, first: SamplesOf, second: SamplesOf, names: Sequence[str]) -> Difference:
    """Compare two models' samples of one row of the table; `names` are theirs, for errors.

    Questions of which a reply could not be judged are left out.

    Raises:
        UsageError: the questions differ, or how they were asked.
    """
    undecided = {id_ for side in (first, second) for id_ in side if any(s.verdict == "undecided" for s in side[id_])}
    first, second = ({id_: side[id_] for id_ in side if id_ not in undecided} for side in (first, second))
    if not first and not second:
        raise UsageError(f"{row}: no reply could be judged; look at the questions' gold answers")
    if only := sorted(first.keys() ^ second.keys()):
        has, lacks = names if only[0] in first else reversed(names)
        fix = "evaluate both on the same questions"
        raise UsageError(f"{lacks} lacks question `{only[0]}` of {row} that {has} has ({len(only)} differ); {fix}")
    for id_, found in first.items():
        theirs = _settings(second[id_])
        for key, ours in _settings(found).items():
            if ours != theirs[key]:
                what = f"{row}, question `{id_}`: {names[0]} has {key} {ours}, {names[1]} has {theirs[key]}"
                raise UsageError(f"{what}; evaluate both alike")
    decoded = [next(iter(side.values()))[0].decoding or "plain" for side in (first, second)]
    before, after = ([fmean(s.verdict == "correct" for s in side[id_]) for id_ in first] for side in (first, second))
    changes = [new - old for old, new in zip(before, after, strict=True)]
    low, high = paired_interval(changes)
    if all(len(found) == 1 for found in first.values()):
        test, p_value = "exact McNemar", mcnemar_p_value(changes.count(1), changes.count(-1))
    else:
        test, p_value = "sign-flip permutation", sign_flip_p_value(changes)
        least, most = bootstrap_interval(changes)
        low, high = min(low, least), max(high, most)
    detectable = (high - low) / 2 * (1 + Z_POWER / Z)
    return Difference(
        row=row if decoded[0] == decoded[1] else f"{row}, {decoded[0]} -> {decoded[1]}",
        n=len(first),
        first=fmean(before),
        second=fmean(after),
        low=low,
        high=high,
        test=test,
        p_value=p_value,
        changed={id_: (old, new) for id_, old, new in zip(first, before, after, strict=True) if old != new},
        detectable=max(detectable, 6 / len(first)),  # fewer changes are never significant, be they all one way
    )


def _settings(samples: Sequence[EvalSample]) -> dict[str, object]:
    """How a question was asked; later turns hold the models' own replies, so their prompts differ."""
    first = samples[0]
    asked = {name: getattr(first, name) for name in SAMPLING}
    return {"samples": len(samples), **asked, "prompt": "" if first.turn else first.prompt_hash[:12]}


def mcnemar_p_value(gained: int, lost: int) -> float:
    """The two-sided exact McNemar test: the chance that a fair coin splits gains and losses at least as unevenly."""
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / (1 << n))


def sign_flip_p_value(changes: Sequence[float], *, draws: int = _DRAWS, seed: int = 0) -> float:
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
