"""The five trainers as programs: command lines, processes, memory limits, resuming, real rows."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import common

ROOT = Path(common.__file__).parent
SCRIPTS = ["sft", "dpo", "slic", "ppo_offline", "kto"]
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few hundred of the toy's rows, so that the reference pass takes a moment."""
    folder = tmp_path_factory.mktemp("data")
    for split, rows in {"train": 200, "test": 24}.items():
        lines = (common.TOY / "data" / f"{split}.jsonl").read_text().splitlines()[:rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads gain nothing at this size and lose much where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(data: Path, out: Path, **more) -> dict:
    """What a test's run is called with."""
    basic = {"model": "toy", "data": str(data), "out": str(out), "lr": 3e-4}
    return basic | {"warmup_steps": 3, "max_steps": STEPS, "batch_size": 12} | more


def run_here(script: str, **values) -> list[dict]:
    """Train in this process. Returns the metrics."""
    module = importlib.import_module(script)
    try:
        module.train(module.Config(**values))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return metrics(values["out"])


def run_command(script: str, *flags: str, processes: int = 0, **values):
    """Train by the command line, under torchrun where `processes` is given."""
    python = [sys.executable]
    if processes:
        python += ["-m", "torch.distributed.run", "--standalone"]
        python += [f"--nproc_per_node={processes}"]
    words = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [*python, str(ROOT / f"{script}.py"), *words, *flags],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(records: list[dict]) -> torch.Tensor:
    return torch.tensor([record["loss"] for record in records if "loss" in record]).double()


def assert_same_losses(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    """Step by step; the figures too, where they are not of speed and memory."""
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for a, b in zip(ours, theirs):
        names = a.keys() - {"tokens_per_second", "max_memory_mib"}
        if a["step"] <= 1:  # before a step was taken all rewards are 0, and their signs rounding
            names -= {"reward_accuracy", "eval_reward_accuracy"}
        for name in names:
            # A reward margin passes through 0: to the tolerance of the rewards, not of itself.
            close = abs(a[name] - b[name]) <= tolerance * max(abs(a[name]), 1.0)
            assert close, f"step {a['step']}: {name} {a[name]} and {b[name]}"


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Each script's run on one process with memory enough, float64, by its command line."""
    runs = {}

    def run(script: str) -> Path:
        if script not in runs:
            out = tmp_path_factory.mktemp("alone") / script
            run_command(script, **settings(data, out, dtype="float64"))
            runs[script] = out
        return runs[script]

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line_trains_a_model_that_plain_transformers_loads(script, alone):
    out = alone(script)
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    assert "eval_loss" in records[0] and "eval_loss" in records[-1]
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]
    record = json.loads((out / "run.json").read_text())
    assert record["finished"] and record["packed_rows"] and record["script"] == f"{script}.py"

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    base = load_file(common.TOY / "model" / "model.safetensors")
    trained = load_file(out / "model.safetensors")
    assert base.keys() == trained.keys()  # PPO's value head stays behind
    assert any(not torch.equal(base[name], trained[name].float()) for name in base)
    prompt = tokenizer("\n\nHuman: How much is the brass pot?\n\nAssistant:", return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=8)
    assert reply.shape[1] > prompt["input_ids"].shape[1]


# With little memory one process has more micro-batches than the other, which takes part with none.
@pytest.mark.parametrize("limit", [200, 8192])
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_give_the_losses_of_one(script, limit, alone, data, tmp_path):
    if limit == 8192 and script in ("sft", "slic"):
        pytest.skip("nothing in it that dpo, kto and ppo_offline do not have")
    values = settings(data, tmp_path / "two", dtype="float64", micro_batch_tokens=limit)
    checkpointing = ["--activation_checkpointing"] if limit == 200 else []
    run_command(script, *checkpointing, processes=2, **values)
    assert_same_losses(metrics(alone(script)), metrics(values["out"]), 1e-12)
    AutoModelForCausalLM.from_pretrained(values["out"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_memory_limit_and_padding_change_no_loss(script, alone, data, tmp_path, monkeypatch):
    values = settings(data, tmp_path / "cut", dtype="float64", micro_batch_tokens=200)
    assert_same_losses(metrics(alone(script)), run_here(script, **values), 1e-12)

    def not_for_this_model(*_):
        raise ValueError("then each completion gets a padded row of its own")

    monkeypatch.setattr(common, "use_packed", not_for_this_model)
    values |= {"out": str(tmp_path / "whole"), "micro_batch_tokens": 8192}
    whole = run_here(script, **values)
    assert_same_losses(metrics(alone(script)), whole, 1e-12)


@pytest.mark.parametrize("kl", ["mismatched", "zero"])
def test_other_reference_points_do_not_depend_on_memory_and_processes(kl, data, tmp_path):
    # The weight, so that the partners gain too, and their mean is not clamped at every step.
    values = settings(data, tmp_path / "whole", dtype="float64", kl=kl, desirable_weight=10.0)
    whole = run_here("kto", **values)
    cut = run_here("kto", **values | {"out": str(tmp_path / "cut"), "micro_batch_tokens": 200})
    assert_same_losses(whole, cut, 1e-12)
    assert all(record["kl"] == 0 for record in whole[1:]) == (kl == "zero")
    # In one micro-batch each, which keep the keys and values of their prompts for the partners.
    values |= {"out": str(tmp_path / "two")}
    run_command("kto", "--activation_checkpointing", processes=2, **values)
    assert_same_losses(whole, metrics(values["out"]), 1e-12)


# In float32 the default warm-up. RMSprop's first steps are the signs of the gradient, whatever its
# size: with a short warm-up they turn rounding into steps, and float32 runs drift apart.
@pytest.mark.parametrize(
    "script, dtype, warmup_steps, tolerance",
    [
        ("sft", "float32", 150, 1e-5),
        ("dpo", "float32", 150, 1e-5),
        ("kto", "float32", 150, 1e-5),
        ("kto", "float64", 3, 1e-12),
    ],
)
def test_forty_steps_of_two_processes_with_little_memory(
    script, dtype, warmup_steps, tolerance, data, tmp_path
):
    values = settings(data, tmp_path / "one", max_steps=40, dtype=dtype, save_every=0)
    values |= {"warmup_steps": warmup_steps}
    one = run_here(script, **values)
    values |= {"out": str(tmp_path / "two"), "micro_batch_tokens": 300}
    run_command(script, processes=2, **values)
    torch.testing.assert_close(losses(one), losses(metrics(values["out"])), rtol=tolerance, atol=0)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_ends_in_the_same_bits(script, optimizer, data, tmp_path):
    values = settings(data, tmp_path / "straight", optimizer=optimizer, eval_every=2)
    straight = run_here(script, **values)
    values |= {"out": str(tmp_path / "resumed")}
    run_here(script, **values | {"max_steps": 2})
    resumed = run_here(script, **values, resume=True)
    ours, theirs = (
        load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_same_losses(straight, resumed, 0)


def test_checkpoint_of_two_processes_goes_on_in_one(data, tmp_path):
    values = settings(data, tmp_path / "resumed", dtype="float64")
    run_command("ppo_offline", processes=2, **values | {"max_steps": 3})
    resumed = run_here("ppo_offline", **values, resume=True)
    straight = run_here("ppo_offline", **values | {"out": str(tmp_path / "straight")})
    assert_same_losses(straight[4:], resumed[4:], 1e-12)


def test_resume_refuses_what_changed_and_starts_or_ends_where_it_should(data, tmp_path, capsys):
    values = settings(data, tmp_path / "out", max_steps=2)
    run_here("dpo", **values, resume=True)  # nothing there yet: starts
    with pytest.raises(common.UserError, match="not empty"):
        run_here("dpo", **values)
    with pytest.raises(common.UserError, match="--lr"):
        run_here("dpo", **values | {"lr": 1e-3}, resume=True)
    other = tmp_path / "other.jsonl"
    other.write_text((data / "test.jsonl").read_text())
    with pytest.raises(common.UserError, match="data"):
        run_here("dpo", **values | {"data": str(other)}, resume=True)
    with pytest.raises(common.UserError, match="script"):
        run_here("slic", **values, resume=True)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    run_here("dpo", **values, resume=True)
    assert "finished already" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_sft_loss_is_the_mean_over_all_tokens_of_the_global_batch(data, tmp_path):
    import sft

    values = settings(data, tmp_path / "out", max_steps=1, micro_batch_tokens=200)
    record = run_here("sft", **values)[1]
    config = sft.Config(**values)
    tokenizer = common.load_tokenizer(common.TOY / "model")
    examples = sft.make_examples(common.read_rows(str(data), "train", sft.FORMS), tokenizer, config)
    model = AutoModelForCausalLM.from_pretrained(common.TOY / "model")
    nats, tokens = 0.0, 0
    for example in sft.global_batch(examples, config, 0):
        (completion,) = example["completions_ids"]
        ids = torch.tensor([[*example["prompt_ids"].tolist(), *completion.tolist()]])
        logps = model(ids).logits[0, -len(completion) - 1 : -1].log_softmax(-1)
        nats -= logps.gather(1, ids[0, -len(completion) :, None]).sum().item()
        tokens += len(completion)
    assert record["tokens"] == tokens
    assert record["loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_ten_desirable_to_one_undesirable(data, tmp_path, capsys):
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:33]]
    rows = [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 11 == 0 else "chosen"]}
        | {"label": i % 11 != 0}
        for i, row in enumerate(lines)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for script in ("kto", "ppo_offline"):
        records = run_here(script, **settings(path, tmp_path / script, max_steps=0))
        assert len(records) == 5  # 30 desirable, six a step
        assert "30 desirable, 3 undesirable examples" in capsys.readouterr().err
        assert "eval_loss" not in records[-1]  # one file: nothing is held out


def change(folder: Path, **values) -> Path:
    """Change settings in a model's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def copy_of_toy(folder: Path) -> Path:
    shutil.copytree(common.TOY / "model", folder)
    return folder


def test_weights_that_are_not_there_are_named(data, tmp_path):
    model = copy_of_toy(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights = {name: value for name, value in weights.items() if "layers.1." not in name}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(common.UserError, match="its weights lack gpt_neox.layers.1"):
        run_here("dpo", **settings(data, tmp_path / "out", model=str(model)))
    assert not (tmp_path / "out").exists() and not (tmp_path / "reference").exists()
    model = change(copy_of_toy(tmp_path / "small"), vocab_size=100)
    with pytest.raises(common.UserError, match="more tokens than the model"):
        run_here("dpo", **settings(data, tmp_path / "out", model=str(model)))


def test_another_config_of_the_same_weights_is_another_reference(data, tmp_path):
    run_here("dpo", **settings(data, tmp_path / "one", max_steps=1))
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25}
    model = change(copy_of_toy(tmp_path / "model"), rope_parameters=rope)
    records = run_here("dpo", **settings(data, tmp_path / "two", max_steps=1, model=str(model)))
    assert records[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(list((tmp_path / "reference").iterdir())) == 4


def test_a_damaged_reference_is_computed_again(data, tmp_path):
    first = run_here("dpo", **settings(data, tmp_path / "one", max_steps=1))
    for file in (tmp_path / "reference").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    again = run_here("dpo", **settings(data, tmp_path / "two", max_steps=1))
    assert_same_losses(first, again, 0)


def test_what_cannot_be_resumed_is_named(data, tmp_path):
    values = settings(data, tmp_path / "out", max_steps=4, save_every=2)
    run_here("dpo", **values)
    record = tmp_path / "out" / "run.json"
    whole = record.read_text()
    unfinished = json.dumps(json.loads(whole) | {"finished": False})
    for damaged in ("", "[]", "{}", whole[:50], '{"settings": 3}'):
        record.write_text(damaged)
        with pytest.raises(common.UserError, match="run.json: is damaged"):
            run_here("dpo", **values, resume=True)
    record.write_text(unfinished)
    with pytest.raises(common.UserError, match="has 4 steps already"):
        run_here("dpo", **values | {"max_steps": 3}, resume=True)
    with FileLock(tmp_path / "out" / "run.lock"):
        with pytest.raises(common.UserError, match="another run is writing there"):
            run_here("dpo", **values | {"max_steps": 6}, resume=True)
    for file in (tmp_path / "out" / "checkpoints" / "step_00000004").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(common.UserError, match="step_00000004: cannot be read"):
        run_here("dpo", **values | {"max_steps": 6}, resume=True)


def test_numbers_that_are_not_finite_stop_the_run_and_save_nothing(data, tmp_path):
    values = settings(data, tmp_path / "out", lr=1e38, warmup_steps=0, save_every=1)
    with pytest.raises(FloatingPointError):
        run_here("dpo", **values)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not list((tmp_path / "out").glob("checkpoints/step_*"))


def test_two_processes_export_what_one_does(data, tmp_path):
    """A tied model with generation settings of its own."""
    model = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(common.TOY / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512}
    lm = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    lm.generation_config.update(do_sample=True, top_p=0.5, eos_token_id=tokenizer.eos_token_id)
    lm.save_pretrained(model)
    tokenizer.save_pretrained(model)
    values = settings(data, tmp_path / "one", model=str(model), dtype="float64", max_steps=2)
    run_here("dpo", **values | {"max_steps": 1})
    run_here("dpo", **values, resume=True)
    run_command("dpo", processes=2, **values | {"out": str(tmp_path / "two")})
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and "lm_head.weight" not in one
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    for name in ("generation_config.json", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_sft_then_alignment(data, tmp_path):
    run_here("sft", **settings(data, tmp_path / "sft"))
    for script, figure in {
        "kto": "eval_reward_margin",
        "dpo": "eval_reward_margin",
        "ppo_offline": "eval_log_ratio_margin",
        "slic": "eval_logp_margin",
    }.items():
        values = settings(data, tmp_path / script, model=str(tmp_path / "sft"))
        start = run_here(script, **values)[0]
        if script != "slic":  # policy and reference are both what SFT left
            assert abs(start[figure]) < 1e-5


def test_value_head_is_kept_in_checkpoints_and_left_out_of_the_model(data, tmp_path):
    run_here("ppo_offline", **settings(data, tmp_path / "ppo", max_steps=2))
    (checkpoint,) = (tmp_path / "ppo" / "checkpoints").iterdir()
    with safe_open(next(checkpoint.iterdir()), "pt") as saved:
        assert "model.value_head.weight" in saved.keys()
    assert not any("value_head" in name for name in load_file(tmp_path / "ppo/model.safetensors"))


def test_reference_column_is_shared_and_keyed_by_weights_rows_and_limits(data, tmp_path):
    reference = tmp_path / "reference"
    run_here("dpo", **settings(data, tmp_path / "dpo", max_steps=1))
    first = set(reference.iterdir())
    run_here("kto", **settings(data, tmp_path / "kto", max_steps=1))
    # Training rows are the same sequences, pair by pair; of the test rows too.
    assert set(reference.iterdir()) == first
    run_here(
        "dpo",
        **settings(data, tmp_path / "short", max_steps=1, max_length=40, max_prompt_length=20),
    )
    second = set(reference.iterdir())
    assert len(second) == len(first) + 2
    run_here("sft", **settings(data, tmp_path / "sft", max_steps=1))
    assert set(reference.iterdir()) == second  # it has no reference
    run_here(
        "dpo", **settings(data, tmp_path / "sft_dpo", max_steps=1, model=str(tmp_path / "sft"))
    )
    assert len(set(reference.iterdir())) == len(second) + 2


@pytest.mark.parametrize("kl, behind_a_prompt", [("zero", 2), ("mismatched", 4)])
def test_the_reference_of_both_halves_of_a_pair_is_one_row(
    kl, behind_a_prompt, data, tmp_path, monkeypatch
):
    """And of their partners, which have the same prompt; what comes out is each one's own."""
    lengths, make, passes = [], common.make_batch, []

    def watch(*given, **others):
        batch = make(*given, **others)
        lengths.extend(batch.layout.lengths if batch.layout else [])
        return batch

    def keep(policy, examples, run):
        lengths.clear()
        add(policy, examples, run)
        passes.append((len(lengths), {len(row) - 1 for row in lengths}))
        with torch.no_grad():
            for example in examples[:8]:
                alone = policy(make([{**example}], packed=True)).numpy()
                np.testing.assert_allclose(example["reference_logps"], alone, atol=1e-9)

    add = common.add_reference_logps
    monkeypatch.setattr(common, "make_batch", watch)
    monkeypatch.setattr(common, "add_reference_logps", keep)
    values = settings(data, tmp_path / "kto", dtype="float64", max_steps=1, kl=kl)
    run_here("kto", **values)
    assert passes == [(200, {behind_a_prompt}), (24, {behind_a_prompt})]


@pytest.mark.parametrize("script", SCRIPTS)
def test_real_rows(script, tmp_path):
    from archangel import data as archangel_data

    rows = next((ROOT / "tests" / "data").glob("hh*"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "archangel.data",
            "hh",
            "--input",
            str(rows),
            "--out",
            tmp_path / "hh",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert archangel_data
    records = run_here(
        script, **settings(tmp_path / "hh", tmp_path / "out", max_steps=2, batch_size=4)
    )
    assert len(records) == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
