"""Compare two models on the same questions: accuracy difference, changed questions, paired significance tests.

Requires equal questions, prompts, number of samples, temperature, top_p and max_tokens; anything else is refused.
Decoding strategies may differ and are named. Tests and intervals are paired by question.
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
SamplesOf = Mapping[str, Sequence[EvalSample]]  # {question id: samples}


@dataclass(frozen=True, slots=True)
class Difference:
    """The second model minus the first on one row of the table; fractions.

    row: the task (and turn), and both decoding strategies if they differ. n: questions.
    low, high: 95% interval of `difference`. p_value: of `test`, two-sided. changed: {question: both scores} where they
    differ. detectable: minimum detectable difference at power 0.8, given the variance of the changes.
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
        """Report lines: the difference, then the ids of questions gained and lost."""
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
        UsageError: not such folders, or different questions or sampling settings.
    """
    left, right = samples_by_row(Path(first)), samples_by_row(Path(second))
    names = (str(first), str(second))
    return [compare_row(row, left.get(row, {}), right.get(row, {}), names) for row in dict.fromkeys([*left, *right])]


def samples_by_row(path: Path) -> Mapping[str, SamplesOf]:
    """The samples of an evaluation's current questions, by row; its journal may have others."""
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
    """(task, question id) of all questions in a folder's results; None without results."""
    for path in folder.glob("results_*.json"):
        with suppress(KeyError, TypeError, AttributeError):  # files of another program
            asked = (read_json(path) or {})["cotree"]["questions"]
            return {(task, id_) for task, ids in asked.items() for id_ in ids}
    return None


def compare_row(row: str, first: SamplesOf, second: SamplesOf, names: Sequence[str]) -> Difference:
    """Compare two models' samples in one row of the table; `names` are for error messages.

    Leaves out questions with an undecided reply.

    Raises:
        UsageError: the questions or sampling settings differ.
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
                how = f"with {key} {ours} in {names[0]} and {theirs[key]} in {names[1]}"
                if key == "prompt":  # its hash says nothing to a reader
                    how = f"with different prompts in {names[0]} and {names[1]} (one with --examples?)"
                raise UsageError(f"{row}: question `{id_}` was asked {how}; evaluate both in the same way")
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
        detectable=max(detectable, 6 / len(first)),  # fewer than 6 changes are never significant
    )


def _settings(samples: Sequence[EvalSample]) -> dict[str, object]:
    """The sampling settings and prompt hash of a question; no hash for later turns, as prompts contain replies."""
    first = samples[0]
    asked = {name: getattr(first, name) for name in SAMPLING}
    return {"samples": len(samples), **asked, "prompt": "" if first.turn else first.prompt_hash[:12]}


def mcnemar_p_value(gained: int, lost: int) -> float:
    """The p-value of the two-sided exact McNemar test."""
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / (1 << n))


def sign_flip_p_value(changes: Sequence[float], *, draws: int = _DRAWS, seed: int = 0) -> float:
    """The p-value of a two-sided sign-flip permutation test of a mean paired change.

    Exact if there are at most `draws` sign vectors, else over `draws` random ones (seeded) and the observed one.
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
    """The 95% interval of a mean paired change of shares in [0, 1].

    Agresti and Min (2005): Wald's interval after adding half an observation to each cell of the paired 2x2 table (a
    gain, a loss and two more questions), so its width is positive even without changes.
    """
    n, total = len(changes) + 2, sum(changes)
    spread = math.sqrt(sum(c * c for c in changes) + 1 - total * total / n) / n * Z
    return max(total / n - spread, -1.0), min(total / n + spread, 1.0)
