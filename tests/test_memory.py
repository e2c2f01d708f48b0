"""The prediction of memory, against autograd's own count and against processes that ran."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

import common_v1 as common
from archangel import memory


def small(kind: str, layers: int, width: int = 256, vocabulary: int = 128):
    inner = 4 * width if kind == "gpt_neox" else int(2.6875 * width)  # as in the report's models
    return {"gpt_neox": GPTNeoXConfig, "llama": LlamaConfig}[kind](
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


def examples(count: int) -> list[dict]:
    """KTO's: one completion each, 256 tokens in all."""
    return [{"prompt_ids": np.arange(128), "completions_ids": [np.arange(128)]}] * count


def kept(kind: str, layers: int, bfloat16: bool) -> int:
    """Bytes that autograd keeps for 256 tokens, without the weights themselves."""
    model = AutoModelForCausalLM.from_config(small(kind, layers))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    common.use_packed(model, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        common.Policy(model, None, bfloat16)(common.make_batch(examples(1), packed=True))
    return sum(storages.values())


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
@pytest.mark.parametrize("number_bytes", [4, 2])
def test_what_a_block_keeps_is_what_autograd_counts(kind, number_bytes):
    a_block = kept(kind, 3, number_bytes == 2) - kept(kind, 2, number_bytes == 2)
    if number_bytes == 2:  # autocast keeps a copy of each matrix as well, counted elsewhere
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small(kind, 1))
        a_block -= sum(
            2 * p.numel() for p in model.base_model.layers[0].parameters() if p.dim() > 1
        )
    assert a_block / 256 / 256 == pytest.approx(memory.KEPT[kind][number_bytes], rel=0.03)


def test_states_are_split_and_activations_are_not():
    config = small("gpt_neox", 4)
    one, four = memory.predict(config, 1, 1000), memory.predict(config, 4, 1000)
    assert one["states"] == 4 * four["states"]
    assert one["activations"] == four["activations"] == 4 * 1000 * 256 * 38
    checkpointed = memory.predict(config, 1, 1000, checkpointing=True)
    assert checkpointed["activations"] == 1000 * 256 * (38 + 4 * 2)
    adamw = memory.predict(config, 1, 1000, optimizer="adamw")
    assert adamw["states"] * 3 == one["states"] * 4


@pytest.mark.parametrize(
    "name, billions", [("pythia-1.4b", 1.41), ("pythia-12b", 11.8), ("llama-30b", 32.5)]
)
def test_shapes_have_the_sizes_of_the_published_models(name, billions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(memory.shape(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_command_recomputes_only_where_it_must():
    settings = memory.Config()
    assert memory.command("llama-30b", 1, settings) is None
    assert memory.command("pythia-1.4b", 1, settings).endswith("--model pythia-1.4b")
    assert memory.command("llama-13b", 16, settings).startswith("torchrun --nnodes=2 --nproc_per")
    assert "--activation_checkpointing" in memory.command("llama-13b", 16, settings)


PROGRAM = """
import sys, json, torch, common_v1 as common
from archangel import memory
from transformers import AutoModelForCausalLM
sys.path.insert(0, "tests")
from test_memory import examples, small

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

peak = 0
def look(*_):
    global peak
    peak = max(peak, anonymous())

checkpointing = sys.argv[1] == "True"
config = small("gpt_neox", 6, 512, 2048)
batch = common.make_batch(examples(4), packed=True)
torch.set_num_threads(1)
before = anonymous()
policy = common.Policy(AutoModelForCausalLM.from_config(config), None, False).eval()
common.use_packed(policy.lm, torch.device("cpu"))
if checkpointing:
    blocks = list(policy.lm.base_model.layers)
    common.checkpoint_wrapper.apply_activation_checkpointing(
        policy, check_fn=blocks.__contains__
    )
for block in policy.lm.base_model.layers:
    block.register_full_backward_hook(look)
optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-4)
for _ in range(2):
    for _ in range(2):
        logps = policy(batch)
        look()
        logps.sum().neg().backward()
        look()
    optimizer.step()
    optimizer.zero_grad()
predicted = memory.predict(config, 1, 1024, "rmsprop", checkpointing, 4)
print(json.dumps([peak - before, sum(predicted.values())]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prediction_is_near_what_a_process_took(checkpointing):
    root = Path(common.__file__).parent
    words = [sys.executable, "-c", PROGRAM, str(checkpointing)]
    tight = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True, env=tight)
    measured, predicted = json.loads(done.stdout)
    assert predicted == pytest.approx(measured, rel=0.25), (measured, predicted)
