"""The prediction of memory, compared with autograd's own count and with processes that ran."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import ROOT, error_line, tiny_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

import common
from archangel import memory, packed
from archangel.errors import UserError

LONG = bool(os.environ.get("HALOS_LONG"))


def small_config(
    model_type: str, layers: int, width: int = 256, vocab_size: int = 128
) -> PreTrainedConfig:
    if model_type == "gpt_neox":
        config_class = GPTNeoXConfig
        inner_width = 4 * width
    else:
        config_class = LlamaConfig
        inner_width = int(2.6875 * width)  # as in the report's models
    return config_class(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=inner_width,
        vocab_size=vocab_size,
        tie_word_embeddings=False,
    )


def packed_batch(num_examples: int) -> common.MicroBatch:
    """Examples of 256 tokens, each with one completion, as of KTO, in the packed layout."""
    examples = [common.Example(list(range(128)), [list(range(128))])] * num_examples
    places = range(num_examples)
    return common.make_micro_batch(examples, places, packed.PackedLayout(), "cpu")


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama"])
@pytest.mark.parametrize("number_bytes", [4, 2])
def test_kept_bytes(model_type, number_bytes):
    """Those of the report's models are what autograd counts, per token and unit of width."""
    counted = memory.count_kept_bytes(small_config(model_type, 3), number_bytes)
    expected = memory.KEPT_BYTES[model_type][number_bytes]
    assert counted / 256 == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "phi"])
def test_any_model(name, tmp_path, capsys):
    """From its configuration alone."""
    tiny_model(name).config.save_pretrained(tmp_path)
    memory.main(memory.Config(model=str(tmp_path)))
    table, command = capsys.readouterr().out.split("\n\n", 1)
    assert f"| {tmp_path} |" in table
    assert f"kto.py --model {tmp_path}" in command


def test_too_large(tmp_path, capsys):
    config = small_config("llama", 80, width=8192, vocab_size=128_000)
    config.intermediate_size = 28_672
    config.save_pretrained(tmp_path)
    memory.kept_bytes.cache_clear()
    with mock.patch.object(memory, "count_kept_bytes", lambda config, number_bytes: 8192 * 58.0):
        memory.main(memory.Config(model=str(tmp_path), gpu_gib=40))
    assert "on each of 16 GPUs" in capsys.readouterr().out


def test_no_configuration(tmp_path):
    with pytest.raises(UserError, match="no configuration"):
        memory.main(memory.Config(model=str(tmp_path)))


def test_predict():
    """States are split over processes, activations are not."""
    config = small_config("gpt_neox", 4)
    kept = 256 * 38  # bytes of a block per token
    one = memory.predict(config, 1, 1000, kept_per_token=kept)
    four = memory.predict(config, 4, 1000, kept_per_token=kept)
    assert one["states"] == 4 * four["states"]
    assert one["activations"] == four["activations"] == 4 * 1000 * 256 * 38
    checkpointed = memory.predict(config, 1, 1000, checkpointing=True, kept_per_token=kept)
    assert checkpointed["activations"] == 1000 * 256 * (38 + 4 * 4)
    adamw = memory.predict(config, 1, 1000, optimizer="adamw", kept_per_token=kept)
    assert adamw["states"] * 3 == one["states"] * 4


@pytest.mark.parametrize(
    "name, billions", [("pythia-1.4b", 1.41), ("pythia-12b", 11.8), ("llama-30b", 32.5)]
)
def test_model_config(name, billions):
    """It has the size of the published model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(memory.model_config(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_command():
    """It has activation checkpointing only where that is needed."""
    settings = memory.Config()
    assert memory.command("llama-30b", 1, settings) is None
    assert memory.command("pythia-1.4b", 1, settings).endswith("--model pythia-1.4b")
    two_nodes = (
        "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 --nproc_per_node=8"
    )
    assert memory.command("llama-13b", 16, settings).startswith(two_nodes)
    assert "--activation_checkpointing" in memory.command("llama-13b", 16, settings)


PROGRAM = """
import json
import sys

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, "tests")
import common
from archangel import memory, packed
from test_memory import packed_batch, small_config


def anonymous_bytes():
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024


peak = 0


def look(*_):
    global peak
    peak = max(peak, anonymous_bytes())


checkpointing = sys.argv[1] == "True"
config = small_config("gpt_neox", 6, 512, 2048)
micro_batch = packed_batch(4)
torch.set_num_threads(1)
before = anonymous_bytes()
policy = common.Policy(AutoModelForCausalLM.from_config(config), bfloat16=False).eval()
packed.use_packed_attention(policy.lm, torch.device("cpu"))
if checkpointing:
    layers = common.transformer_layers(policy)
    common.apply_activation_checkpointing(policy, check_fn=lambda module: module in layers)
for layer in policy.lm.base_model.layers:
    layer.register_full_backward_hook(look)
optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-4)
for _ in range(2):  # steps
    for _ in range(2):  # micro-batches
        logps = policy(micro_batch)
        look()
        logps.sum().neg().backward()
        look()
    optimizer.step()
    optimizer.zero_grad()
kept = 512 * memory.KEPT_BYTES["gpt_neox"][4]
predicted = memory.predict(config, 1, 1024, "rmsprop", checkpointing, 4, kept_per_token=kept)
print(json.dumps([peak - before, sum(predicted.values())]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("checkpointing", [False, True] if LONG else [False])
def test_predict_is_near_measured(checkpointing):
    # With this setting freed memory is returned to the system at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(checkpointing)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    measured, predicted = json.loads(done.stdout)
    assert predicted == pytest.approx(measured, rel=0.25), (measured, predicted)


def test_main_prints_all_models(capsys):
    memory.main(memory.Config())
    table, commands = capsys.readouterr().out.split("\n\n", 1)
    for name in memory.SHAPES:
        assert f"| {name} |" in table
        assert name in commands


def test_command_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory", "--gpu_gib", "many"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(memory.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert error_line(capsys.readouterr().err).startswith("error: argument --gpu_gib")
