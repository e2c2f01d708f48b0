"""Run the cases of tests/golden_cases.py at commit 068ab23, and write what they gave.

    git worktree add ../v1 068ab23
    cd ../v1 && PYTHONPATH=.:../main/tests python ../main/tests/data/golden/make.py

It works with that commit's modules only. It is kept to show where the numbers come from.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import golden_cases
import torch
import torch.distributed as dist

import common

METRICS = ["loss", "grad_norm", "kl", "reward_margin", "eval_loss", "critic_loss"]


def index_lists(script: str, data: str, settings: dict) -> list[list[int]]:
    """The indices of the examples of every step."""
    module = importlib.import_module(script)
    config = module.Config(data=data, **settings)
    tokenizer = common.load_tokenizer(common.find_model("toy"))
    records = common.read_rows(data, "train", module.FORMS)
    examples = module.make_examples(records, tokenizer, config)
    numbers = {id(example): number for number, example in enumerate(examples)}
    num_steps = config.max_steps or config.epochs * module.steps_per_epoch(examples, config)
    steps = [module.global_batch(examples, config, step) for step in range(num_steps)]
    indices = []
    for batch in steps:
        indices.append([numbers[id(example)] for example in batch])
    return indices


def metrics(script: str, processes: int, settings: dict, folder: Path) -> dict[str, list]:
    """The metrics of every step, step 0 included, by name."""
    out = folder / "run"
    if processes == 1:
        module = importlib.import_module(script)
        module.train(module.Config(out=str(out), **settings))
        dist.destroy_process_group()
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", f"{script}.py", "--out", str(out)]
        for name, value in settings.items():
            command += [f"--{name}", str(value)]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        subprocess.run(command, check=True, env=environment)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = {}
    for name in METRICS:
        if any(name in record for record in records):
            found[name] = [record[name] for record in records if name in record]
    return found


def token_ids() -> dict[str, list]:
    """Prompt and completion ids of 50 records of the toy and of 50 records of HH."""
    import dpo

    tokenizer = common.load_tokenizer(common.find_model("toy"))
    hh = [json.loads(line) for line in (golden_cases.FOLDER / "hh.jsonl").open()]
    found = {}
    for name, records in {"toy": golden_cases.toy_records(50), "hh": hh}.items():
        examples = dpo.make_examples(records, tokenizer, dpo.Config(model="toy"))
        found[name] = []
        for example in examples:
            ids = [example["prompt_ids"], *example["completions_ids"]]
            found[name].append([each.tolist() for each in ids])
    return found


def main() -> None:
    torch.set_num_threads(1)
    (golden_cases.FOLDER / "token_ids.json").write_text(json.dumps(token_ids()) + "\n")
    golden = {}
    for name, case in golden_cases.CASES.items():
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            data = golden_cases.write_data(case["data"], folder)
            settings = case["settings"]
            golden[name] = {
                "indices": index_lists(case["script"], data, settings),
                "metrics": metrics(
                    case["script"], case["processes"], {"data": data, **settings}, folder
                ),
            }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in golden.items()]
    (golden_cases.FOLDER / "runs.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
