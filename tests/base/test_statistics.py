from __future__ import annotations

import itertools
import math
import random
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotree.base.statistics import (
    constant_baseline,
    minimum_detectable_difference,
    pass_at_k,
    tree_test_at_k,
    wilson_interval,
)

proportions = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


# Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3: score without
# continuity correction.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_newcombes_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(proportions)
def test_wilson_bounds_are_where_the_score_test_rejects(proportion: tuple[int, int]) -> None:
    """The interval is the set of p0 that the score test keeps: |p - p0| = z·sqrt(p0(1-p0)/n) at its ends."""
    successes, n = proportion
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high
    for bound in (low, high):
        assert abs(successes / n - bound) == pytest.approx(1.9599639845 * math.sqrt(bound * (1 - bound) / n), abs=1e-8)


@given(proportions)
def test_wilson_is_symmetric_in_success_and_failure(proportion: tuple[int, int]) -> None:
    successes, n = proportion
    low, high = wilson_interval(successes, n)
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_covers_the_truth_about_as_often_as_it_says() -> None:
    n = 60
    for p in (0.02, 0.2, 0.5, 0.9):
        covered = sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k)
            for k in range(n + 1)
            if wilson_interval(k, n)[0] <= p <= wilson_interval(k, n)[1]
        )
        assert 0.91 < covered < 0.99


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="is no"):
        wilson_interval(successes, n)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over what n samples of a model can give is the true 1 - (1-p)^k (the naive estimate's is not)."""
    n, p = 6, 0.3
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 5, 1), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_refuses_more_samples_than_there_are(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, c, k)


def test_test_at_k_of_trees_is_any_of_the_first_k_averaged_over_whole_trees() -> None:
    trees = [(False, True, False), (True,), (False, False, False, True), ()]
    assert [tree_test_at_k(trees, k) for k in (1, 2, 3, 4, 8)] == [0.25, 0.5, 0.5, 0.75, 0.75]
    alike = [(True, True, False, False)] * 4
    assert tree_test_at_k(alike, 1) == 1.0 != pass_at_k(4, 2, 1), "leaves of a tree are no independent samples"


def test_what_is_not_defined_for_trees_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 trees"):
        tree_test_at_k([(True, False)] * 3, 1)
    with pytest.raises(ValueError, match="Test@0"):
        tree_test_at_k([(True, False)] * 4, 0)


def test_minimum_detectable_difference_agrees_with_r() -> None:
    """R's documentation of power.prop.test: p1 = .50, p2 = .75 with power .90 needs n = 76.7."""
    at_76, at_77 = (minimum_detectable_difference(n, 0.5, z_power=NormalDist().inv_cdf(0.9)) for n in (76, 77))
    assert at_76 is not None
    assert at_77 is not None
    assert at_77 < 0.25 < at_76


def test_minimum_detectable_difference_is_found_as_often_as_promised() -> None:
    """Simulated: two models that differ by it, compared with the z-test it is defined by."""
    rng, n, p, trials = random.Random(0), 200, 0.3, 2000
    d = minimum_detectable_difference(n, p)
    assert d is not None
    found = 0
    for _ in range(trials):
        a = sum(rng.random() < p for _ in range(n)) / n
        b = sum(rng.random() < p + d for _ in range(n)) / n
        pooled = (a + b) / 2
        found += abs(a - b) > 1.96 * math.sqrt(2 * pooled * (1 - pooled) / n)
    assert found / trials == pytest.approx(0.8, abs=0.03)


@given(st.integers(20, 5000), st.floats(0, 1))
def test_more_questions_detect_smaller_differences(n: int, accuracy: float) -> None:
    few, many = minimum_detectable_difference(n, accuracy), minimum_detectable_difference(2 * n, accuracy)
    assert few is not None
    assert many is not None
    assert 0 < many < few < 1
    assert minimum_detectable_difference(n, 1 - accuracy) == pytest.approx(few, abs=1e-6)


def test_too_few_questions_detect_nothing() -> None:
    assert minimum_detectable_difference(1, 0.5) is None
    with pytest.raises(ValueError, match="no difference is defined"):
        minimum_detectable_difference(0, 0.5)


@given(st.lists(st.sampled_from("abc"), min_size=1), st.randoms())
def test_no_constant_answer_beats_the_constant_baseline(golds: list[str], rng: random.Random) -> None:
    answer, accuracy = constant_baseline(golds)
    assert accuracy == golds.count(answer) / len(golds)
    assert all(golds.count(other) / len(golds) <= accuracy for other in "abc")
    rng.shuffle(golds)
    assert constant_baseline(golds) == (answer, accuracy)
