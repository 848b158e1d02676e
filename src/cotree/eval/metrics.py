"""The numbers of an evaluation table, as pure functions of judged samples.

Invariant: the three verdict kinds are never folded (a missing answer is not a wrong one), all ratios are fractions in
[0, 1] of *all* samples unless their name says otherwise, and an interval comes with every accuracy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, TypedDict

FEWEST_TREES = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """One judged completion: the verdict's kind, its generated tokens, why the server stopped ("length": cut), the
    answer that was extracted, and whether a text without one is a loop (`diagnosis`)."""

    kind: Literal["correct", "wrong", "no_answer"]
    tokens: int
    finish_reason: str
    answer: str | None = None
    loop: bool = False


class Metrics(TypedDict):
    """One row of the table; fractions in [0, 1]. `accuracy_answered` is None when no sample has an answer.

    `commonest` is the answer given most often and `commonest_share` its share of the samples with an answer: near 1, a
    model has learnt a constant. None without answers.
    """

    n: int
    accuracy: float
    low: float
    high: float
    no_answer: float
    loop: float
    truncated: float
    finished_without_answer: float
    accuracy_answered: float | None
    mean_tokens: float
    commonest: str | None
    commonest_share: float | None


def summarize(samples: Sequence[Sample]) -> Metrics:
    """The table row of greedy samples, one a question (paper, Experiments: accuracy and ratio of no-answer outputs).

    `low` and `high` are the 95% Wilson interval of `accuracy`. `no_answer` is `loop` (no answer, and the text repeats
    itself) plus `truncated` (no loop, cut by max_tokens) plus `finished_without_answer`. Raises ValueError for no
    samples.
    """
    if not samples:
        raise ValueError("no samples to summarize")
    n = len(samples)
    kinds = Counter(sample.kind for sample in samples)
    loops = sum(sample.kind == "no_answer" and sample.loop for sample in samples)
    cut = sum(s.kind == "no_answer" and s.finish_reason == "length" and not s.loop for s in samples)
    low, high = wilson(kinds["correct"], n)
    answered = n - kinds["no_answer"]
    answers = [sample.answer for sample in samples if sample.answer is not None]
    commonest, share = constant_baseline(answers) if answers else (None, None)
    return Metrics(
        n=n,
        accuracy=kinds["correct"] / n,
        low=low,
        high=high,
        no_answer=kinds["no_answer"] / n,
        loop=loops / n,
        truncated=cut / n,
        finished_without_answer=(kinds["no_answer"] - cut - loops) / n,
        accuracy_answered=kinds["correct"] / answered if answered else None,
        mean_tokens=sum(sample.tokens for sample in samples) / n,
        commonest=commonest,
        commonest_share=share,
    )


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), without continuity correction.

    The successes of questions that were sampled several times are the sum of their shares.

    Unlike p +- z·se it stays inside [0, 1] and has a width at 0 and at n successes. With z the normal quantile:
    (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} is no proportion")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    center = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the formula is exactly 0 or 1 up to rounding.
    low = 0.0 if successes == 0 else (center - spread) / scale
    high = 1.0 if successes == n else (center + spread) / scale
    return low, high


def clustered_interval(shares: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a mean over questions that were sampled several times each.

    The bootstrap's over whole questions, because samples of one question resemble each other; where that is narrower
    than Wilson's interval of as many single answers, the latter: a bootstrap of nothing but zeros is [0, 0] and proves
    nothing.
    """
    low, high = bootstrap_interval(shares)
    least, most = wilson(min(sum(shares), len(shares)), len(shares))
    return min(low, least), max(high, most)


def bootstrap_interval(values: Sequence[float], *, draws: int = 2_000, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean, by percentiles of the means of `draws` seeded samples with replacement."""
    import numpy as np

    rng, found = np.random.default_rng(seed), np.array(values)
    # Draw by draw, so that a thousand questions need no matrix of two million.
    means = [found[rng.integers(0, len(found), len(found))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of "one of k samples is correct" from n samples with c correct (Chen et al. 2021).

    1 - C(n-c, k) / C(n, k): the share of k-subsets of the n samples that hold a correct one. The paper's Test@k.

    Raises:
        TypeError: for a tree, whose answers share thoughts and are no independent samples.
    """
    if isinstance(n, TreeAnswers):
        raise TypeError("pass@k needs independent samples and a tree's leaves are none: use tree_test_at_k")
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} is not defined for {c} correct of {n} samples")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@dataclass(frozen=True, slots=True)
class TreeAnswers:
    """Whether each chain of one tree is correct, in the order in which they ended; one without an answer is not."""

    correct: Sequence[bool]


def tree_test_at_k(trees: Sequence[TreeAnswers], k: int) -> float:
    """Test@k of search on one question: the share of its trees with a correct one among their first k chains.

    A tree is one draw, so the mean is over whole trees, each grown with a seed of its own; one of fewer than k chains
    counts with those.

    Raises:
        ValueError: fewer than four trees, or k < 1.
    """
    if len(trees) < FEWEST_TREES or k < 1:
        raise ValueError(f"Test@{k} of {len(trees)} trees is not defined; it needs at least {FEWEST_TREES} trees")
    return sum(any(tree.correct[:k]) for tree in trees) / len(trees)


def minimum_detectable_difference(
    n: int, accuracy: float, *, confidence: float = 0.95, power: float = 0.8
) -> float | None:
    """The smallest difference that comparing two rows of n questions finds with probability `power`.

    The two-sided two-proportion z-test (Fleiss; the formula of R's `power.prop.test`), solved for d = q - p with
    p = `accuracy` and m = (p + q) / 2:

        d = z((1 + confidence) / 2)·sqrt(2·m(1-m)/n) + z(power)·sqrt((p(1-p) + q(1-q))/n)

    q lies on the side of 1/2, where the variance is larger, so the answer holds for both directions. Rows over the
    same questions are paired, which this leaves out: the true figure is usually a little smaller. None when n is too
    small to find any difference from `accuracy`.
    """
    if n < 1 or not 0 <= accuracy <= 1:
        raise ValueError(f"no difference is defined for accuracy {accuracy} of {n} questions")
    p = min(accuracy, 1 - accuracy)
    z_test = NormalDist().inv_cdf((1 + confidence) / 2)
    z_power = NormalDist().inv_cdf(power)

    def missing(d: float) -> float:
        q = p + d
        m = (p + q) / 2
        return z_test * math.sqrt(2 * m * (1 - m) / n) + z_power * math.sqrt((p * (1 - p) + q * (1 - q)) / n) - d

    # `missing` is concave and not negative at 0, so it crosses zero once, from above.
    low, high = 0.0, 1 - p
    if missing(high) > 0:
        return None
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if missing(middle) > 0 else (low, middle)
    return high


def constant_baseline(golds: Sequence[str]) -> tuple[str, float]:
    """The best constant answer and its accuracy: what a model gets that ignores the question.

    Ties go to the answer that sorts first, so the same golds give the same answer in any order. Raises ValueError for
    no golds.
    """
    if not golds:
        raise ValueError("no golds to find a constant answer for")
    answer, count = min(Counter(golds).items(), key=lambda item: (-item[1], item[0]))
    return answer, count / len(golds)
