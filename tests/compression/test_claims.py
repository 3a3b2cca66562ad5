"""Rank correlations and the permutation test agree with counting, and say what they should of clear cases."""

from math import isnan

import numpy as np
import pytest

from compression.core.errors import Problem
from compression.sensitivity.claims import outer_blocks_test, spearman
from tests.reference import claims as reference


def two_measures(count: int, noise: float, seed: int = 0) -> tuple[list[float], list[float]]:
    draw = np.random.default_rng(seed)
    a = draw.normal(size=count)
    return a.tolist(), (a + noise * draw.normal(size=count)).tolist()


@pytest.mark.parametrize("digits", [0, 1, 6])  # with many ties, some, and none
@pytest.mark.parametrize("count", [3, 8, 30])
def test_spearman_equals_counting(count: int, digits: int) -> None:
    a, b = (np.round(own, digits).tolist() for own in two_measures(count, 0.8, seed=count))
    assert spearman(a, b, seed=5, resamples=200) == pytest.approx(reference.spearman(a, b, 5, 200), abs=1e-12)


def test_spearman_looks_at_the_order_only() -> None:
    a, b = two_measures(20, 0.5)
    assert spearman(a, a, 0, 200) == pytest.approx((1, 1, 1))
    assert spearman(a, [-own for own in a], 0, 200) == pytest.approx((-1, -1, -1))
    assert spearman(a, b, 0, 200) == spearman(np.exp(a).tolist(), [1000 * own - 3 for own in b], 0, 200)
    assert spearman([1, 2, 2, 3], [10, 20, 20, 30], 0)[0] == pytest.approx(1)


def test_interval_holds_the_estimate_and_narrows_with_more_layers() -> None:
    widths = []
    for count in (10, 40, 160):
        rho, low, high = spearman(*two_measures(count, 1.0), 0, 400)
        assert -1 <= low <= rho <= high <= 1
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]
    a, b = two_measures(40, 1.0)
    _, low, high = spearman(a, b, 0, 400, level=0.5)
    assert high - low < widths[1]


def test_unrelated_measures_are_not_told_apart_from_zero() -> None:
    draw = np.random.default_rng(3)
    _, low, high = spearman(draw.normal(size=60).tolist(), draw.normal(size=60).tolist(), 0)
    assert low < 0 < high


def test_same_seed_same_interval() -> None:
    a, b = two_measures(15, 1.0)
    assert spearman(a, b, 1, 200) == spearman(a, b, 1, 200)
    assert spearman(a, b, 1, 200)[1:] != spearman(a, b, 2, 200)[1:]
    scores = dict(enumerate(a))
    assert outer_blocks_test(scores, 1) == outer_blocks_test(scores, 1)


def test_a_constant_measure_has_no_correlation() -> None:
    assert all(map(isnan, spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], 0, 200)))


def test_measures_that_are_not_finite_or_not_of_the_same_layers_are_refused() -> None:
    with pytest.raises(Problem, match="not all of them are finite"):
        spearman([1.0, float("nan")], [1.0, 2.0], 0)
    with pytest.raises(Problem, match="not all of them are finite"):
        outer_blocks_test({0: 1.0, 1: float("inf"), 2: 0.0}, 0)
    with pytest.raises(ValueError):
        spearman([1.0, 2.0, 3.0], [1.0, 2.0], 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "share", "ends"), [(12, 0.3, 4), (10, 0.1, 1), (9, 0.25, 2)])
def test_p_is_that_of_all_splits(count: int, share: float, ends: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=count).round(1)
    outer, middle, p = outer_blocks_test(dict(enumerate(scores.tolist())), seed, share)
    assert outer == pytest.approx(np.mean([*scores[:ends], *scores[count - ends :]]))
    assert middle == pytest.approx(np.mean(scores[ends : count - ends]))
    assert p == pytest.approx(reference.exact_p(scores.tolist(), ends), abs=0.025)  # 5 standard errors of 10000 draws


def test_the_claim_holds_for_a_u_shape_and_for_nothing_else() -> None:
    blocks = range(30)
    u_shape = {block: abs(block - 14.5) for block in blocks}
    hump = {block: -score for block, score in u_shape.items()}
    level = dict.fromkeys(blocks, 0.1)
    assert outer_blocks_test(u_shape, 0)[2] == pytest.approx(1 / 10001)
    assert outer_blocks_test(hump, 0)[2] == 1
    assert outer_blocks_test(level, 0) == pytest.approx((0.1, 0.1, 1))
    assert outer_blocks_test(dict(reversed(u_shape.items())), 0) == outer_blocks_test(u_shape, 0)


def test_p_of_random_scores_is_spread_evenly() -> None:
    draw = np.random.default_rng(0)
    ps = [outer_blocks_test(dict(enumerate(draw.normal(size=12))), 0, permutations=200)[2] for _ in range(300)]
    assert np.mean(ps) == pytest.approx(0.5, abs=0.07)
    assert np.mean(np.array(ps) <= 0.1) == pytest.approx(0.1, abs=0.06)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_too_few_blocks_are_refused(share: float) -> None:
    with pytest.raises(Problem, match=r"of 4 blocks at each end leaves none to compare"):
        outer_blocks_test({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, 0, share)
