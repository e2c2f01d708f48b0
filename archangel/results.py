"""From the suite's replies and verdicts to numbers, pictures and a plain report.

`numbers.json` has all that pictures and tables are made of, so that they can be made again from it
alone, and from the numbers of several suites, of one size each or of one machine each:

    python -m archangel.results runs/suite/numbers.json runs/larger/numbers.json --out runs/both
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import common_v1 as common
from archangel import claims, figures, judge, statistics
from archangel.claims import Table, name_of

TABLES = {"data", "models", "methods", "ablations", "contradictory", "claims"}  # in numbers.json
CAUTION = "A shop of a few hundred products says nothing about models of 1B to 30B."
Folders = dict[str, dict[int, Path]]  # arm to seed to where its replies and verdicts lie


def read(folder: Path) -> dict[str, dict[str, float]]:
    """Of each prompt that was judged: win, tokens and ended."""
    rows = judge.read_replies(folder / "replies.jsonl")
    verdicts = (folder / "verdicts.jsonl").read_bytes()
    made = {}
    for row, (_, verdict) in zip(rows, judge.json_lines(folder, verdicts), strict=True):
        if verdict["win"] is not None:
            found = {"win": verdict["win"], "tokens": row["tokens"], "ended": row["ended"]}
            made[row["prompt"]] = found
    return made


def tabulate(folders: Folders) -> dict[str, Table]:
    """Measure to arm to seed to (prompts,), over the prompts that were judged in all of them."""
    found = {arm: {s: read(path) for s, path in seeds.items()} for arm, seeds in folders.items()}
    judged = [set(rows) for seeds in found.values() for rows in seeds.values()]
    prompts = sorted(set.intersection(*judged)) if judged else []
    if judged and len(prompts) < 2:
        raise common.UserError(f"{len(prompts)} prompts were judged for all: judge more (--n)")
    return {
        measure: {
            arm: {s: np.array([float(rows[p][measure]) for p in prompts]) for s, rows in x.items()}
            for arm, x in found.items()
        }
        for measure in ("win", "tokens", "ended")
    }


def parameters(path: Path) -> int:
    """The number of a model's parameters, from its files' headers."""
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())
    return total


@torch.no_grad()
def log_odds(path: Path, replies: Sequence[tuple[str, str, str]]) -> np.ndarray:
    """(prompts,) log-probability of the first reply minus that of the second, by a model, nats.

    replies: (prompt, first, second).
    """
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True
    ).eval()
    limits = SimpleNamespace(max_length=2048, max_prompt_length=1024, truncate_prompt="start")
    texts = [(prompt, pair) for prompt, *pair in replies]
    examples = common.tokenise(texts, common.load_tokenizer(path), limits)
    batch = common.make_batch(examples)
    first, second = batch.sum(common.completion_logps(model, batch)).view(-1, 2).unbind(1)
    return (first - second).double().numpy()


# ------------------------------------------------------------ numbers


def describe(values: dict[int, np.ndarray], is_win: bool = False) -> dict:
    """Mean, intervals over prompts and each seed's mean of seed to (prompts,)."""
    table = np.stack([values[seed] for seed in sorted(values)])  # (seeds, prompts)
    ends = claims.win_interval if is_win else claims.interval
    return {
        "mean": float(table.mean() - 0.5 * is_win),
        "interval_75": ends(table, 0.75),
        "interval_95": ends(table, 0.95),
        "by_seed": [float(mean) for mean in table.mean(1) - 0.5 * is_win],
    }


def numbers_of_methods(model: str, tables: dict[str, Table], methods: Sequence[str]) -> list[dict]:
    """A row for each method of one model, what Figures 2, 3 and 5 show."""
    return [
        {
            "model": model,
            "arm": arm,
            "name": name_of(arm),
            "prompts": len(next(iter(tables["win"][arm].values()))),
            "win_rate_minus_half": describe(tables["win"][arm], is_win=True),
            "tokens": describe(tables["tokens"][arm]),
            "ended": describe(tables["ended"][arm]),
        }
        for arm in methods
        if arm in tables["win"]
    ]


def numbers_of_ablations(
    model: str, wins: Table, ablations: dict[str, dict[str, str]]
) -> list[dict]:
    """A row for each value of each ablation: title to label to arm."""
    return [
        {
            "model": model,
            "ablation": title,
            "value": value,
            "win_rate_minus_half": describe(wins[arm], is_win=True),
        }
        for title, arms in ablations.items()
        for value, arm in arms.items()
        if arm in wins
    ]


def numbers_of_theorem(
    model: str, majority: Table, of_arm: dict[str, tuple[float, str]], gap: float
) -> list[dict]:
    """A row for each share of agreeing labels and each loss, with where DPO's optimum lies."""
    return [
        {
            "model": model,
            "loss": of_arm[arm][1],
            "share": of_arm[arm][0],
            "probability": describe({seed: x + 0.5 for seed, x in majority[arm].items()}),
            "prompts_with_majority": float(np.mean([x > 0 for x in majority[arm].values()])),
            "optimum_of_dpo": float(claims.optimum_of_dpo(of_arm[arm][0], gap)),
            "gap": gap,
        }
        for arm in majority
    ]


def gather(
    data: str,
    folders: dict[str, Folders],
    models: dict[str, Path],
    methods: Sequence[str],
    ablations: dict[str, dict[str, str]],
    contradictory: dict[str, tuple[float, str]],
    replies: Sequence[tuple[str, str, str]],
) -> dict:
    """All numbers of a suite, of what is there.

    data: what it trained on. folders: model to arm to seed to folder; models: their own folders.
    ablations: title to value to arm. contradictory: arm to (share of agreeing labels, loss).
    replies: (prompt, the majority's, the minority's).
    """
    numbers = {"margin": statistics.MARGIN, "data": data, "models": [], "methods": []}
    numbers |= {"ablations": [], "contradictory": []}
    tables, made = {}, {}
    for model, arms in folders.items():
        numbers["models"].append({"name": model, "parameters": parameters(models[model])})
        judged = {arm: seeds for arm, seeds in arms.items() if arm not in contradictory}
        tables[model] = tabulate(judged)
        wins = tables[model]["win"]
        numbers["methods"] += numbers_of_methods(model, tables[model], methods)
        numbers["ablations"] += numbers_of_ablations(model, wins, ablations)
        made[model] = claims.claims_of_report() + claims.claims_of_ablations(wins)
        if contradictory.keys() & arms.keys():
            gap = -float(log_odds(models[model], replies).mean())
            majority = {
                arm: {s: share(log_odds(path, replies)) - 0.5 for s, path in seeds.items()}
                for arm, seeds in arms.items()
                if arm in contradictory
            }
            tables[model]["majority"] = majority
            numbers["contradictory"] += numbers_of_theorem(model, majority, contradictory, gap)
            made[model] += claims.claims_of_theorem(contradictory, gap)
    numbers["claims"] = claims.examine_all(tables, made)
    return numbers


def share(log_odds: np.ndarray) -> np.ndarray:
    """Log-odds of two replies to the first one's share of their probability."""
    return 1 / (1 + np.exp(-log_odds))


# ------------------------------------------------------------ pictures and the report


def draw(numbers: dict, out: Path) -> list[tuple[str, str]]:
    """Draw what the numbers hold; returns (file, caption) of each picture."""
    pictures = []

    def add(name: str, caption: str, figure, *arguments) -> None:
        figure(numbers, out / name, *arguments)
        pictures.append((name, caption))

    bars = "Thick lines are 75% intervals, thin ones 95%, over prompts; dots are seeds."
    if numbers["methods"]:
        text = (
            "How hard each loss pushes a wanted reply, by how far it has come; and what came of it"
        )
        add("overview.png", f"{text}. {bars}", figures.overview)
        text = "Win rate against the chosen reply, minus one half, by method and size"
        add("figure_2.png", f"Figure 2. {text}. {bars}", figures.figure2)
        text = "How long replies are, and how many end by themselves"
        add("figure_3.png", f"Figure 3. {text}. Lines are 95% intervals.", figures.figure3)
        text = "KTO against DPO, with and without SFT before"
        add("figure_5.png", f"Figure 5. {text}. {bars}", figures.figure5)
    for title in dict.fromkeys(row["ablation"] for row in numbers["ablations"]):
        name = f"ablation_{'_'.join(title.split(' (')[0].lower().replace('+', '_').split())}.png"
        lines = "Lines are one standard deviation over seeds (95% over prompts where one seed ran)"
        add(name, f"Ablation: {title}. {lines}; dots are seeds.", figures.ablation, title)
    if numbers["contradictory"]:
        text = "Contradictory labels: what share of probability the majority's reply ends with"
        add("contradictory.png", f"{text}. Dots are seeds.", figures.contradictory)
    return pictures


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def between(ends: Sequence[float], digits: int = 3) -> str:
    return f"[{ends[0]:+.{digits}f}, {ends[1]:+.{digits}f}]"


def claims_table(records: Sequence[dict]) -> str:
    """The claims in markdown, a column a model; effects in win rate, tokens or probability."""
    models = list(dict.fromkeys(record["model"] for record in records))
    rows = {}
    for record in records:
        digits, unit = (1, " tokens") if record["measure"] == "tokens" else (3, "")
        seeds = len(record["by_seed"])
        cell = f"**{record['here']}**: {record['effect']:+.{digits}f}{unit}, "
        cell += f"{between(record['interval_95'], digits)}, p = {record['p_holm']:.2g}"
        if "prompts_needed" in record:
            cell += f"; {record['prompts_needed']} prompts needed"
        what = (record["claim"], record["contrast"], f"{record['test']}, {record['kind']}")
        row = rows.setdefault(
            (*what, f"{record['prompts']}", f"{seeds}"), dict.fromkeys(models, "")
        )
        row[record["model"]] = cell
    head = ["claim", "contrast", "test", "prompts", "seeds", *models]
    return table_of(head, [[*what, *row.values()] for what, row in rows.items()])


def methods_table(rows: Sequence[dict]) -> str:
    """What Figures 2, 3 and 5 show, in markdown."""
    head = "model,method,win rate - 0.5,75% interval,95% interval,seeds,tokens,ended".split(",")
    lines = []
    for row in rows:
        win, tokens, ended = (row[key] for key in ("win_rate_minus_half", "tokens", "ended"))
        line = [row["model"], row["name"], f"{win['mean']:+.3f}", between(win["interval_75"])]
        line += [between(win["interval_95"]), seeds_range(win)]
        lines.append([*line, f"{tokens['mean']:.1f}", f"{ended['mean']:.0%}"])
    return table_of(head, lines)


def ablations_table(rows: Sequence[dict]) -> str:
    """What the ablations' pictures show, in markdown."""
    head = "model,setting,value,win rate - 0.5,95% interval,seeds".split(",")
    lines = []
    for row in rows:
        win = row["win_rate_minus_half"]
        line = [row["model"], row["ablation"], row["value"], f"{win['mean']:+.3f}"]
        lines.append([*line, between(win["interval_95"]), seeds_range(win)])
    return table_of(head, lines)


def contradictory_table(rows: Sequence[dict]) -> str:
    """The majority's reply's share of probability after training, in markdown."""
    head = "model,loss,labels that agree,probability,seeds,prompts on its side,DPO's optimum"
    lines = []
    for row in rows:
        found = row["probability"]
        line = [row["model"], row["loss"].upper(), f"{row['share']:.0%}", f"{found['mean']:.3f}"]
        line += [seeds_range(found), f"{row['prompts_with_majority']:.0%}"]
        lines.append([*line, f"{row['optimum_of_dpo']:.3f}" if row["loss"] == "dpo" else ""])
    return table_of(head.split(","), lines)


def seeds_range(found: dict) -> str:
    return f"{min(found['by_seed']):+.3f} to {max(found['by_seed']):+.3f}"


def report(numbers: dict, pictures: Sequence[tuple[str, str]], about: dict | None = None) -> str:
    """The report in markdown.

    about: judge, seeds, prompts, commands (one an arm), seconds, failed (name to why).
    """
    sizes = ", ".join(f"{m['name']} ({m['parameters']:,} parameters)" for m in numbers["models"])
    parts = ["# What the suite found", f"Models: {sizes}. Data: {numbers['data']}."]
    if about:
        parts[-1] += (
            f" Judge: {about['judge']}. Training seeds: {about['seeds']}. Prompts: "
            f"{about['prompts']}, held out, the same for all; the same sampling seed. All stages "
            f"together took {about['seconds']:.0f} s."
        )
        if about["failed"]:
            parts.append("**Not everything ran**, so something is missing below:")
            parts.append("\n".join(f"- {name}: {why}" for name, why in about["failed"].items()))
    for name, caption in pictures:
        parts += [f"![{caption.split('. ')[0]}]({name})", caption]
    if numbers["methods"]:
        parts += ["## Methods", methods_table(numbers["methods"])]
    if numbers["claims"]:
        parts.append("## The report's claims, here")
        parts += [CAUTION] if numbers["data"] == "toy" else []
        parts += [
            "The rules were fixed in `archangel/claims.py` before any result was seen: *above* is "
            "a contrast above 0, *par* one within the margin of "
            f"{numbers['margin']}, *not below* one above minus the margin; p-values are corrected "
            "for their number (Holm), intervals hold 95%. Intervals and tests are over prompts; "
            "*above* asks every seed too. *Needed* are the prompts that show a par, so corrected, "
            "with a chance of 0.8 where two methods do not differ at all.",
            claims_table(numbers["claims"]),
            "The report's claims on sizes (SFT+DPO is ahead at 30B) need its sizes.",
        ]
    if numbers["ablations"]:
        parts += ["## Ablations", ablations_table(numbers["ablations"])]
    if numbers["contradictory"]:
        parts += ["## Contradictory labels", contradictory_table(numbers["contradictory"])]
    if about:
        parts += ["## Commands", "```bash\n" + "\n".join(about["commands"]) + "\n```"]
    return "\n\n".join(parts) + "\n"


def write(out: Path, numbers: dict, about: dict | None = None) -> None:
    """Write numbers.json, the pictures and report.md to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    judge.write(out / "numbers.json", json.dumps(numbers, indent=2) + "\n")
    judge.write(out / "report.md", report(numbers, draw(numbers, out), about))


def together(several: Sequence[dict]) -> dict:
    """The numbers of several suites as of one: their p-values are corrected together.

    Where two have the same claim of the same model, the first's stands. Raises UserError where two
    have the same result, or other data.
    """
    whole = {"margin": statistics.MARGIN, "data": several[0]["data"], "models": []}
    if any(numbers["data"] != whole["data"] for numbers in several):
        raise common.UserError("the suites are about different data: no one table can hold both")
    same = {  # what names a row
        "methods": ("model", "arm"),
        "ablations": ("model", "ablation", "value"),
        "contradictory": ("model", "share", "loss"),
        "claims": ("model", "claim"),
    }
    for table, keys in same.items():
        rows = {}
        for row in (row for numbers in several for row in numbers[table]):
            name = tuple(row[key] for key in keys)
            if name in rows and table != "claims":
                raise common.UserError(f"{table}: {', '.join(map(str, name))} is there twice")
            rows.setdefault(name, row)
        whole[table] = list(rows.values())
    for numbers in several:
        whole["models"] += [m for m in numbers["models"] if m not in whole["models"]]
    whole["claims"] = claims.conclude(whole["claims"])
    return whole


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m archangel.results",
        description="Pictures, tables and numbers.json of one or several suites' numbers.json.",
    )
    parser.add_argument("numbers", nargs="+", type=Path, help="numbers.json of suites")
    parser.add_argument("--out", type=Path, required=True, help="a folder for what is made")
    given = parser.parse_args(arguments)
    with common.exit_status():
        several = []
        for path in given.numbers:
            try:
                several.append(json.loads(path.read_text()))
            except (OSError, ValueError) as error:
                raise common.UserError(f"{path}: {error}") from None
            if not isinstance(several[-1], dict) or not several[-1].keys() >= TABLES:
                raise common.UserError(f"{path}: is not a suite's numbers.json")
        write(given.out, together(several))
        print(f"the report is {given.out / 'report.md'}")


if __name__ == "__main__":
    main()
