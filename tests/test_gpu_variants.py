"""archangel.gpu_variants on a CPU: each idea trains as the trainer does, and ends with its context.

Whether it is faster can only be seen on a GPU.
"""

import os

import pytest
import torch
from helpers import assert_same_metrics, metric, read_record, train_here, write_toy_folder
from torch._dynamo.utils import counters
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import common
from archangel import gpu_variants, packed

LONG = bool(os.environ.get("HALOS_LONG"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> str:
    return write_toy_folder(tmp_path_factory.mktemp("small_data"), train=20, test=4)


def settings_of(name: str, data: str) -> dict:
    """Settings for which a variant computes what the trainer does."""
    settings = {"model": "toy", "data": data, "max_steps": 3, "batch_size": 8, "lr": 1e-4}
    settings["warmup_steps"] = 0
    settings["dtype"] = "bfloat16" if name == "bfloat16 head" else "float32"
    if name == "fused optimizer":
        settings["optimizer"] = "adamw"
    return settings


def replaced_names() -> list:
    """What the variants replace."""
    return [
        common.prepare_policy,
        common.make_optimizer,
        common.head_logits,
        packed.PackedLayout,
        packed.use_packed_attention,
        ALL_ATTENTION_FUNCTIONS["packed"],
        ALL_ATTENTION_FUNCTIONS["packed_flex"],
    ]


# Tracing all layers takes 40 seconds.
SHORT = [name for name in gpu_variants.VARIANTS if name != "compiled layers"]


@pytest.mark.parametrize("name", gpu_variants.VARIANTS if LONG else SHORT)
def test_variant(name, small_data, tmp_path):
    settings = settings_of(name, small_data)
    expected = train_here("dpo", tmp_path / "expected", **settings)
    before = replaced_names()
    counters.clear()
    with gpu_variants.VARIANTS[name](CPU):
        is_changed = replaced_names() != before
        found = train_here("dpo", tmp_path / "found", **settings)
    assert is_changed is (name != "")
    assert replaced_names() == before
    assert (
        read_record(tmp_path / "found")["packed_rows"] is True
    )  # no fall-back to the padded layout
    assert (counters["stats"]["unique_graphs"] > 0) is name.startswith("compiled")
    if name == "bfloat16 head":
        losses = metric(found, "loss")
        assert not torch.equal(losses, metric(expected, "loss"))
        torch.testing.assert_close(losses, metric(expected, "loss"), atol=0.002, rtol=0)
    else:
        assert_same_metrics(expected, found, 1e-4)


def test_segments():
    """Keys of a part are the prompt's and its own."""
    segments = gpu_variants.find_segments([[2, 3, 1], [1], [2, 1]], CPU)
    keys = segments.key_places.split(segments.key_ends.diff().tolist())
    assert [part.tolist() for part in keys] == [[0, 1, 2, 3, 4], [0, 1, 5], [6], [7, 8, 9]]
    assert segments.query_ends.tolist() == [0, 5, 6, 7, 10]
    assert (segments.most_queries, segments.most_keys) == (5, 5)


def test_head_gradient():
    """The gradients of a product of bfloat16 matrices are those of the float32 product, rounded."""
    torch.manual_seed(0)
    a = torch.randn(5, 16, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(7, 16, dtype=torch.bfloat16, requires_grad=True)
    product = gpu_variants.ProductInFloat32.apply(a, b)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, a.float() @ b.float().T)
    factors = torch.randn(5, 7)
    (product * factors).sum().backward()
    torch.testing.assert_close(a.grad.float(), factors @ b.float(), atol=0.05, rtol=0.02)
    torch.testing.assert_close(b.grad.float(), factors.T @ a.float(), atol=0.05, rtol=0.02)
