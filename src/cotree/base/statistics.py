"""Statistics of evaluations: intervals, pass@k, minimum detectable difference, constant-answer baseline.

Pure functions. Shares are fractions in [0, 1], intervals are 95%, and undefined values raise ValueError.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

MIN_TREES = 4
Z = NormalDist().inv_cdf(0.975)
Z_POWER = NormalDist().inv_cdf(0.8)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion (Wilson 1927), without continuity correction.

    Args:
        successes: of `n` questions; with several samples per question, the sum of their shares.

    Unlike p +- z·se it stays inside [0, 1] and has positive width at 0 and n successes. With z the normal quantile:
    (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} is no proportion")
    p = successes / n
    center = p + Z * Z / (2 * n)
    spread = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    # At the ends the formula gives 0 or 1 up to rounding.
    low = 0.0 if successes == 0 else (center - spread) / scale
    high = 1.0 if successes == n else (center + spread) / scale
    return low, high


def clustered_interval(shares: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of mean accuracy with several samples per question.

    A bootstrap over questions, because samples of one question are correlated, widened to at least Wilson's interval
    for one sample per question, because a bootstrap of all zeros would be [0, 0].

    Args:
        shares: each question's share of correct samples.
    """
    low, high = bootstrap_interval(shares)
    least, most = wilson_interval(min(sum(shares), len(shares)), len(shares))
    return min(low, least), max(high, most)


def bootstrap_interval(values: Sequence[float], *, draws: int = 2_000, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile-bootstrap interval of a mean, from `draws` seeded resamples."""
    import numpy as np

    rng, found = np.random.default_rng(seed), np.array(values)
    # One resample at a time, to save memory.
    means = [found[rng.integers(0, len(found), len(found))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def ratio_interval(parts: Sequence[float], wholes: Sequence[float], *, draws: int = 2_000) -> tuple[float, float]:
    """The 95% percentile-bootstrap interval of sum(parts) / sum(wholes) over questions, such as pairs per token.

    Args:
        parts, wholes: one number per question each.
    """
    import numpy as np

    rng, above, below = np.random.default_rng(0), np.array(parts, dtype=float), np.array(wholes, dtype=float)
    found = []
    for _ in range(draws):
        drawn = rng.integers(0, len(above), len(above))
        found.append(above[drawn].sum() / max(below[drawn].sum(), 1e-9))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased pass@k estimate from n samples with c correct (Chen et al. 2021); the paper's Test@k.

    1 - C(n-c, k) / C(n, k): the share of k-subsets of the n samples with a correct one. Assumes independent samples,
    which the answers of one tree are not (`tree_test_at_k`).
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} is not defined for {c} correct of {n} samples")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def tree_test_at_k(trees: Sequence[Sequence[bool]], k: int) -> float:
    """Test@k of search on one question: the share of its trees with a correct chain among their first k.

    Chains of one tree are not independent, so each tree (with its own seed) is one draw. A tree with fewer than k
    chains counts with those that it has.

    Args:
        trees: per tree, whether each chain is correct, in the order in which they ended.
    """
    if len(trees) < MIN_TREES or k < 1:
        raise ValueError(f"Test@{k} of {len(trees)} trees is not defined; it needs at least {MIN_TREES} trees")
    return sum(any(tree[:k]) for tree in trees) / len(trees)


def minimum_detectable_difference(n: int, accuracy: float, *, z_power: float = Z_POWER) -> float | None:
    """The minimum detectable difference in accuracy between two rows of n questions at power 0.8.

    The two-sided two-proportion z-test (Fleiss; the formula of R's `power.prop.test`), solved for d = q - p with
    p = `accuracy` and m = (p + q) / 2:

        d = z(0.975)·sqrt(2·m(1-m)/n) + z(0.8)·sqrt((p(1-p) + q(1-q))/n)

    q lies on the side of 1/2, where the variance is larger, so the result holds in both directions. Ignores that rows
    over the same questions are paired, so the true value is usually a little smaller. None if n is too small to detect
    any difference from `accuracy`.
    """
    if n < 1 or not 0 <= accuracy <= 1:
        raise ValueError(f"no difference is defined for accuracy {accuracy} of {n} questions")
    p = min(accuracy, 1 - accuracy)

    def missing(d: float) -> float:
        q = p + d
        m = (p + q) / 2
        return Z * math.sqrt(2 * m * (1 - m) / n) + z_power * math.sqrt((p * (1 - p) + q * (1 - q)) / n) - d

    # `missing` is concave and non-negative at 0, so it crosses zero once, from above.
    low, high = 0.0, 1 - p
    if missing(high) > 0:
        return None
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if missing(middle) > 0 else (low, middle)
    return high


def constant_baseline(golds: Sequence[str]) -> tuple[str, float]:
    """The best constant answer and its accuracy, the score of ignoring the question.

    Ties go to the answer that sorts first, so the order of `golds` does not matter.
    """
    answer, count = min(Counter(golds).items(), key=lambda item: (-item[1], item[0]))
    return answer, count / len(golds)
