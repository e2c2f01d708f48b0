"""Claims of the report and of the KTO paper, each a contrast with a test and a rule for it.

The tests, the margin and the rules below were fixed before any result. Some claims were added or
reworded after first results on the toy were known: those on the value function, on dropped
examples, on one reply per prompt and on the chosen reply. A contrast is a weighted sum of the means
of several methods on the same prompts. There are three kinds of claims:

    above      holds if Wilcoxon's signed-rank test over prompts has p < 0.05, the 95% interval of
               the contrast lies above 0, and the contrast of every seed does too. It does not hold
               if all of that is true with the opposite sign.
    equivalent holds if two one-sided t-tests over prompts show that the contrast is
               within the margin, p < 0.05. It does not hold if the 95% interval lies outside the
               margin.
    not below  holds if a one-sided t-test over prompts shows that the contrast is above minus the
               margin, p < 0.05. It does not hold if the 95% interval lies below minus the margin.

Otherwise the outcome is "cannot tell". The margin is 0.05 of win rate. p-values are corrected for
the number of claims (Holm). Each prompt's values are first averaged over seeds, so that tests and
intervals are over prompts, not over replies.
"""

import dataclasses

import numpy as np
from scipy import stats

from archangel import statistics

NAMES = {"sft": "SFT", "slic": "SLiC", "dpo": "DPO", "ppo": "PPO", "kto": "KTO", "base": "base"}
Table = dict[str, dict[int, np.ndarray]]  # arm to seed to (prompts,)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim about a contrast of arms: the sum over arms of weight times mean."""

    text: str
    who: str  # whose claim it is
    where: str  # in which section or experiment
    weights: dict[str, float]  # arm to weight
    kind: str = "above"  # above, equivalent, not below
    # win: win rate. win_less_half: the same, less 0.5. tokens: of a reply. majority: the
    # probability of the majority's reply, less 0.5
    measure: str = "win"


def name_of(arm: str) -> str:
    """The name of an arm as people write it: SFT+KTO for sft+kto, KTO (kl zero) for kto_kl_zero."""
    method, _, variant = arm.partition("_")
    name = "+".join(NAMES[part] for part in method.split("+"))
    if variant:
        name += f" ({variant.replace('_', ' ')})"
    return name


def contrast(weights: dict[str, float]) -> str:
    """A contrast in words: SFT - 0.5 base for {"sft": 1.0, "base": -0.5}."""
    words = []
    for arm, weight in weights.items():
        if weight < 0:
            words.append("-")
        elif words:
            words.append("+")
        if abs(weight) != 1:
            words.append(f"{abs(weight):g}")
        words.append(name_of(arm))
    return " ".join(words)


REPORT = "report"
PAPER = "KTO paper"  # known from secondary sources; its full text was not at hand
NOBODY = "nobody"  # tested for comparison


def claims_of_report() -> list[Claim]:
    """The claims that need only the eight methods, in the report's order.

    Many are about certain sizes of models, which `where` says.
    """
    claims = []
    # Section 3.4 is about the methods before KTO. Two of its claims are also tested of KTO.
    sources = {
        "dpo": (REPORT, "section 3.4, item 1, below 30B"),
        "ppo": (REPORT, "section 3.4, item 1, below 30B"),
        "kto": (NOBODY, "section 3.4 says it of the methods before KTO"),
    }
    for loss, source in sources.items():
        both = f"sft+{loss}"
        text = f"Most of the gain of {name_of(both)} comes from SFT"
        claims.append(Claim(text, *source, {"sft": 1.0, "base": -0.5, both: -0.5}))
    weights = {"base": 1.0, "sft": -1.0}
    source = (REPORT, "section 3.4, item 4")
    claims.append(Claim("SFT shortens replies", *source, weights, measure="tokens"))
    sources = {
        "dpo": (REPORT, "section 3.4, item 2, below 7B"),
        "ppo": (REPORT, "section 3.4, item 2, below 7B"),
        "kto": (NOBODY, "section 3.4 says it of the methods before KTO"),
    }
    for loss, source in sources.items():
        both = f"sft+{loss}"
        text = f"{name_of(both)} adds little to SFT"
        claims.append(Claim(text, *source, {both: 1.0, "sft": -1.0}, "equivalent"))
    source = (REPORT, "section 3.4, item 3, below 30B")
    for before in ("", "sft+"):
        ppo = f"{before}ppo"
        dpo = f"{before}dpo"
        text = f"Offline {name_of(ppo)} with dummy rewards does as well as {name_of(dpo)}"
        claims.append(Claim(text, *source, {ppo: 1.0, dpo: -1.0}, "equivalent"))
    source = (REPORT, "section 3.4, item 4")
    for loss in ("ppo", "dpo"):
        text = f"{name_of(loss)} does better after SFT"
        claims.append(Claim(text, *source, {f"sft+{loss}": 1.0, loss: -1.0}))
    source = (REPORT, "section 5, item 2, all sizes")
    text = "SFT+KTO does as well as SFT+DPO"
    claims.append(Claim(text, *source, {"sft+kto": 1.0, "sft+dpo": -1.0}, "equivalent"))
    source = (REPORT, "section 5, item 3, at 13B and 30B")
    claims.append(Claim("KTO alone beats DPO alone", *source, {"kto": 1.0, "dpo": -1.0}))
    source = (REPORT, "section 5, item 3, Llama-30B")
    text = "KTO alone does as well as SFT+KTO or better"
    claims.append(Claim(text, *source, {"kto": 1.0, "sft+kto": -1.0}, "not below"))
    for arm in ("kto", "sft+kto"):
        text = f"{name_of(arm)} is as good as the reply that people chose, or better"
        where = "section 5, item 1, at 13B and more"
        claims.append(Claim(text, REPORT, where, {arm: 1.0}, "not below", "win_less_half"))
    return claims


def claims_of_ablations(wins: Table) -> list[Claim]:
    """The claims about KTO's settings, and about the beta of DPO."""
    claims = []
    for method in ("sft+kto", "sft+dpo"):
        other_betas = [arm for arm in wins if arm.startswith(f"{method}_beta")]
        if other_betas:
            # 0.1 is from the authors' code. The best other value is chosen on the prompts that are
            # tested, which favors it.
            best = max(other_betas, key=lambda arm: np.mean(list(wins[arm].values())))
            text = (
                f"The same beta suits KTO and DPO: {name_of(method)} at 0.1 does as well as at the "
                "best other value"
            )
            weights = {method: 1.0, best: -1.0}
            claims.append(Claim(text, REPORT, "section 6", weights, "not below"))
    weights = {"kto_groups": 1.0, "kto": -1.0}
    # Here: reference points of groups of 4 examples, in a batch of 32.
    text = "KTO is stable with 4 examples per GPU, at a batch of 32"
    claims.append(Claim(text, REPORT, "section 5", weights, "not below"))

    where = "ablation of the value function"
    for method, data in (("kto", "the toy's replies"), ("kto_greeting", "replies with a greeting")):
        text = f"Without a reference point KTO is worse ({data})"
        claims.append(Claim(text, PAPER, where, {method: 1.0, f"{method}_kl_zero": -1.0}))
    for value, name in (("identity", "the identity"), ("log_sigmoid", "log sigmoid")):
        text = f"With {name} in the place of the sigmoid KTO is worse"
        claims.append(Claim(text, PAPER, where, {"kto": 1.0, f"kto_{value}": -1.0}))
    text = "KTO on one reply per prompt beats DPO on pairs"
    weights = {"kto_one_reply": 1.0, "dpo_2_epochs": -1.0}
    claims.append(Claim(text, PAPER, "one reply per prompt", weights))
    claims.extend(claims_of_dropped_examples())
    return claims


def claims_of_dropped_examples() -> list[Claim]:
    """KTO without most examples of one class, against DPO on all pairs, at equal steps.

    The paper's own batches have the classes of the data, and its weights balance them. kto.py's
    batches are half and half.
    """
    sources = {
        "desirable": (PAPER, "up to 90% of the desirable examples dropped"),
        "undesirable": (NOBODY, "the paper says it of desirable examples"),
    }
    forms = {
        "_as_data": "as claimed: the data's class ratio, the paper's weights and reference point",
        "": "batches half and half",
        "_weighted": "batches half and half, weights 4/3",
    }
    claims = []
    for of_class, source in sources.items():
        for form, words in forms.items():
            for percent in (50, 75, 90):
                text = f"KTO without {percent}% of the {of_class} examples beats DPO ({words})"
                arm = f"kto_{of_class}_{percent}_dropped{form}"
                claims.append(Claim(text, *source, {arm: 1.0, "dpo_2_epochs": -1.0}))
    return claims


def claims_of_contradictory_labels(
    contradictory: dict[str, tuple[float, str]], gap: float
) -> list[Claim]:
    """Where DPO's optimum sides with the minority, DPO does so, and KTO sides with the majority.

    contradictory: arm to (share of labels that agree, loss). gap: see optimum_of_dpo.
    """
    claims = []
    for arm, (majority, loss) in contradictory.items():
        if majority > 0.5 and optimum_of_dpo(majority, gap) < 0.5:
            if loss == "kto":
                side = "majority"
                weight = 1.0
            else:
                side = "minority"
                weight = -1.0
            text = f"With {majority:.0%} for one reply, {NAMES[loss]} sides with the {side}"
            where = "theorem on contradictory preferences"
            claims.append(Claim(text, PAPER, where, {arm: weight}, "above", "majority"))
    return claims


def optimum_of_dpo(
    majority: np.ndarray | float, gap: float, beta: float = 0.1
) -> np.ndarray | float:
    """pi(majority's reply) / (pi(majority's reply) + pi(minority's reply)) at DPO's optimum.

    If a share p of the labels agree, DPO's loss is least where the log-odds of the two replies have
    moved by log(p / (1 - p)) / beta from the base model's, which are -gap.

    Args:
        majority: p, a number or an array.
        gap: the base model's log p(minority's reply) - log p(majority's reply), in nats, the mean
            over prompts.
        beta: that of the trained arms.
    Returns:
        Shares, in the shape of majority.
    """
    return 1 / (1 + np.exp(gap - np.log(majority / (1 - majority)) / beta))


# ---------------------------------------------------------------------------------- tests and rules


def interval(values: np.ndarray, level: float) -> list[float]:
    """Interval of the mean of values (seeds, prompts), from their bootstrap standard error."""
    half_width = stats.norm.ppf((1 + level) / 2) * statistics.bootstrap_se(values)
    return [float(values.mean() - half_width), float(values.mean() + half_width)]


def win_interval(wins: np.ndarray, level: float) -> list[float]:
    """Interval of the win rate minus one half, of wins (seeds, prompts).

    For a single seed it is the report's binomial interval.
    """
    if len(wins) > 1:
        return interval(wins - 0.5, level)
    low, high = statistics.binomial_interval(wins.sum(), wins.size, level)
    return [low - 0.5, high - 0.5]


def seeds_of(claim: Claim, table: Table) -> list[int]:
    """The seeds that all arms of a claim have. None, if an arm is missing."""
    seeds_of_arms = [set(table.get(arm, ())) for arm in claim.weights]
    return sorted(set.intersection(*seeds_of_arms))


def examine(claim: Claim, table: Table) -> dict:
    """The record of a claim: effect, 95% interval, p-value, and the effect of each seed.

    table: values of the claim's measure, (prompts,) in the same order for all arms and seeds.
    """
    seeds = seeds_of(claim, table)
    values = 0.0  # of the contrast, (seeds, prompts)
    for arm, weight in claim.weights.items():
        values = values + weight * np.stack([table[arm][seed] for seed in seeds])
    mean_over_seeds = values.mean(axis=0)  # (prompts,)
    zeros = np.zeros_like(mean_over_seeds)
    if claim.kind == "above":
        test = "Wilcoxon"
        p = statistics.paired(mean_over_seeds, zeros)["wilcoxon_p"]
    elif claim.kind == "equivalent":
        test = "two one-sided t"
        p = statistics.equivalent(mean_over_seeds, zeros)["p"]
    else:
        test = "one-sided t"
        p = statistics.not_below(mean_over_seeds, zeros)
    return {
        "claim": claim.text,
        "who": claim.who,
        "where": claim.where,
        "contrast": contrast(claim.weights),
        "kind": claim.kind,
        "measure": claim.measure,
        "test": test,
        "effect": float(values.mean()),
        "interval_95": interval(values, 0.95),
        "p": p,
        "by_seed": [float(mean) for mean in values.mean(axis=1)],
        "prompts": values.shape[1],
    }


def decide(record: dict) -> str:
    """The outcome of a claim, from its record and the rules above."""
    low, high = record["interval_95"]
    seeds = record["by_seed"]
    margin = statistics.MARGIN
    is_significant = record["p_holm"] < 0.05
    if record["kind"] == "above":
        holds = is_significant and low > 0 and min(seeds) > 0
        fails = is_significant and high < 0 and max(seeds) < 0
    elif record["kind"] == "equivalent":
        holds = is_significant
        fails = low > margin or high < -margin
    else:
        holds = is_significant
        fails = high < -margin
    if holds:
        return "holds"
    if fails:
        return "does not hold"
    return "cannot tell"


def examine_all(
    tables: dict[str, dict[str, Table]], claims_of_models: dict[str, list[Claim]]
) -> list[dict]:
    """The records of all claims whose arms have results, their p-values corrected together.

    Args:
        tables: model to measure to table.
        claims_of_models: model to claims.
    """
    records = []
    for model, claims in claims_of_models.items():
        for claim in claims:
            table = tables[model].get(claim.measure, {})
            if seeds_of(claim, table):
                records.append({"model": model, **examine(claim, table)})
    return conclude(records)


def conclude(records: list[dict]) -> list[dict]:
    """Add to each record what depends on all of them: the corrected p-value, and the outcome.

    A claim of equivalence also gets `prompts_needed`: the number of prompts that would show it at
    the corrected level, if the methods did not differ and the contrast varied from prompt to prompt
    as it does here.
    """
    corrected = statistics.holm([record["p"] for record in records])
    for record, p in zip(records, corrected):
        record["p_holm"] = p
        record["outcome"] = decide(record)
        if record["kind"] == "equivalent":
            low, high = record["interval_95"]
            standard_error = (high - low) / 2 / stats.norm.ppf(0.975)
            sd = standard_error * np.sqrt(record["prompts"])
            level = 0.05 / len(records)
            record["prompts_needed"] = statistics.prompts_needed(sd, level=level)
    return records
