"""The runs whose numbers are kept in tests/data/golden, and the data files that they read.

A case is a name, a data file, the command line settings that it adds to BASE, and the number of
steps. `tests/data/golden/make.py` ran the cases at commit 068ab23; `tests/test_golden.py` runs them
today. This module needs nothing of the project but the toy's training data.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "data" / "golden"
SCRIPTS = ["sft", "dpo", "slic", "ppo_offline", "kto"]
UNPAIRED_SCRIPTS = ["sft", "ppo_offline", "kto"]  # those that can use unpaired records

# Learning rates at which the toy learns.
LEARNING_RATES = {"sft": 3e-4, "dpo": 3e-5, "slic": 3e-5, "ppo_offline": 3e-5, "kto": 2e-4}
BASE = {"model": "toy", "warmup_steps": 10, "dtype": "float64", "save_every": 0}


def toy_records(number: int) -> list[dict]:
    """The first records of the toy's training data."""
    path = ROOT / "archangel" / "toy_world" / "data" / "train.jsonl"
    with path.open() as file:
        return [json.loads(next(file)) for _ in range(number)]


def pairs_70() -> list[dict]:
    """70 pairs: with a batch of 32 the last batch of an epoch is short."""
    return toy_records(70)


def unpaired_41_9() -> list[dict]:
    """41 desirable and 9 undesirable completions, mixed."""
    records = []
    for number, pair in enumerate(toy_records(50)):
        desirable = number % 6 != 0
        completion = pair["chosen"] if desirable else pair["rejected"]
        records.append({"prompt": pair["prompt"], "completion": completion, "label": desirable})
    return records


def phrase() -> list[dict]:
    """48 pairs whose chosen completions share a phrase, so that KTO's reference point is positive.

    The phrase is learned within a few steps. Then the chosen completions, and most mismatched
    completions, are more likely under the policy than under the reference model.
    """
    records = []
    for number, pair in enumerate(toy_records(48)):
        chosen = " The colour of the tin bowl is grey, and grey it is." * 2
        if number % 4 == 0:
            chosen += pair["chosen"]
        records.append({"prompt": pair["prompt"], "chosen": chosen, "rejected": pair["rejected"]})
    return records


DATA = {"pairs_70": pairs_70, "unpaired_41_9": unpaired_41_9, "phrase": phrase}


def write_data(name: str, folder: Path) -> str:
    """Write a data file into the folder. Returns what --data takes; the toy needs no file."""
    if name == "toy":
        return "toy"
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in DATA[name]()))
    return str(path)


def make_cases() -> dict[str, dict]:
    """Case name to {"script", "data", "processes", "settings"}."""
    cases = {}

    def add(name: str, script: str, data: str, processes: int = 1, **settings) -> None:
        settings = BASE | {"lr": LEARNING_RATES[script]} | settings
        case = {"script": script, "data": data, "processes": processes, "settings": settings}
        cases[f"{script} {name}"] = case

    for script in SCRIPTS:
        add("toy", script, "toy", max_steps=60)
        add("toy, small micro-batches", script, "toy", max_steps=8, micro_batch_tokens=300)
        for limit in (8192, 1200):
            add(
                f"toy, float32, {limit}",
                script,
                "toy",
                max_steps=60,
                dtype="float32",
                micro_batch_tokens=limit,
            )
        add("pairs_70", script, "pairs_70", epochs=3)
        add("pairs_70, 3 processes", script, "pairs_70", processes=3, batch_size=4, max_steps=8)
    for script in UNPAIRED_SCRIPTS:
        add("unpaired_41_9", script, "unpaired_41_9", max_steps=8)
    for kl in ("other_half", "mismatched", "zero"):
        for limit in (8192, 300):
            add(
                f"phrase, {kl}, {limit}",
                "kto",
                "phrase",
                max_steps=8,
                epochs=2,
                kl=kl,
                micro_batch_tokens=limit,
            )
    add("toy, mismatched", "kto", "toy", max_steps=60, kl="mismatched")
    return cases


CASES = make_cases()
