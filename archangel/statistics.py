"""The statistics of tables and figures: intervals, standard errors, paired tests, equivalence.

The data are wins, one number per prompt: 1 if the judge prefers the reply to the chosen one, 0.5
for a tie, 0 if it prefers the chosen one. The tests are scipy's.
"""

import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

MARGIN = 0.05  # of win rate, fixed beforehand: two methods closer than this are equivalent


def binomial_interval(wins: float, n: int, level: float) -> tuple[float, float]:
    """Wilson's score interval for the win rate `wins / n`, by scipy.

    Its ends are the rates p with |wins / n - p| = z sqrt(p (1 - p) / n), where z is the normal
    quantile of (1 + level) / 2 (Wilson, 1927, JASA 22). A tie is half a win. If `wins` is not a
    whole number, it is rounded down for the lower end and up for the upper end.

    Args:
        wins: 0 to n.
        level: 0 to 1; 0.75 in the report.
    Raises:
        ValueError: if either is out of its range.
    """
    if not 0 <= wins <= n or not 0 < level < 1:
        raise ValueError(f"{wins} wins of {n}, level {level}: out of range")
    rounded_down = stats.binomtest(math.floor(wins), n).proportion_ci(level, method="wilson")
    rounded_up = stats.binomtest(math.ceil(wins), n).proportion_ci(level, method="wilson")
    return float(rounded_down.low), float(rounded_up.high)


def bootstrap_se(values: ArrayLike, resamples: int = 2000, seed: int = 0) -> float:
    """Bootstrap standard error of the mean, clustered by prompt, with seeds nested in prompts.

    Prompts are drawn with replacement, each with all of its seeds. Drawing among the seeds as well
    would count their noise twice (Davison and Hinkley, 1997, Bootstrap Methods and their
    Application, section 3.8). The result tells how much the mean varies with the choice of
    prompts. How much it varies with the training seed is the spread of the seeds.

    values: (prompts,) or (seeds, prompts). Returns nan for a single prompt.
    """
    prompts = np.atleast_2d(np.asarray(values, float)).mean(axis=0)
    if prompts.size < 2:
        return math.nan
    drawn = stats.bootstrap(
        (prompts,),
        np.mean,
        n_resamples=resamples,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(drawn.standard_error)


def paired(
    wins_a: ArrayLike,
    wins_b: ArrayLike,
    scores_a: ArrayLike | None = None,
    scores_b: ArrayLike | None = None,
) -> dict[str, float]:
    """Two-sided paired tests of two methods on the same prompts, in the same order, (n,) each.

    Returns:
        wilcoxon_p: of Wilcoxon's signed-rank test on the judge's scores; on wins, if scores are
            not given. Equal scores are dropped.
        mcnemar_p: of McNemar's exact test on wins; a tie is no win. Under its null hypothesis
            only_a is binomial(only_a + only_b, 1/2).
        only_a, only_b: the number of prompts that one method wins and the other does not.
    Both p-values are 1 if nothing differs.
    """
    wins_a, wins_b = _same_length(wins_a, wins_b)
    if scores_a is None or scores_b is None:
        scores_a = wins_a
        scores_b = wins_b
    scores_a, scores_b = _same_length(scores_a, scores_b)
    only_a = int(((wins_a == 1) & (wins_b != 1)).sum())
    only_b = int(((wins_b == 1) & (wins_a != 1)).sum())
    found = {"wilcoxon_p": 1.0, "mcnemar_p": 1.0, "only_a": only_a, "only_b": only_b}
    if (scores_a != scores_b).any():
        found["wilcoxon_p"] = float(stats.wilcoxon(scores_a, scores_b).pvalue)
    if only_a + only_b:
        found["mcnemar_p"] = float(stats.binomtest(only_a, only_a + only_b).pvalue)
    return found


def holm(pvalues: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in their order (Holm, 1979, Scand. J. Stat. 6).

    The k-th smallest of m (k from 0) becomes min(1, (m - k) p), or the corrected one before it if
    that is larger. If hypotheses are rejected where the result is at most 0.05, the probability of
    one or more false rejections is at most 0.05.
    """
    order = sorted(range(len(pvalues)), key=lambda index: pvalues[index])
    corrected = [0.0] * len(pvalues)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        corrected[index] = largest
    return corrected


def equivalent(a: ArrayLike, b: ArrayLike, margin: float = MARGIN) -> dict[str, float]:
    """Whether the means of a and b, paired, (n,) each, differ by less than `margin`.

    Two one-sided paired t-tests (Schuirmann, 1987, J. Pharmacokinet. Biopharm. 15): one against a
    difference of -margin or less, one against a difference of +margin or more.

    Returns:
        difference: the mean of a - b.
        sd: the standard deviation of a - b, from which prompts_needed follows.
        low, high: the 90% interval of the difference.
        p: the larger of the two p-values. It is below 0.05 if that interval lies within the margin.
            It is 1 for a single prompt.
    """
    a, b = _same_length(a, b)
    differences = a - b
    mean = float(differences.mean())
    n = len(differences)
    if n < 2:
        return {"difference": mean, "sd": math.nan, "low": -math.inf, "high": math.inf, "p": 1.0}
    sd = float(differences.std(ddof=1))
    if sd == 0:  # the same difference for every prompt, as between a model and itself
        p = float(abs(mean) >= margin)
        return {"difference": mean, "sd": sd, "low": mean, "high": mean, "p": p}
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    low, high = stats.t.interval(0.9, n - 1, mean, sd / math.sqrt(n))
    p = float(max(above, below))
    return {"difference": mean, "sd": sd, "low": float(low), "high": float(high), "p": p}


def not_below(a: ArrayLike, b: ArrayLike, margin: float = MARGIN) -> float:
    """p-value of a one-sided paired t-test that mean(a) is not `margin` or more below mean(b).

    The null hypothesis is a difference of -margin or less. The p-value is below 0.05 if the lower
    end of the 90% interval of the difference lies above -margin. It is 1 for a single prompt.

    a, b: (n,) each, in the same order of prompts.
    """
    a, b = _same_length(a, b)
    differences = a - b
    if len(differences) < 2:
        return 1.0
    if differences.std() == 0:  # the same difference for every prompt
        return float(differences[0] <= -margin)
    return float(stats.ttest_1samp(differences, -margin, alternative="greater").pvalue)


def prompts_needed(
    sd: float, margin: float = MARGIN, power: float = 0.8, level: float = 0.05
) -> int:
    """How many prompts `equivalent` needs to find p < level with probability `power`.

    n = ((z(1 - level) + z((1 + power) / 2)) sd / margin)^2, where z is the normal quantile, for
    two methods that do not differ at all (Julious, 2004, Statistics in Medicine 23). Methods that
    differ a little need more.

    sd: standard deviation of the paired differences. Raises ValueError for a setting that is out
    of range.
    """
    if not (sd >= 0 and margin > 0 and 0 < power < 1 and 0 < level < 1):
        raise ValueError(f"sd {sd}, margin {margin}, power {power}, level {level}: out of range")
    quantiles = stats.norm.ppf(1 - level) + stats.norm.ppf((1 + power) / 2)
    return max(2, math.ceil((quantiles * sd / margin) ** 2))


def summarize(wins: Sequence[float]) -> dict:
    """What a table shows of one method.

    Prompts, wins, ties and losses; the win rate minus one half with its 75% and 95% intervals and
    its bootstrap standard error.

    wins: (n,) of 1, 0.5 or 0; n at least 1.
    """
    n = len(wins)
    intervals = {}
    for level in (75, 95):
        low, high = binomial_interval(sum(wins), n, level / 100)
        intervals[f"interval_{level}"] = [low - 0.5, high - 0.5]
    return {
        "n": n,
        "wins": sum(win == 1 for win in wins),
        "ties": sum(win == 0.5 for win in wins),
        "losses": sum(win == 0 for win in wins),
        "win_rate_minus_half": sum(wins) / n - 0.5,
        **intervals,
        "bootstrap_se": bootstrap_se(wins),
    }


def compare(methods: dict[str, dict[Hashable, tuple[float, float]]]) -> list[dict]:
    """Compare every two methods on the prompts that both have.

    Pairs with fewer than two prompts in common are left out.

    Args:
        methods: name to prompt to (win, score).
    Returns:
        For each pair of methods, `a` and `b`, the results of `paired` and of `equivalent` (`par_p`,
        `interval_90`). Each p-value is also corrected over the pairs (`..._p_holm`).
        `prompts_needed` is the number of prompts that would show equivalence at the corrected
        level, if the methods did not differ and the paired differences varied as they do here.
    """
    pairs = []
    for a, b in itertools.combinations(methods, 2):
        shared = [prompt for prompt in methods[a] if prompt in methods[b]]
        if len(shared) < 2:
            continue
        wins_a = [methods[a][prompt][0] for prompt in shared]
        wins_b = [methods[b][prompt][0] for prompt in shared]
        scores_a = [methods[a][prompt][1] for prompt in shared]
        scores_b = [methods[b][prompt][1] for prompt in shared]
        equivalence = equivalent(wins_a, wins_b)
        pairs.append(
            {
                "a": a,
                "b": b,
                "n": len(shared),
                "difference": equivalence["difference"],
                "interval_90": [equivalence["low"], equivalence["high"]],
                "sd": equivalence["sd"],
                "par_p": equivalence["p"],
                **paired(wins_a, wins_b, scores_a, scores_b),
            }
        )
    for name in ("wilcoxon_p", "mcnemar_p", "par_p"):
        corrected = holm([pair[name] for pair in pairs])
        for pair, p in zip(pairs, corrected):
            pair[f"{name}_holm"] = p
    for pair in pairs:
        # Holm's correction multiplies the smallest of m p-values by m, and the others by less.
        pair["prompts_needed"] = prompts_needed(pair["sd"], level=0.05 / len(pairs))
    return pairs


def _same_length(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float arrays. Raises ValueError unless both are (n,), n at least 1."""
    a = np.asarray(a, float)
    b = np.asarray(b, float)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"shapes {a.shape} and {b.shape}: must be (n,), one number per prompt")
    return a, b
