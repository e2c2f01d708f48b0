"""Statistics against hand-computed values, scipy, and simulations with fixed seeds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from archangel import statistics


def test_interval_is_wilsons():
    # Whole wins: scipy's. By hand for 8 of 10 at 95%, z = 1.96: centre 0.7168, half width 0.2265.
    low, high = statistics.binomial_interval(8, 10, 0.95)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert statistics.binomial_interval(0, 10, 0.95)[0] == 0
    assert statistics.binomial_interval(10, 10, 0.95)[1] == 1
    # Half a win widens both ends outwards.
    assert statistics.binomial_interval(8.5, 10, 0.75) == (
        statistics.binomial_interval(8, 10, 0.75)[0],
        statistics.binomial_interval(9, 10, 0.75)[1],
    )
    for wins, n, level in ((11, 10, 0.75), (-1, 10, 0.75), (5, 10, 75), (math.nan, 10, 0.75)):
        with pytest.raises(ValueError):
            statistics.binomial_interval(wins, n, level)


@given(st.integers(1, 300), st.data())
def test_wider_level_holds_the_narrower(n, data):
    wins = data.draw(st.integers(0, 2 * n)) / 2
    low, high = statistics.binomial_interval(wins, n, 0.75)
    lower, higher = statistics.binomial_interval(wins, n, 0.95)
    assert 0 <= lower <= low <= wins / n <= high <= higher <= 1


@pytest.mark.parametrize("level", [0.75, 0.95])
def test_interval_covers_as_often_as_it_says(level):
    rng = np.random.default_rng(0)
    drawn = rng.choice([0, 0.5, 1], p=[0.3, 0.2, 0.5], size=(1000, 100)).sum(1)  # rate 0.6
    intervals = [statistics.binomial_interval(wins, 100, level) for wins in drawn]
    covered = np.mean([low <= 0.6 <= high for low, high in intervals])
    assert level <= covered <= level + 0.15  # ties vary less than wins and losses do


def test_bootstrap_of_one_seed_is_the_usual_standard_error():
    wins = np.random.default_rng(0).choice([0, 0.5, 1], size=400)
    expected = wins.std() / math.sqrt(400)
    assert statistics.bootstrap_se(wins) == pytest.approx(expected, rel=0.05)
    assert statistics.bootstrap_se(wins[None]) == statistics.bootstrap_se(wins)
    assert math.isnan(statistics.bootstrap_se([1.0]))


def test_bootstrap_is_clustered_by_prompt():
    # Prompts of sd 0.4, seeds' noise of sd 0.3 in them: Var(mean) = (0.16 + 0.09 / 4) / 200.
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 0.4, (500, 1, 200))
    values = prompts + rng.normal(0, 0.3, (500, 4, 200))
    expected = math.sqrt((0.16 + 0.09 / 4) / 200)
    assert values.mean((1, 2)).std() == pytest.approx(expected, rel=0.05)
    found = [statistics.bootstrap_se(v, resamples=300) for v in values[:20]]
    assert np.mean(found) == pytest.approx(expected, rel=0.05)
    # The same reply from every seed is no new evidence.
    one = values[0, 0]
    assert statistics.bootstrap_se([one] * 4) == pytest.approx(statistics.bootstrap_se(one))


def test_mcnemar_by_hand():
    # a alone wins 5, b alone 1; a tie is not a win; both or neither do not count.
    a = [1, 1, 1, 1, 1, 0.0, 1, 0.5, 0]
    b = [0, 0, 0.5, 0, 0, 1.0, 1, 0.5, 0.5]
    found = statistics.paired(a, b)
    assert (found["only_a"], found["only_b"]) == (5, 1)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 6) / 2**6)


def test_wilcoxon_is_on_scores_where_there_are_some():
    wins = [0.5] * 6
    # All six differences of one sign and of different size: p = 2 / 2^6.
    found = statistics.paired(wins, wins, [1, 2, 3, 4, 5, 6], [0] * 6)
    assert found["wilcoxon_p"] == pytest.approx(2 / 2**6)
    assert found["mcnemar_p"] == 1
    assert statistics.paired(wins, wins)["wilcoxon_p"] == 1
    assert statistics.paired([1, 0, 1], [0, 0, 1])["wilcoxon_p"] == 1  # one difference
    with pytest.raises(ValueError):
        statistics.paired([1, 0], [1])


def test_paired_tests_are_alike_both_ways_and_hold_their_level():
    rng = np.random.default_rng(0)
    wins = rng.choice([0, 0.5, 1], size=(400, 2, 60))
    found = [statistics.paired(a, b) for a, b in wins]
    for key in ("wilcoxon_p", "mcnemar_p"):
        assert np.mean([p[key] < 0.05 for p in found]) <= 0.075
    turned = statistics.paired(wins[0, 1], wins[0, 0])
    assert turned["wilcoxon_p"] == pytest.approx(found[0]["wilcoxon_p"])
    assert turned["mcnemar_p"] == pytest.approx(found[0]["mcnemar_p"])


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1, 1]
    assert statistics.holm([0.2]) == [0.2]
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_the_p_value_and_bonferroni(pvalues):
    corrected = statistics.holm(pvalues)
    for p, q in zip(pvalues, corrected, strict=True):
        assert p <= q <= 1
    assert sorted(corrected) == [q for _, q in sorted(zip(pvalues, corrected))]
    if pvalues:
        assert min(corrected) == min(1, len(pvalues) * min(pvalues))


def test_equivalent_is_two_one_sided_tests():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.01, 0.1, 50), rng.normal(0, 0.1, 50)
    found = statistics.equivalent(a, b, 0.05)
    t = ((a - b).mean() - 0.05) / ((a - b).std(ddof=1) / math.sqrt(50))
    u = ((a - b).mean() + 0.05) / ((a - b).std(ddof=1) / math.sqrt(50))
    assert found["p"] == pytest.approx(max(stats.t.cdf(t, 49), stats.t.sf(u, 49)))
    assert found["difference"] == pytest.approx((a - b).mean())
    assert statistics.equivalent(b, a, 0.05)["p"] == pytest.approx(found["p"])
    # Not to be told apart is not to be on a par: few prompts, no difference found, p large.
    assert statistics.equivalent([1, 0, 1, 0, 1], [0, 1, 1, 0, 1])["p"] > 0.3


@pytest.mark.parametrize("size", [2, 20, 500])
def test_equivalent_where_the_interval_lies_within_the_margin(size):
    rng = np.random.default_rng(size)
    for _ in range(20):
        a, b = rng.normal(0, 0.3, (2, size)) * rng.choice([0.01, 0.3, 1])
        found = statistics.equivalent(a, b)
        assert (found["p"] < 0.05) == (-0.05 < found["low"] and found["high"] < 0.05)


def test_equivalent_where_nothing_varies():
    assert statistics.equivalent([1, 0, 0.5], [1, 0, 0.5])["p"] == 0
    assert statistics.equivalent([1, 1], [0, 0])["p"] == 1
    assert statistics.equivalent([1], [1])["p"] == 1


def test_prompts_needed_gives_that_power():
    # (1.6449 + 1.2816)^2 = 8.564; times (0.5 / 0.05)^2 = 856.4.
    assert statistics.prompts_needed(0.5, 0.05, 0.8) == 857
    assert statistics.prompts_needed(0.5, 0.025, 0.8) == 3426
    assert statistics.prompts_needed(0) == 2
    rng = np.random.default_rng(0)
    a, b = rng.choice([0, 0.5, 1], size=(2, 600, statistics.prompts_needed(0.577, 0.05, 0.8)))
    found = np.mean([statistics.equivalent(x, y)["p"] < 0.05 for x, y in zip(a, b)])
    assert found == pytest.approx(0.8, abs=0.05)
    # At a difference of the margin it errs once in twenty.
    a = (rng.random((600, 400)) < 0.55).astype(float)
    b = (rng.random((600, 400)) < 0.50).astype(float)
    assert np.mean([statistics.equivalent(x, y)["p"] < 0.05 for x, y in zip(a, b)]) < 0.08
    for bad in ({"margin": 0}, {"power": 1}, {"level": 0}, {"sd": math.nan}):
        with pytest.raises(ValueError):
            statistics.prompts_needed(**{"sd": 0.5, **bad})


def test_compare_corrects_over_the_pairs():
    rng = np.random.default_rng(0)
    wins = {name: rng.choice([0, 0.5, 1], 40) for name in "abc"}
    wins["b"][:25] = 1
    methods = {name: {i: (win, 2 * win) for i, win in enumerate(wins[name])} for name in "abc"}
    methods["c"] = {i: methods["c"][i] for i in range(30)}  # the others have ten prompts more
    methods["alone"] = {"elsewhere": (1, 1)}
    pairs = statistics.compare(methods)
    assert [(pair["a"] + pair["b"], pair["n"]) for pair in pairs] == [
        ("ab", 40),
        ("ac", 30),
        ("bc", 30),
    ]
    for key in ("wilcoxon_p", "mcnemar_p", "par_p"):
        pvalues = [pair[key] for pair in pairs]
        assert [pair[f"{key}_holm"] for pair in pairs] == statistics.holm(pvalues)
        assert pvalues != statistics.holm(pvalues)
    alone = statistics.paired(wins["a"][:30], wins["c"][:30])
    assert pairs[1]["wilcoxon_p"] == alone["wilcoxon_p"]
    needed = [statistics.prompts_needed(pair["sd"], level=0.05 / 3) for pair in pairs]
    assert [pair["prompts_needed"] for pair in pairs] == needed
