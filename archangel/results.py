"""From the suite's replies and verdicts to numbers, figures and a plain report.

`numbers.json` has everything that figures and tables are made of. They can be made again from it
alone, or from the numbers of several suites together, for example one for each model size:

    python -m archangel.results runs/suite/numbers.json runs/larger/numbers.json --out runs/both
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from archangel import claims, figures, judge, statistics
from archangel.claims import Table, name_of
from archangel.errors import UserError, exit_status
from archangel.run import load_tokenizer
from archangel.tokenized import tokenize
from common import Examples, completion_logps, make_batch

KEYS = {"data", "models", "methods", "ablations", "contradictory", "claims"}  # of numbers.json
CAUTION = (
    "**What a toy can and cannot say.** It can show that an effect exists at all in one small, "
    "known world, that a setting is fragile there, and that the code does what an equation says. "
    "It cannot show that an effect exists in models of 1B to 30B, or how large it is there. Nor "
    "can it refute a claim about them: the toy's base model was trained on the very distribution "
    "that both replies of a pair are drawn from, its judge is a rule without noise, and all its "
    'replies are short. "Does not hold" below means only that it does not hold on the toy.'
)
Folders = dict[str, dict[int, Path]]  # arm to seed to the folder of its replies and verdicts


def read(folder: Path) -> dict[str, dict[str, float]]:
    """For each prompt that was judged: win, tokens and ended."""
    replies = judge.read_replies(folder / "replies.jsonl")
    lines = judge.json_lines(folder, (folder / "verdicts.jsonl").read_bytes())
    verdicts = [verdict for _, verdict in lines]
    by_prompt = {}
    for reply, verdict in zip(replies, verdicts, strict=True):
        if verdict["win"] is not None:
            by_prompt[reply["prompt"]] = {
                "win": verdict["win"],
                "tokens": reply["tokens"],
                "ended": reply["ended"],
            }
    return by_prompt


def tabulate(folders: Folders) -> dict[str, Table]:
    """Measure to arm to seed to (prompts,), over the prompts that were judged in all folders."""
    by_arm = {}  # arm to seed to prompt to measure to value
    prompt_sets = []
    for arm, paths in folders.items():
        by_arm[arm] = {}
        for seed, path in paths.items():
            by_arm[arm][seed] = read(path)
            prompt_sets.append(set(by_arm[arm][seed]))
    prompts = []
    if prompt_sets:
        prompts = sorted(set.intersection(*prompt_sets))
        if len(prompts) < 2:
            raise UserError(f"{len(prompts)} prompts were judged for all: judge more (--n)")
    tables = {"win": {}, "tokens": {}, "ended": {}}
    for measure, table in tables.items():
        for arm, by_seed in by_arm.items():
            table[arm] = {}
            for seed, by_prompt in by_seed.items():
                values = [float(by_prompt[prompt][measure]) for prompt in prompts]
                table[arm][seed] = np.array(values)
    tables["win_less_half"] = {}
    for arm, by_seed in tables["win"].items():
        tables["win_less_half"][arm] = {seed: wins - 0.5 for seed, wins in by_seed.items()}
    return tables


def parameters(path: Path) -> int:
    """The number of a model's parameters, from the headers of its files."""
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                total += math.prod(tensors.get_slice(name).get_shape())
    return total


@torch.no_grad()
def log_odds(path: Path, replies: Sequence[tuple[str, str, str]]) -> np.ndarray:
    """Log-probability of the first reply minus that of the second, by a model, (prompts,), nats.

    replies: (prompt, first, second).
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    model.eval()
    settings = SimpleNamespace(max_length=2048, max_prompt_length=1024, truncate_prompt="start")
    pairs = []
    for prompt, first, second in replies:
        pairs.append({"prompt": prompt, "chosen": first, "rejected": second})
    records = tokenize(pairs, load_tokenizer(path))
    examples = Examples(records, settings)
    for number in range(len(records)):
        examples.add_record(number, [("chosen", "rejected")])
    batch = make_batch(examples)
    logps = batch.sum_completions(completion_logps(model, batch))  # (2 * prompts,)
    first_logps, second_logps = logps.view(-1, 2).unbind(dim=1)
    return (first_logps - second_logps).double().numpy()


def share(odds: np.ndarray) -> np.ndarray:
    """Log-odds of two replies to the first one's share of their probability."""
    return 1 / (1 + np.exp(-odds))


# ------------------------------------------------------------------------------------------ numbers


def describe(values: dict[int, np.ndarray], is_win: bool = False) -> dict:
    """Mean, intervals over prompts, and the mean of each seed.

    values: seed to (prompts,). is_win: they are wins; one half is subtracted from their means.
    """
    table = np.stack([values[seed] for seed in sorted(values)])  # (seeds, prompts)
    subtracted = 0.5 if is_win else 0.0
    interval = claims.win_interval if is_win else claims.interval
    return {
        "mean": float(table.mean() - subtracted),
        "interval_75": interval(table, 0.75),
        "interval_95": interval(table, 0.95),
        "by_seed": [float(mean) for mean in table.mean(axis=1) - subtracted],
    }


def numbers_of_methods(model: str, tables: dict[str, Table], methods: Sequence[str]) -> list[dict]:
    """A row for each method of one model: what Figures 2, 3 and 5 show."""
    rows = []
    for arm in methods:
        if arm not in tables["win"]:
            continue
        wins = tables["win"][arm]
        num_prompts = len(wins[min(wins)])
        rows.append(
            {
                "model": model,
                "arm": arm,
                "name": name_of(arm),
                "prompts": num_prompts,
                "win_rate_minus_half": describe(wins, is_win=True),
                "tokens": describe(tables["tokens"][arm]),
                "ended": describe(tables["ended"][arm]),
            }
        )
    return rows


def numbers_of_ablations(
    model: str, wins: Table, ablations: dict[str, dict[str, str]]
) -> list[dict]:
    """A row for each value of each ablation. ablations: title to value to arm."""
    rows = []
    for title, arms in ablations.items():
        for value, arm in arms.items():
            if arm in wins:
                rows.append(
                    {
                        "model": model,
                        "ablation": title,
                        "value": value,
                        "win_rate_minus_half": describe(wins[arm], is_win=True),
                    }
                )
    return rows


def numbers_of_contradictory_labels(
    model: str, majority: Table, contradictory: dict[str, tuple[float, str]], gap: float
) -> list[dict]:
    """A row for each share of agreeing labels and each loss, with DPO's optimum.

    Args:
        majority: arm to seed to the probability of the majority's reply, less 0.5, (prompts,).
        contradictory: arm to (share of agreeing labels, loss).
        gap: see claims.optimum_of_dpo.
    """
    rows = []
    for arm, by_seed in majority.items():
        agreeing, loss = contradictory[arm]
        probabilities = {seed: values + 0.5 for seed, values in by_seed.items()}
        is_ahead = [values > 0 for values in by_seed.values()]
        rows.append(
            {
                "model": model,
                "loss": loss,
                "share": agreeing,
                "probability": describe(probabilities),
                "prompts_with_majority": float(np.mean(is_ahead)),
                "optimum_of_dpo": float(claims.optimum_of_dpo(agreeing, gap)),
                "gap": gap,
            }
        )
    return rows


def gather(
    data: str,
    folders: dict[str, Folders],
    models: dict[str, Path],
    methods: Sequence[str],
    ablations: dict[str, dict[str, str]],
    contradictory: dict[str, tuple[float, str]],
    replies: Sequence[tuple[str, str, str]],
) -> dict:
    """All numbers of a suite, from the results that exist.

    Args:
        data: what the suite trained on.
        folders: model to arm to seed to folder.
        models: model to the folder of its weights.
        methods: arms.
        ablations: title to value to arm.
        contradictory: arm to (share of agreeing labels, loss).
        replies: (prompt, the majority's reply, the minority's reply).
    """
    numbers = {
        "margin": statistics.MARGIN,
        "data": data,
        "models": [],
        "methods": [],
        "ablations": [],
        "contradictory": [],
    }
    tables = {}  # model to measure to table
    claims_of_models = {}
    for model, arms in folders.items():
        numbers["models"].append({"name": model, "parameters": parameters(models[model])})
        judged = {}
        scored = {}  # arms whose two replies are scored, and none is sampled
        for arm, paths in arms.items():
            if arm in contradictory:
                scored[arm] = paths
            else:
                judged[arm] = paths
        tables[model] = tabulate(judged)
        wins = tables[model]["win"]
        numbers["methods"] += numbers_of_methods(model, tables[model], methods)
        numbers["ablations"] += numbers_of_ablations(model, wins, ablations)
        claims_of_models[model] = claims.claims_of_report() + claims.claims_of_ablations(wins)
        if scored:
            gap = -float(log_odds(models[model], replies).mean())
            majority = {}
            for arm, paths in scored.items():
                majority[arm] = {}
                for seed, path in paths.items():
                    majority[arm][seed] = share(log_odds(path, replies)) - 0.5
            tables[model]["majority"] = majority
            numbers["contradictory"] += numbers_of_contradictory_labels(
                model, majority, contradictory, gap
            )
            claims_of_models[model] += claims.claims_of_contradictory_labels(contradictory, gap)
    numbers["claims"] = claims.examine_all(tables, claims_of_models)
    return numbers


# --------------------------------------------------------------------------- figures and the report


def draw(numbers: dict, out: Path) -> list[tuple[str, str]]:
    """Draw what the numbers hold. Returns (file name, caption) of each figure."""
    drawn = []

    def add(name: str, caption: str, figure: Callable, *arguments) -> None:
        figure(numbers, out / name, *arguments)
        drawn.append((name, caption))

    bars = "Thick lines are 75% intervals, thin ones 95%, over prompts; dots are seeds."
    if numbers["methods"]:
        text = (
            "Left: how strongly each loss increases the log-probability of a desirable completion, "
            "by its log-ratio. Right: win rates"
        )
        add("overview.png", f"{text}. {bars}", figures.overview)
        text = "Win rate against the chosen reply, minus one half, by method and size"
        add("figure_2.png", f"Figure 2. {text}. {bars}", figures.figure2)
        text = "How long replies are, and how many stop at EOS"
        add("figure_3.png", f"Figure 3. {text}. Lines are 95% intervals.", figures.figure3)
        if any(row["arm"] in figures.ARMS_OF_FIGURE_5 for row in numbers["methods"]):
            text = "KTO against DPO, with and without SFT before"
            add("figure_5.png", f"Figure 5. {text}. {bars}", figures.figure5)
    if numbers["ablations"]:
        text = (
            "Ablations of KTO, and of DPO's beta. Lines are one standard deviation over seeds (95% "
            "over prompts where one seed ran); dots are seeds."
        )
        add("ablations.png", text, figures.ablations)
    if numbers["contradictory"]:
        text = "Contradictory labels: what share of probability the majority's reply ends with"
        add("contradictory.png", f"{text}. Dots are seeds.", figures.contradictory)
    return drawn


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def between(ends: Sequence[float], digits: int = 3) -> str:
    """An interval in words."""
    low, high = ends
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def seeds_range(summary: dict) -> str:
    """The smallest and the largest mean of a seed, in words."""
    return f"{min(summary['by_seed']):+.3f} to {max(summary['by_seed']):+.3f}"


def by_claim(records: Sequence[dict]) -> list[list[dict]]:
    """The records of each claim, of all models."""
    in_order = {}
    for record in records:
        in_order.setdefault((record["claim"], record["contrast"]), []).append(record)
    return list(in_order.values())


def effect_of(record: dict) -> str:
    """The effect with its sign and unit: win rate, tokens or probability."""
    if record["measure"] == "tokens":
        return f"{record['effect']:+.1f} tokens"
    return f"{record['effect']:+.3f}"


def verdicts_table(records: Sequence[dict]) -> str:
    """The claims in markdown, a row for each claim, with the outcome and the effect by model."""
    models = list(dict.fromkeys(record["model"] for record in records))
    rows = []
    for records_of_claim in by_claim(records):
        cells = dict.fromkeys(models, "")
        for record in records_of_claim:
            cells[record["model"]] = f"{record['outcome']} ({effect_of(record)})"
        first = records_of_claim[0]
        rows.append([first["claim"], first["who"], *cells.values()])
    return markdown_table(["claim", "who claims it", *models], rows)


def claims_table(records: Sequence[dict]) -> str:
    """The claims in markdown with their tests, a row for each claim and model."""
    tested = {
        "above": "> 0",
        "equivalent": f"within {statistics.MARGIN} of 0",
        "not below": f"> -{statistics.MARGIN}",
    }
    head = "claim,who claims it,where,what is tested here,model,effect,95% interval,p,verdict"
    rows = []
    for records_of_claim in by_claim(records):
        for record in records_of_claim:
            digits = 1 if record["measure"] == "tokens" else 3
            verdict = f"**{record['outcome']}**"
            if "prompts_needed" in record:
                verdict += f"; {record['prompts_needed']} prompts needed"
            rows.append(
                [
                    record["claim"],
                    record["who"],
                    record["where"],
                    f"{record['contrast']} {tested[record['kind']]} ({record['test']}, "
                    f"{record['prompts']} prompts, {len(record['by_seed'])} seeds)",
                    record["model"],
                    effect_of(record),
                    between(record["interval_95"], digits),
                    f"{record['p_holm']:.2g}",
                    verdict,
                ]
            )
    return markdown_table(head.split(","), rows)


def methods_table(rows: Sequence[dict]) -> str:
    """What Figures 2, 3 and 5 show, in markdown."""
    head = "model,method,win rate - 0.5,75% interval,95% interval,seeds,tokens,ended".split(",")
    lines = []
    for row in rows:
        win = row["win_rate_minus_half"]
        lines.append(
            [
                row["model"],
                row["name"],
                f"{win['mean']:+.3f}",
                between(win["interval_75"]),
                between(win["interval_95"]),
                seeds_range(win),
                f"{row['tokens']['mean']:.1f}",
                f"{row['ended']['mean']:.0%}",
            ]
        )
    return markdown_table(head, lines)


def ablations_table(rows: Sequence[dict]) -> str:
    """What the figures of the ablations show, in markdown."""
    head = "model,setting,value,win rate - 0.5,95% interval,seeds".split(",")
    lines = []
    for row in rows:
        win = row["win_rate_minus_half"]
        lines.append(
            [
                row["model"],
                row["ablation"],
                row["value"],
                f"{win['mean']:+.3f}",
                between(win["interval_95"]),
                seeds_range(win),
            ]
        )
    return markdown_table(head, lines)


def contradictory_table(rows: Sequence[dict]) -> str:
    """The probability of the majority's reply after training, in markdown."""
    head = "model,loss,labels that agree,probability,seeds,prompts on its side,DPO's optimum"
    lines = []
    for row in rows:
        optimum = f"{row['optimum_of_dpo']:.3f}" if row["loss"] == "dpo" else ""
        lines.append(
            [
                row["model"],
                row["loss"].upper(),
                f"{row['share']:.0%}",
                f"{row['probability']['mean']:.3f}",
                seeds_range(row["probability"]),
                f"{row['prompts_with_majority']:.0%}",
                optimum,
            ]
        )
    return markdown_table(head.split(","), lines)


def report(numbers: dict, drawn: Sequence[tuple[str, str]], about: dict | None = None) -> str:
    """The report in markdown.

    Args:
        drawn: (file name, caption) of each figure.
        about: judge, seeds, prompts, commands (of all training runs), seconds, and failed (stage to
            reason).
    """
    models = []
    for model in numbers["models"]:
        models.append(f"{model['name']} ({model['parameters']:,} parameters)")
    introduction = f"Models: {', '.join(models)}. Data: {numbers['data']}."
    if about:
        introduction += (
            f" Judge: {about['judge']}. Training seeds: {about['seeds']}. Prompts: "
            f"{about['prompts']}, held out, the same for all; the same sampling seed. All stages "
            f"together took {about['seconds']:.0f} s."
        )
    parts = ["# What the suite found", introduction]
    if about and about["failed"]:
        parts.append("**Not everything ran**, so something is missing below:")
        reasons = [f"- {name}: {reason}" for name, reason in about["failed"].items()]
        parts.append("\n".join(reasons))
    for name, caption in drawn:
        title = caption.split(". ")[0]
        parts += [f"![{title}]({name})", caption]
    if numbers["methods"]:
        parts += ["## Methods", methods_table(numbers["methods"])]
    if numbers["claims"]:
        parts.append("## The claims, here")
        if numbers["data"] == "toy":
            parts.append(CAUTION)
        parts += [
            "The tests, the margin and the rules for a verdict, in `archangel/claims.py`, were "
            "fixed before any result was seen; that file says which claims were added or reworded "
            "later. An effect is the contrast that is tested: of win rates where nothing else is "
            "said. p-values are corrected for their number (Holm). Intervals and tests are over "
            "prompts; where a contrast should be above 0, it must be so for every seed, too. For "
            "claims of equivalence, *prompts needed* is the number of prompts with which the test "
            "would succeed with probability 0.8 at the corrected level, if the methods were equal.",
            verdicts_table(numbers["claims"]),
            "### The tests",
            claims_table(numbers["claims"]),
            "Most of the report's claims are about models of certain sizes (column *where*). The "
            "toy is smaller than all of them.",
        ]
    if numbers["ablations"]:
        parts += ["## Ablations", ablations_table(numbers["ablations"])]
    if numbers["contradictory"]:
        parts += ["## Contradictory labels", contradictory_table(numbers["contradictory"])]
    if about:
        commands = "\n".join(about["commands"])
        parts += ["## Commands", f"```bash\n{commands}\n```"]
    return "\n\n".join(parts) + "\n"


def write(out: Path, numbers: dict, about: dict | None = None) -> None:
    """Write numbers.json, the figures and report.md to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    judge.write(out / "numbers.json", json.dumps(numbers, indent=2) + "\n")
    judge.write(out / "report.md", report(numbers, draw(numbers, out), about))


def together(several: Sequence[dict]) -> dict:
    """The numbers of several suites as those of one. Their p-values are corrected together.

    If two suites have the same claim about the same model, the first one's is taken. Raises
    UserError if two have the same result, or are about different data.
    """
    data = several[0]["data"]
    if any(numbers["data"] != data for numbers in several):
        raise UserError("the suites are about different data: no one table can hold both")
    combined = {"margin": statistics.MARGIN, "data": data, "models": []}
    keys_of_tables = {
        "methods": ("model", "arm"),
        "ablations": ("model", "ablation", "value"),
        "contradictory": ("model", "share", "loss"),
        "claims": ("model", "claim", "contrast"),
    }
    for table, keys in keys_of_tables.items():
        rows = {}
        for numbers in several:
            for row in numbers[table]:
                name = tuple(row[key] for key in keys)
                if name not in rows:
                    rows[name] = row
                elif table != "claims":
                    raise UserError(f"{table}: {', '.join(map(str, name))} is there twice")
        combined[table] = list(rows.values())
    for numbers in several:
        for model in numbers["models"]:
            if model not in combined["models"]:
                combined["models"].append(model)
    combined["claims"] = claims.conclude(combined["claims"])
    return combined


# ------------------------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Make figures, tables and numbers.json from one or several numbers.json."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.results",
        description="Pictures, tables and numbers.json of one or several suites' numbers.json.",
    )
    parser.add_argument("numbers", nargs="+", type=Path, help="numbers.json of suites")
    parser.add_argument("--out", type=Path, required=True, help="a folder for what is made")
    args = parser.parse_args(arguments)
    several = []
    for path in args.numbers:
        try:
            numbers = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
        if not isinstance(numbers, dict) or not numbers.keys() >= KEYS:
            raise UserError(f"{path}: is not a suite's numbers.json")
        several.append(numbers)
    write(args.out, together(several))
    print(f"the report is {args.out / 'report.md'}")


if __name__ == "__main__":
    with exit_status():
        main()
