"""The pages' copies of a loss run where they are copied to: a bare loop, and TRL's trainer.

The TRL part runs where TRL is installed (read for 1.16.0), and is skipped elsewhere.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import common
from archangel.records import TOY
from kto import kl_from_other_half, kto_loss

ROOT = Path(common.__file__).parent


def marked(name: str) -> str:
    """The one program under a marker in the README or in archangel/RECIPES.md."""
    text = (ROOT / "README.md").read_text() + (ROOT / "archangel" / "RECIPES.md").read_text()
    (program,) = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", text, re.S)
    return program


def test_copied_loop_trains_with_the_two_functions_and_nothing_else_of_the_project(tmp_path):
    functions = [inspect.getsource(function) for function in (kto_loss, kl_from_other_half)]
    (tmp_path / "kto.py").write_text("\n\n".join(["import torch\n", *functions]))
    (tmp_path / "program.py").write_text(marked("copied loop"))
    weights = tmp_path / "archangel" / "toy_world"
    weights.mkdir(parents=True)
    (weights / "model").symlink_to(TOY / "model")
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps, losses = zip(*[map(float, line.split()) for line in done.stdout.splitlines()])
    assert list(steps) == list(range(10))
    assert losses[0] == 0.5  # policy and reference are one model
    assert all(after < before for before, after in zip(losses, losses[1:])), losses


def test_copied_loop_gives_the_log_probabilities_of_the_trainers():
    """Its one dense line against common's."""
    namespace = {}
    quick = marked("copied loop").replace("range(10)", "range(1)")
    here = quick.replace('"archangel/toy_world/model"', repr(str(TOY / "model")))
    exec(here, namespace)
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    examples = [{"prompt_ids": ids[:2], "completions_ids": [ids[2:]]} for ids in namespace["ids"]]
    batch = common.make_batch(examples)
    expected = batch.sum_completions(common.completion_logps(model, batch))
    torch.testing.assert_close(namespace["logps"], expected, rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------- TRL

ROWS = [
    ("How much is the pot?", " It costs 20 dollars.", True),
    ("How much is the pot?", " Use your eyes.", False),
    ("Where is the brass bell?", " In aisle 3, on the left.", True),
    ("Where is the brass bell?", " Look for it, fool.", False),
]
# Not TRL's defaults; the weights have a mean of 1, so that the first loss is still 0.5.
WEIGHTS = {True: 1.25, False: 0.75}
SETTINGS = {"beta": 0.3, "learning_rate": 0.05}


def tiny(tokenizer) -> GPTNeoXForCausalLM:
    """A random model, the same each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**sizes, num_attention_heads=2, vocab_size=len(tokenizer))
    )


def losses_by_hand(tokenizer, steps: int) -> list[float]:
    """The same steps of plain SGD, one sequence at a time, equation (7) in numbers and words."""
    model, losses, reference = tiny(tokenizer), [], None
    for _ in range(steps):
        logps = []
        for prompt, completion, _ in ROWS:
            start = tokenizer(prompt)["input_ids"]
            ids = torch.tensor(tokenizer(prompt + completion)["input_ids"])
            ids = torch.cat([ids, torch.tensor([tokenizer.eos_token_id])])
            each = model(ids[None]).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
            logps.append(each[len(start) - 1 :].sum())
        reference = reference or [logp.item() for logp in logps]
        ratios = [logp - before for logp, before in zip(logps, reference)]
        other = {
            label: max(0.0, sum(r.item() for r, row in zip(ratios, ROWS) if row[2] != label) / 2)
            for label in (True, False)
        }
        signed = [(r - other[row[2]]) * (1 if row[2] else -1) for r, row in zip(ratios, ROWS)]
        each = [1 - torch.sigmoid(SETTINGS["beta"] * z) for z in signed]
        loss = sum(WEIGHTS[row[2]] * one for row, one in zip(ROWS, each)) / len(ROWS)
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= SETTINGS["learning_rate"] * parameter.grad
    return losses


def test_trl_trains_with_the_loss_of_this_project(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    namespace = {}
    exec(marked("copied into trl"), namespace)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    rows = [dict(zip(("prompt", "completion", "label"), row)) for row in ROWS]
    trainer = namespace["ReportKTOTrainer"](
        model=tiny(tokenizer),
        args=trl.KTOConfig(
            output_dir=str(tmp_path),
            precompute_ref_log_probs=True,
            loss_type="apo_zero_unpaired",
            per_device_train_batch_size=len(ROWS),
            max_steps=3,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            desirable_weight=WEIGHTS[True],
            undesirable_weight=WEIGHTS[False],
            **SETTINGS,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[0] == pytest.approx(0.5, abs=1e-5)  # policy and reference are one model
    assert losses == pytest.approx(losses_by_hand(tokenizer, 3), rel=1e-4)
    assert losses[2] < losses[1] < losses[0]
