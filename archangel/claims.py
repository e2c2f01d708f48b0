"""The claims of the report, each a contrast with a test and a rule, fixed before any result.

A contrast is a weighted sum of methods' means on the same prompts. By its kind a claim

    above      holds where Wilcoxon's signed-rank test over prompts has p < 0.05, the 95% interval
               of the contrast lies above 0 and so does every seed; it does not hold where all that
               is so on the other side
    par        holds where two one-sided t-tests over prompts show it within the margin, p < 0.05;
               it does not where the 95% interval lies outside the margin
    not below  holds where a one-sided t-test over prompts shows it above minus the margin,
               p < 0.05; it does not where the 95% interval lies below minus the margin

and otherwise nothing can be told. The margin is 0.05 of win rate. p-values are corrected for the
number of claims (Holm). Seeds are averaged for each prompt first: prompts, not replies, are drawn.
"""

import dataclasses

import numpy as np
from scipy import stats

from archangel import statistics

NAMES = {"sft": "SFT", "slic": "SLiC", "dpo": "DPO", "ppo": "PPO", "kto": "KTO", "base": "base"}
Table = dict[str, dict[int, np.ndarray]]  # arm to seed to one number a prompt


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the report says, as a contrast of arms: the sum of weight times mean."""

    text: str
    weights: dict[str, float]
    kind: str = "above"  # above, par, not below
    measure: str = "win"  # win rate; tokens a reply; majority: its reply's probability minus 0.5


def name_of(arm: str) -> str:
    """sft+kto as SFT+KTO; a variant's name behind it in brackets."""
    method, _, variant = arm.partition("_")
    name = "+".join(NAMES[part] for part in method.split("+"))
    return f"{name} ({variant.replace('_', ' ')})" if variant else name


def contrast(weights: dict[str, float]) -> str:
    """{"sft": 1.0, "base": -0.5} as SFT - 0.5 base."""
    words = []
    for arm, weight in weights.items():
        sign = "-" if weight < 0 else "+" if words else ""
        factor = "" if abs(weight) == 1 else f"{abs(weight):g}"
        words += filter(None, (sign, factor, name_of(arm)))
    return " ".join(words)


def claims_of_report() -> list[Claim]:
    """The claims that need the eight methods alone, in the report's order."""
    made = []
    for loss in ("dpo", "ppo", "kto"):
        both = f"sft+{loss}"
        text = f"Most of the gain of {name_of(both)} comes from SFT"
        made.append(Claim(text, {"sft": 1.0, "base": -0.5, both: -0.5}))
    made.append(Claim("SFT shortens replies", {"base": 1.0, "sft": -1.0}, measure="tokens"))
    for loss in ("dpo", "ppo", "kto"):
        both = f"sft+{loss}"
        text = f"{name_of(both)} adds little to SFT"
        made.append(Claim(text, {both: 1.0, "sft": -1.0}, "par"))
    for before in ("", "sft+"):
        ppo, dpo = f"{before}ppo", f"{before}dpo"
        text = f"Offline {name_of(ppo)} with dummy rewards is on a par with {name_of(dpo)}"
        made.append(Claim(text, {ppo: 1.0, dpo: -1.0}, "par"))
    for loss in ("ppo", "dpo"):
        text = f"{name_of(loss)} does better after SFT"
        made.append(Claim(text, {f"sft+{loss}": 1.0, loss: -1.0}))
    return made + [
        Claim("SFT+KTO is on a par with SFT+DPO", {"sft+kto": 1.0, "sft+dpo": -1.0}, "par"),
        Claim("KTO alone beats DPO alone", {"kto": 1.0, "dpo": -1.0}),
        Claim("KTO alone keeps up with SFT+KTO", {"kto": 1.0, "sft+kto": -1.0}, "not below"),
    ]


def claims_of_ablations(wins: Table) -> list[Claim]:
    """The claims on KTO's settings; beta's own value is held against the best of the others."""
    made = []
    for method in ("sft+kto", "sft+dpo"):
        sweep = [arm for arm in wins if arm.startswith(f"{method}_beta")]
        if sweep:
            best = max(sweep, key=lambda arm: np.mean(list(wins[arm].values())))
            text = f"One beta suits both: {name_of(method)} at 0.1 keeps up with the best other"
            weights = {method: 1.0, best: -1.0}
            made.append(Claim(text, weights, "not below"))
    for text, variant in (
        ("KTO is stable at 4 examples a batch", "kto_batch_size_4"),
        ("KTO is stable with 90% of the desirable rows dropped", "kto_few_desirable"),
    ):
        weights = {variant: 1.0, "kto": -1.0}
        made.append(Claim(text, weights, "not below"))
    return made


def claims_of_theorem(contradictory: dict[str, tuple[float, str]], gap: float) -> list[Claim]:
    """Where DPO's optimum sides with the minority, KTO sides with the majority."""
    made = []
    for arm, (majority, loss) in contradictory.items():
        if majority > 0.5 and optimum_of_dpo(majority, gap) < 0.5:
            side, weight = ("majority", 1.0) if loss == "kto" else ("minority", -1.0)
            text = f"With {majority:.0%} for one reply, {NAMES[loss]} sides with the {side}"
            made.append(Claim(text, {arm: weight}, "above", "majority"))
    return made


def optimum_of_dpo(
    majority: np.ndarray | float, gap: float, beta: float = 0.1
) -> np.ndarray | float:
    """The majority's reply's share of the two at DPO's optimum, where the base has it gap behind.

    DPO's loss on labels of which a share p = majority agree is least where beta times the change
    of the log-odds is log(p / (1 - p)). gap: nats. Shaped as majority.
    """
    return 1 / (1 + np.exp(gap - np.log(majority / (1 - majority)) / beta))


# ------------------------------------------------------------ tests and rules


def interval(values: np.ndarray, level: float) -> list[float]:
    """Of the mean of (seeds, prompts): bootstrap over prompts, with seeds nested in them."""
    half = stats.norm.ppf((1 + level) / 2) * statistics.bootstrap_se(values)
    return [float(values.mean() - half), float(values.mean() + half)]


def win_interval(wins: np.ndarray, level: float) -> list[float]:
    """Of win rate minus one half: the report's binomial one for a single seed."""
    if len(wins) > 1:
        return interval(wins - 0.5, level)
    return [end - 0.5 for end in statistics.binomial_interval(wins.sum(), wins.size, level)]


def seeds_of(claim: Claim, table: Table) -> list[int]:
    """The seeds that all arms of a claim have; none where an arm is missing."""
    return sorted(set.intersection(*(set(table.get(arm, ())) for arm in claim.weights)))


def examine(claim: Claim, table: Table) -> dict:
    """Effect, 95% interval, p-value and seeds of one claim; its prompts all in one order."""
    seeds = seeds_of(claim, table)
    values = sum(w * np.stack([table[a][s] for s in seeds]) for a, w in claim.weights.items())
    over_seeds, zeros = values.mean(0), np.zeros(values.shape[1])  # (prompts,)
    if claim.kind == "above":
        name, p = "Wilcoxon", statistics.paired(over_seeds, zeros)["wilcoxon_p"]
    elif claim.kind == "par":
        name, p = "two one-sided t", statistics.equivalent(over_seeds, zeros)["p"]
    else:
        name, p = "one-sided t", statistics.not_below(over_seeds, zeros)
    return {
        "claim": claim.text,
        "contrast": contrast(claim.weights),
        "kind": claim.kind,
        "measure": claim.measure,
        "test": name,
        "effect": float(values.mean()),
        "interval_95": interval(values, 0.95),
        "p": p,
        "by_seed": [float(mean) for mean in values.mean(1)],
        "prompts": values.shape[1],
    }


def decide(record: dict) -> str:
    """What a claim's record means here, by the rules above."""
    low, high = record["interval_95"]
    shown, seeds, margin = record["p_holm"] < 0.05, record["by_seed"], statistics.MARGIN
    if record["kind"] == "above":
        holds = shown and low > 0 and min(seeds) > 0
        fails = shown and high < 0 and max(seeds) < 0
    elif record["kind"] == "par":
        holds, fails = shown, low > margin or high < -margin
    else:
        holds, fails = shown, high < -margin
    return "holds" if holds else "does not" if fails else "cannot tell"


def examine_all(tables: dict[str, dict[str, Table]], made: dict[str, list[Claim]]) -> list[dict]:
    """The records of all claims whose arms are there, their p-values corrected together.

    tables, made: model to measure to table, and model to its claims.
    """
    records = [
        {"model": model, **examine(claim, tables[model][claim.measure])}
        for model, its_claims in made.items()
        for claim in its_claims
        if seeds_of(claim, tables[model].get(claim.measure, {}))
    ]
    return conclude(records)


def conclude(records: list[dict]) -> list[dict]:
    """The records with what depends on all of them: corrected p-values, and what they mean here.

    For a claim of a par also `prompts_needed`: how many it takes to show one, so corrected, of two
    methods that do not differ, where the contrast varies from prompt to prompt as much as this.
    """
    for record, p in zip(records, statistics.holm([record["p"] for record in records])):
        record["p_holm"] = p
        record["here"] = decide(record)
        if record["kind"] == "par":
            low, high = record["interval_95"]
            se = (high - low) / 2 / stats.norm.ppf(0.975)
            sd, level = se * np.sqrt(record["prompts"]), 0.05 / len(records)
            record["prompts_needed"] = statistics.prompts_needed(sd, level=level)
    return records
