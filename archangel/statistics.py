"""The statistics of tables and pictures: intervals, standard errors, paired tests, equivalence.

What is counted is `win`, one number a prompt: 1 where the judge takes the reply for better than
the chosen one, 0.5 for a tie, 0 where it takes it for worse. The tests are scipy's.
"""

import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

MARGIN = 0.05  # of win rate, fixed beforehand: two methods closer than this are on a par


def binomial_interval(wins: float, n: int, level: float) -> tuple[float, float]:
    """Wilson's score interval for the win rate `wins / n`, by scipy.

    Its ends are the rates p with |wins / n - p| = z sqrt(p (1 - p) / n), z the normal quantile of
    (1 + level) / 2 (Wilson, 1927, JASA 22). A tie is half a win; where the halves do not add up
    to a whole number, the lower end is that of half a win less, the upper one of half a win more.
    wins: 0 to n. level: 0 to 1, 0.75 in the report. Raises ValueError out of these ranges.
    """
    if not 0 <= wins <= n or not 0 < level < 1:
        raise ValueError(f"{wins} wins of {n}, level {level}: out of range")
    low, high = (stats.binomtest(round_(wins), n) for round_ in (math.floor, math.ceil))
    return (
        float(low.proportion_ci(level, method="wilson").low),
        float(high.proportion_ci(level, method="wilson").high),
    )


def bootstrap_se(values: ArrayLike, resamples: int = 2000, seed: int = 0) -> float:
    """Bootstrap standard error of the mean, clustered by prompt, with seeds nested in prompts.

    values: (prompts,) or (seeds, prompts). Prompts are drawn with replacement, each with all of
    its seeds. To draw among its seeds as well would count their noise twice (Davison and Hinkley,
    1997, Bootstrap Methods and their Application, section 3.8). It says how far other prompts
    would move the mean, not how far another training seed would: see the spread of the seeds
    for that. Not a number where there is one prompt.
    """
    prompts = np.atleast_2d(np.asarray(values, float)).mean(0)
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

    `wilcoxon_p`: Wilcoxon's signed-rank test on the judge's scores (on wins where there are
    none), equal scores dropped. `mcnemar_p`: McNemar's exact test on wins, a tie being none: of
    the prompts that one method alone wins (`only_a`, `only_b`), half should be each one's, so
    only_a is binomial(only_a + only_b, 1/2). Both are 1 where nothing differs.
    """
    wins_a, wins_b = _same_length(wins_a, wins_b)
    if scores_a is None or scores_b is None:
        scores_a, scores_b = wins_a, wins_b
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

    The k-th smallest of m (k from 0) becomes the largest so far of min(1, (m - k) p). To reject
    where the result is at most 0.05 errs anywhere in the family with a chance of at most 0.05.
    """
    corrected = [0.0] * len(pvalues)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        corrected[i] = largest
    return corrected


def equivalent(a: ArrayLike, b: ArrayLike, margin: float = MARGIN) -> dict[str, float]:
    """Whether the means of a and b, paired, (n,) each, differ by less than `margin`.

    Two one-sided paired t-tests (Schuirmann, 1987, J. Pharmacokinet. Biopharm. 15): against a
    difference of -margin or less and against one of +margin or more; `p` is the larger of the
    two p-values. It is below 0.05 where the 90% interval of the difference, `low` to `high`, lies
    within the margin. Also `difference` (mean of a - b) and `sd` of a - b, which sets how many
    prompts are needed. One prompt shows nothing: p = 1.
    """
    a, b = _same_length(a, b)
    differences = a - b
    mean, n = float(differences.mean()), len(differences)
    if n < 2:
        return {"difference": mean, "sd": math.nan, "low": -math.inf, "high": math.inf, "p": 1.0}
    sd = float(differences.std(ddof=1))
    if sd == 0:  # every prompt says the same, for instance of a model and itself
        p = float(abs(mean) >= margin)
        return {"difference": mean, "sd": sd, "low": mean, "high": mean, "p": p}
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    low, high = stats.t.interval(0.9, n - 1, mean, sd / math.sqrt(n))
    p = float(max(above, below))
    return {"difference": mean, "sd": sd, "low": float(low), "high": float(high), "p": p}


def not_below(a: ArrayLike, b: ArrayLike, margin: float = MARGIN) -> float:
    """p-value of a one-sided paired t-test that mean(a) is not `margin` or more below mean(b).

    a, b: (n,) each, in one order. The null hypothesis is a difference of -margin or less; below
    0.05 where the lower end of the 90% interval of the difference lies above -margin. One prompt
    shows nothing: p = 1.
    """
    a, b = _same_length(a, b)
    differences = a - b
    if len(differences) < 2:
        return 1.0
    if differences.std() == 0:  # every prompt says the same
        return float(differences[0] <= -margin)
    return float(stats.ttest_1samp(differences, -margin, alternative="greater").pvalue)


def prompts_needed(
    sd: float, margin: float = MARGIN, power: float = 0.8, level: float = 0.05
) -> int:
    """How many prompts `equivalent` needs to find p < level with a chance of `power`.

    n = ((z(1 - level) + z((1 + power) / 2)) sd / margin)^2, z the normal quantile, for two
    methods that do not differ at all (Julious, 2004, Statistics in Medicine 23); ones
    that do differ a little need more. sd: of the paired differences. Raises ValueError for a
    setting out of range.
    """
    if not (sd >= 0 and margin > 0 and 0 < power < 1 and 0 < level < 1):
        raise ValueError(f"sd {sd}, margin {margin}, power {power}, level {level}: out of range")
    quantiles = stats.norm.ppf(1 - level) + stats.norm.ppf((1 + power) / 2)
    return max(2, math.ceil((quantiles * sd / margin) ** 2))


def summarise(wins: Sequence[float]) -> dict:
    """What a table says of one method: `wins` (1, 0.5 or 0) on n prompts, n at least 1.

    Prompts, wins, ties and losses; the win rate minus one half with its 75% and 95% intervals and
    its bootstrap standard error.
    """
    n = len(wins)
    intervals = {
        f"interval_{level}": [end - 0.5 for end in binomial_interval(sum(wins), n, level / 100)]
        for level in (75, 95)
    }
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
    """Every two methods (name to prompt to (win, score)) on the prompts that both have.

    For each pair, `a` and `b`: what `paired` and `equivalent` find (`par_p`, `interval_90`), each
    p-value also corrected over the pairs (`..._p_holm`), and `prompts_needed` to show, so
    corrected, that two methods are on a par whose paired differences vary as much as these do.
    Pairs with fewer than two prompts in common are left out.
    """
    pairs = []
    for a, b in itertools.combinations(methods, 2):
        shared = [prompt for prompt in methods[a] if prompt in methods[b]]
        if len(shared) < 2:
            continue
        wins_a, scores_a = zip(*(methods[a][prompt] for prompt in shared))
        wins_b, scores_b = zip(*(methods[b][prompt] for prompt in shared))
        par = equivalent(wins_a, wins_b)
        pairs.append(
            {
                "a": a,
                "b": b,
                "n": len(shared),
                "difference": par["difference"],
                "interval_90": [par["low"], par["high"]],
                "sd": par["sd"],
                "par_p": par["p"],
                **paired(wins_a, wins_b, scores_a, scores_b),
            }
        )
    for key in ("wilcoxon_p", "mcnemar_p", "par_p"):
        for pair, p in zip(pairs, holm([pair[key] for pair in pairs])):
            pair[f"{key}_holm"] = p
    for pair in pairs:  # the smallest p-value of m is corrected by m: enough for any of them
        pair["prompts_needed"] = prompts_needed(pair["sd"], level=0.05 / len(pairs))
    return pairs


def _same_length(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float arrays; ValueError unless they are (n,) alike, n at least 1."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"shapes {a.shape} and {b.shape}: must be (n,), one number a prompt")
    return a, b
