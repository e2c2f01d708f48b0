"""Statistics, compared with values by hand, scipy, and simulations with fixed seeds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from archangel import statistics


def test_binomial_interval():
    # By hand for 8 of 10 at 95%, z = 1.96: center 0.7168, half width 0.2265.
    low, high = statistics.binomial_interval(8, 10, 0.95)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert statistics.binomial_interval(0, 10, 0.95)[0] == 0
    assert statistics.binomial_interval(10, 10, 0.95)[1] == 1
    # Half a win is rounded down for the lower end, and up for the upper end.
    low, high = statistics.binomial_interval(8.5, 10, 0.75)
    assert low == statistics.binomial_interval(8, 10, 0.75)[0]
    assert high == statistics.binomial_interval(9, 10, 0.75)[1]
    for wins, n, level in ((11, 10, 0.75), (-1, 10, 0.75), (5, 10, 75), (math.nan, 10, 0.75)):
        with pytest.raises(ValueError):
            statistics.binomial_interval(wins, n, level)


@given(st.integers(1, 300), st.data())
def test_binomial_interval_levels(n, data):
    """The interval of a higher level contains that of a lower level."""
    wins = data.draw(st.integers(0, 2 * n)) / 2
    low, high = statistics.binomial_interval(wins, n, 0.75)
    lower, higher = statistics.binomial_interval(wins, n, 0.95)
    assert 0 <= lower <= low <= wins / n <= high <= higher <= 1


@pytest.mark.parametrize("level", [0.75, 0.95])
def test_binomial_interval_coverage(level):
    rng = np.random.default_rng(0)
    drawn = rng.choice([0, 0.5, 1], p=[0.3, 0.2, 0.5], size=(1000, 100)).sum(1)  # rate 0.6
    intervals = [statistics.binomial_interval(wins, 100, level) for wins in drawn]
    covered = np.mean([low <= 0.6 <= high for low, high in intervals])
    assert level <= covered <= level + 0.15  # ties vary less than wins and losses do


def test_bootstrap_se_one_seed():
    """It is the usual standard error."""
    wins = np.random.default_rng(0).choice([0, 0.5, 1], size=400)
    expected = wins.std() / math.sqrt(400)
    assert statistics.bootstrap_se(wins) == pytest.approx(expected, rel=0.05)
    assert statistics.bootstrap_se(wins[None]) == statistics.bootstrap_se(wins)
    assert math.isnan(statistics.bootstrap_se([1.0]))


def test_bootstrap_se_clustered():
    # sd 0.4 between prompts, 0.3 between seeds of a prompt: Var(mean) = (0.16 + 0.09 / 4) / 200.
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 0.4, (500, 1, 200))
    values = prompts + rng.normal(0, 0.3, (500, 4, 200))
    expected = math.sqrt((0.16 + 0.09 / 4) / 200)
    assert values.mean((1, 2)).std() == pytest.approx(expected, rel=0.05)
    found = [statistics.bootstrap_se(sample, resamples=300) for sample in values[:20]]
    assert np.mean(found) == pytest.approx(expected, rel=0.05)
    # The same values for every seed are no new evidence.
    one = values[0, 0]
    assert statistics.bootstrap_se([one] * 4) == pytest.approx(statistics.bootstrap_se(one))


def test_paired_mcnemar():
    # 5 prompts are won by a only, 1 by b only. A tie is not a win.
    a = [1, 1, 1, 1, 1, 0.0, 1, 0.5, 0]
    b = [0, 0, 0.5, 0, 0, 1.0, 1, 0.5, 0.5]
    found = statistics.paired(a, b)
    assert found["only_a"] == 5
    assert found["only_b"] == 1
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 6) / 2**6)


def test_paired_wilcoxon():
    """Of the scores, or of the wins if there are no scores."""
    wins = [0.5] * 6
    # Six differences of the same sign and of different sizes: p = 2 / 2^6.
    found = statistics.paired(wins, wins, [1, 2, 3, 4, 5, 6], [0] * 6)
    assert found["wilcoxon_p"] == pytest.approx(2 / 2**6)
    assert found["mcnemar_p"] == 1
    assert statistics.paired(wins, wins)["wilcoxon_p"] == 1
    assert statistics.paired([1, 0, 1], [0, 0, 1])["wilcoxon_p"] == 1  # one difference
    with pytest.raises(ValueError):
        statistics.paired([1, 0], [1])


def test_paired_level_and_symmetry():
    """False rejections are as rare as they should be. The order of the methods does not matter."""
    rng = np.random.default_rng(0)
    wins = rng.choice([0, 0.5, 1], size=(400, 2, 60))
    found = [statistics.paired(a, b) for a, b in wins]
    for name in ("wilcoxon_p", "mcnemar_p"):
        assert np.mean([result[name] < 0.05 for result in found]) <= 0.075
    swapped = statistics.paired(wins[0, 1], wins[0, 0])
    assert swapped["wilcoxon_p"] == pytest.approx(found[0]["wilcoxon_p"])
    assert swapped["mcnemar_p"] == pytest.approx(found[0]["mcnemar_p"])


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1, 1]
    assert statistics.holm([0.2]) == [0.2]
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_properties(pvalues):
    """It raises p-values, keeps their order, and corrects the smallest as Bonferroni does."""
    corrected = statistics.holm(pvalues)
    for p, corrected_p in zip(pvalues, corrected, strict=True):
        assert p <= corrected_p <= 1
    in_order_of_p = [corrected_p for _, corrected_p in sorted(zip(pvalues, corrected))]
    assert in_order_of_p == sorted(corrected)
    if pvalues:
        assert min(corrected) == min(1, len(pvalues) * min(pvalues))


def test_equivalent():
    """The larger p-value of two one-sided t-tests."""
    rng = np.random.default_rng(0)
    a = rng.normal(0.01, 0.1, 50)
    b = rng.normal(0, 0.1, 50)
    found = statistics.equivalent(a, b, 0.05)
    differences = a - b
    standard_error = differences.std(ddof=1) / math.sqrt(50)
    p_below = stats.t.cdf((differences.mean() - 0.05) / standard_error, 49)
    p_above = stats.t.sf((differences.mean() + 0.05) / standard_error, 49)
    assert found["p"] == pytest.approx(max(p_below, p_above))
    assert found["difference"] == pytest.approx(differences.mean())
    assert statistics.equivalent(b, a, 0.05)["p"] == pytest.approx(found["p"])
    # That no difference is found with few prompts does not show equivalence.
    assert statistics.equivalent([1, 0, 1, 0, 1], [0, 1, 1, 0, 1])["p"] > 0.3


@pytest.mark.parametrize("size", [2, 20, 500])
def test_equivalent_interval(size):
    """p < 0.05 exactly if the 90% interval lies within the margin."""
    rng = np.random.default_rng(size)
    for _ in range(20):
        a, b = rng.normal(0, 0.3, (2, size)) * rng.choice([0.01, 0.3, 1])
        found = statistics.equivalent(a, b)
        is_within = -0.05 < found["low"] and found["high"] < 0.05
        assert (found["p"] < 0.05) == is_within


def test_equivalent_without_variance():
    assert statistics.equivalent([1, 0, 0.5], [1, 0, 0.5])["p"] == 0
    assert statistics.equivalent([1, 1], [0, 0])["p"] == 1
    assert statistics.equivalent([1], [1])["p"] == 1


def test_prompts_needed():
    # (1.6449 + 1.2816)^2 = 8.564; times (0.5 / 0.05)^2 = 856.4.
    assert statistics.prompts_needed(0.5, 0.05, 0.8) == 857
    assert statistics.prompts_needed(0.5, 0.025, 0.8) == 3426
    assert statistics.prompts_needed(0) == 2
    rng = np.random.default_rng(0)
    a, b = rng.choice([0, 0.5, 1], size=(2, 600, statistics.prompts_needed(0.577, 0.05, 0.8)))
    assert share_equivalent(a, b) == pytest.approx(0.8, abs=0.05)
    # If the means differ by the margin, one in twenty is found to be equivalent.
    a = (rng.random((600, 400)) < 0.55).astype(float)
    b = (rng.random((600, 400)) < 0.50).astype(float)
    assert share_equivalent(a, b) < 0.08
    for bad in ({"margin": 0}, {"power": 1}, {"level": 0}, {"sd": math.nan}):
        with pytest.raises(ValueError):
            statistics.prompts_needed(**{"sd": 0.5, **bad})


def share_equivalent(a: np.ndarray, b: np.ndarray) -> float:
    """In what share of the rows of a and b equivalence is found."""
    is_found = [statistics.equivalent(row_a, row_b)["p"] < 0.05 for row_a, row_b in zip(a, b)]
    return np.mean(is_found)


def test_compare():
    rng = np.random.default_rng(0)
    wins = {name: rng.choice([0, 0.5, 1], 40) for name in "abc"}
    wins["b"][:25] = 1
    methods = {"a": {}, "b": {}, "c": {}, "alone": {"another prompt": (1, 1)}}
    for name in "abc":
        num_prompts = 30 if name == "c" else 40
        for prompt in range(num_prompts):
            win = wins[name][prompt]
            methods[name][prompt] = (win, 2 * win)
    pairs = statistics.compare(methods)
    names_and_prompts = [(pair["a"] + pair["b"], pair["n"]) for pair in pairs]
    assert names_and_prompts == [("ab", 40), ("ac", 30), ("bc", 30)]
    for name in ("wilcoxon_p", "mcnemar_p", "par_p"):  # corrected over the pairs
        pvalues = [pair[name] for pair in pairs]
        assert [pair[f"{name}_holm"] for pair in pairs] == statistics.holm(pvalues)
        assert pvalues != statistics.holm(pvalues)
    alone = statistics.paired(wins["a"][:30], wins["c"][:30])
    assert pairs[1]["wilcoxon_p"] == alone["wilcoxon_p"]
    needed = [statistics.prompts_needed(pair["sd"], level=0.05 / 3) for pair in pairs]
    assert [pair["prompts_needed"] for pair in pairs] == needed
