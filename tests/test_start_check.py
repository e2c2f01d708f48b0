"""The check at start: whether a model's numbers are right, and which layout it can use."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import (
    ARCHITECTURES,
    PACKABLE,
    ROOT,
    assert_same_metrics,
    one_process_group,
    plain_logps,
    random_examples,
    read_metrics,
    run_forked,
    tiny_model,
    write_toy_folder,
)
from transformers import GPTNeoXForCausalLM

import common
from archangel import packed
from archangel.packed import PackedLayout
from common import Example, Examples, PaddedLayout, UserError

CPU = torch.device("cpu")
PAIRS = random_examples([(3, [2, 2]), (8, [7, 9]), (5, [1, 4])])


@pytest.fixture(scope="module", autouse=True)
def process_group():
    with one_process_group():
        yield


def raise_first(error: UserError | None) -> None:
    """Run.raise_everywhere of a single process."""
    if error is not None:
        raise error


def make_run(bfloat16: bool = False, world_size: int = 1) -> SimpleNamespace:
    """What the check needs of a Run. Its printed lines are in run.lines."""
    lines = []
    return SimpleNamespace(
        config=SimpleNamespace(model="tiny"),
        model_path="tiny",
        device=CPU,
        dtype=torch.float32,
        bfloat16=bfloat16,
        world_size=world_size,
        layout=PaddedLayout(),
        info={"parameters": 0},
        lines=lines,
        print=lines.append,
        raise_everywhere=raise_first,
        print_model_summary=lambda: None,
    )


def make_example_set(examples: list[Example]) -> Examples:
    example_set = Examples()
    for example in examples:
        example_set.append(example)
    return example_set


def check(model, examples: list[Example], run: SimpleNamespace | None = None) -> SimpleNamespace:
    """Check a model. Returns the run, with its layout, record and lines."""
    run = run or make_run()
    policy = common.Policy(model, run.bfloat16)
    common.check_model_and_choose_layout(policy, [make_example_set(examples)], run)
    assert isinstance(run.layout, PackedLayout) == run.info["packed_rows"]
    return run


def wrap_forward(model, monkeypatch, wrapper) -> None:
    """Let the transformer's forward pass be wrapper(forward, **inputs)."""
    forward = model.base_model.forward

    def wrapped(input_ids=None, **inputs):
        return wrapper(forward, input_ids=input_ids, **inputs)

    monkeypatch.setattr(model.base_model, "forward", wrapped)


# ------------------------------------------------------------------------------ what is compared


def test_examples_to_check():
    """The longest of all sets with one more completion, then the beginning of a short example."""
    train_set = make_example_set(random_examples([(40, [5, 30]), (3, [2, 2])]))
    test_set = make_example_set(random_examples([(9, [70, 20]), (60, [1, 1])], seed=1))
    empty = Examples()
    longest, short = common.examples_to_check([train_set, empty, test_set])
    assert longest.prompt_ids == test_set[0].prompt_ids
    first, second, more = longest.completions_ids
    assert [first, second] == test_set[0].completions_ids
    assert more == second[-16:]
    assert short.prompt_ids == train_set[0].prompt_ids[:16]
    assert short.completions_ids == [ids[:16] for ids in train_set[0].completions_ids]


def test_mismatched_examples_are_checked():
    """KTO's mismatched completions may be longer than any of the data set's own examples."""
    train_set = make_example_set(random_examples([(3, [2]), (9, [2])]))
    train_set.mismatched = make_example_set(random_examples([(3, [30]), (9, [2])], seed=1))
    longest, _ = common.examples_to_check([train_set])
    assert longest.prompt_ids == train_set.mismatched[0].prompt_ids


def test_all_example_sets_are_checked():
    """The window of this model is too short for held-out examples only."""
    short = make_example_set(random_examples([(3, [4])]))
    long = make_example_set(random_examples([(20, [14])]))
    for example_sets, is_packed in (([short], True), ([short, long], False)):
        run = make_run()
        policy = common.Policy(tiny_model("mistral", sliding_window=20), bfloat16=False)
        common.check_model_and_choose_layout(policy, example_sets, run)
        assert run.info["packed_rows"] is is_packed


# ---------------------------------------------------------------------- models that can be packed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    model = tiny_model(name)
    own_attention = model.config._attn_implementation
    run = check(model, PAIRS)
    assert run.info["packed_rows"] is (name in PACKABLE)
    assert 0 <= run.info["self_check_error"] < 1e-4
    attention = model.config._attn_implementation
    assert attention == ("packed" if name in PACKABLE else own_attention)
    for parameter in model.parameters():
        assert parameter.grad is None


def test_bfloat16():
    model = tiny_model("gpt_neox")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)  # as smooth as a trained model
    run = check(model, PAIRS, make_run(bfloat16=True))
    assert run.info["packed_rows"] is True
    # The model's own passes over the same sequences round alike, up to the head.
    assert 0 < run.info["self_check_error"] < 3e-4
    assert 1e-5 < run.info["rounding_noise"] < 0.03


def test_float64():
    run = make_run()
    run.dtype = torch.float64
    assert check(tiny_model("llama", torch.float64), PAIRS, run).info["packed_rows"] is True


# -------------------------------------------------------------------- models that cannot be packed


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_short_window(name):
    model = tiny_model(name, sliding_window=4)
    assert check(model, PAIRS).info["packed_rows"] is False
    with torch.no_grad():
        plain = plain_logps(model, PAIRS)
        padded = common.completion_logps(model, common.make_batch(PAIRS))
    torch.testing.assert_close(padded, plain, atol=1e-4, rtol=0)


def test_window_against_longest_sequence():
    """Not against the example with most tokens: only the second one's sequences pass the window."""
    examples = random_examples([(4, [12, 12]), (22, [2, 2])])
    for chosen, is_packed in ((examples[:1], True), (examples[1:], False), (examples, False)):
        run = check(tiny_model("mistral", sliding_window=20), chosen)
        assert run.info["packed_rows"] is is_packed


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(("window", "is_packed"), [(72, False), (96, True)])
def test_window_late_in_completion(window, is_packed, bfloat16):
    """With the window of 72 the first twelve tokens of each completion are right."""
    examples = random_examples([(60, [20, 20])])
    run = check(tiny_model("mistral", sliding_window=window), examples, make_run(bfloat16))
    assert run.info["packed_rows"] is is_packed


@pytest.mark.parametrize("name", ["position_ids", "segment_lengths"])
def test_ignored_argument(name, monkeypatch):
    model = tiny_model("gpt_neox")

    def ignore(forward, **inputs):
        inputs.pop(name, None)
        return forward(**inputs)

    wrap_forward(model, monkeypatch, ignore)
    assert check(model, PAIRS).info["packed_rows"] is False


def test_other_example_is_visible(monkeypatch):
    """Each example has one completion, so that only another example could be attended to."""
    model = tiny_model("gpt_neox")
    examples = random_examples([(3, [2]), (8, [7])])
    assert check(model, examples).info["packed_rows"] is True

    def merge_examples(forward, segment_lengths=None, **inputs):
        if segment_lengths is not None:
            first, *others = segment_lengths
            segment_lengths = [[*first, *map(sum, others)]]
        return forward(segment_lengths=segment_lengths, **inputs)

    model = tiny_model("gpt_neox")
    wrap_forward(model, monkeypatch, merge_examples)
    assert check(model, examples).info["packed_rows"] is False


def test_short_convolution():
    """Its first tokens see the completion before, even if each example has a single completion.

    So it matters for KTO, whose reference pass computes both completions of a pair together.
    """
    model = tiny_model("lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3)
    examples = random_examples([(40, [20]), (42, [20])])
    assert check(model, examples, make_run(bfloat16=True)).info["packed_rows"] is False


@pytest.mark.parametrize("world_size", [1, 2])
def test_unsupported_attention(world_size, monkeypatch):
    """It is known before a forward pass, so that several processes continue too."""

    def gather(reasons, reason) -> None:
        reasons[:] = [reason] * len(reasons)

    monkeypatch.setattr(dist, "all_gather_object", gather)
    model = tiny_model("bloom", n_layer=1, n_head=4)
    own_attention = model.config._attn_implementation
    with pytest.raises(ValueError):
        packed.use_packed_attention(model, CPU)
    run = check(model, PAIRS, make_run(world_size=world_size))
    assert run.info["packed_rows"] is False
    assert model.config._attn_implementation == own_attention


# --------------------------------------------------------------------- a packed pass that fails


@pytest.mark.parametrize("error", [TypeError, AttributeError, RuntimeError])
def test_refused_argument(error, monkeypatch):
    model = tiny_model("gpt_neox")
    own_attention = model.config._attn_implementation

    def refuse(forward, **inputs):
        if inputs.get("position_ids") is not None:
            raise error("no such argument\nand more lines")
        return forward(**inputs)

    wrap_forward(model, monkeypatch, refuse)
    run = check(model, PAIRS)
    assert run.info["packed_rows"] is False
    assert 0 <= run.info["self_check_error"] < 1e-4
    assert model.config._attn_implementation == own_attention
    printed = "\n".join(run.lines)
    assert "no such argument" in printed
    assert "and more lines" not in printed

    # FSDP does not recover from an unfinished forward pass.
    with pytest.raises(UserError, match="--model tiny.*no such argument") as caught:
        check(model, PAIRS, make_run(world_size=2))
    assert "\n" not in str(caught.value)


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad_hidden):
        raise RuntimeError("no kernel for this shape")


def test_failing_backward(monkeypatch):
    """A GPU compiles its kernels for the backward pass only then."""
    model = tiny_model("gpt_neox")

    def fail_in_backward(forward, **inputs):
        outputs = forward(**inputs)
        if "segment_lengths" in inputs:
            outputs.last_hidden_state = FailsInBackward.apply(outputs.last_hidden_state)
        return outputs

    wrap_forward(model, monkeypatch, fail_in_backward)
    run = check(model, PAIRS)
    assert run.info["packed_rows"] is False
    assert model.config._attn_implementation == "sdpa"
    assert "no kernel for this shape" in "\n".join(run.lines)


def test_nan_when_packed(monkeypatch):
    model = tiny_model("gpt_neox")

    def spoil(forward, **inputs):
        outputs = forward(**inputs)
        if "segment_lengths" in inputs:
            outputs.last_hidden_state = outputs.last_hidden_state * torch.nan
        return outputs

    wrap_forward(model, monkeypatch, spoil)
    assert check(model, PAIRS).info["packed_rows"] is False


def test_out_of_memory(monkeypatch):
    """It is not taken for a model that cannot be packed."""
    model = tiny_model("gpt_neox")

    def run_out_of_memory(forward, **inputs):
        if "segment_lengths" in inputs:
            raise torch.OutOfMemoryError("out of memory")
        return forward(**inputs)

    wrap_forward(model, monkeypatch, run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        check(model, PAIRS)


def test_other_process_cannot_pack(monkeypatch):
    """All processes use the same layout."""

    def gather(reasons, reason) -> None:
        reasons[:] = [reason, "a reason of process 1"]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    model = tiny_model("gpt_neox")
    run = check(model, PAIRS, make_run(world_size=2))
    assert run.info["packed_rows"] is False
    assert model.config._attn_implementation == "sdpa"
    assert "a reason of process 1" in "\n".join(run.lines)


# ------------------------------------------------------------------------- models that are refused


class ScalesLogits(GPTNeoXForCausalLM):
    """It scales its logits after the head, which its configuration does not mention."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 0.9
        return outputs


def test_unknown_logit_scaling():
    model = tiny_model("gpt_neox")
    model.__class__ = ScalesLogits
    with pytest.raises(UserError, match="--model tiny") as caught:
        check(model, PAIRS)
    assert "\n" not in str(caught.value)


def test_nan_weights():
    model = tiny_model("gpt_neox")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(UserError, match="--model tiny"):
        check(model, PAIRS)


def test_process_that_cannot_pack(tmp_path):
    """One of two real processes cannot pack: both train with padding, to the numbers of one."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import common, dpo\n"
        "from archangel import packed\n"
        "def refuse(model, device):\n"
        "    raise ValueError('not on this process')\n"
        "if os.environ['RANK'] == '1':\n"
        "    packed.use_packed_attention = refuse\n"
        "common.run_script(dpo.train, dpo.Config, '')\n"
    )
    settings = {"model": "toy", "data": write_toy_folder(tmp_path, train=20)}
    settings |= {"dtype": "float64", "batch_size": 6, "max_steps": 2, "save_every": 0}
    run_forked("dpo", tmp_path / "one", **settings)
    run_forked(tmp_path / "program", tmp_path / "two", processes=2, **settings)
    assert_same_metrics(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), 1e-12)
    for name, is_packed in (("one", True), ("two", False)):
        info = json.loads((tmp_path / name / "run.json").read_text())
        assert info["packed_rows"] is is_packed


# ------------------------------------------------------------------------------------- bfloat16


def test_logits_that_bfloat16_would_round(monkeypatch):
    """The head's product is not rounded, in our forward pass and in the model's own one.

    Logits are near 20 here, where bfloat16 keeps multiples of 0.125.
    """
    model = tiny_model("gpt_neox")
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)
        hidden = model.base_model(torch.arange(10, 20)[None]).last_hidden_state
        head.weight.mul_(20 / head(hidden).abs().max())
    head_outputs = []
    head_logits = common.head_logits

    def remember(head, hidden):
        head_outputs.append(head_logits(head, hidden))
        return head_outputs[-1]

    monkeypatch.setattr(common, "head_logits", remember)
    policy = common.Policy(model, bfloat16=True)
    micro_batch = common.make_batch([Example(list(range(10, 15)), [list(range(15, 20))])])
    with torch.no_grad():
        ours = policy(micro_batch)
        own = policy(micro_batch, from_logits=True)
    for logits in head_outputs:
        assert logits.dtype == torch.float32
        assert (logits != logits.bfloat16()).float().mean() > 0.9
    assert len(head_outputs) == 2
    torch.testing.assert_close(ours, own, atol=1e-4, rtol=0)
    assert not head._forward_hooks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_residual_stream(name):
    """It is in float32 although the weights are in bfloat16, as FSDP casts them."""
    model = tiny_model(name, torch.bfloat16)
    run = make_run(bfloat16=True)
    run.config.activation_checkpointing = False
    policy = common.prepare_policy(common.Policy(model, bfloat16=True), run)
    seen = []
    for layer in common.transformer_layers(policy):
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].dtype))
    policy(common.make_batch(PAIRS)).sum().backward()
    assert len(seen) >= 1
    assert set(seen) == {torch.float32}


def test_noise_is_allowed(monkeypatch):
    """A model that rounds much is not refused, whether padded or packed: its noise is measured."""
    model = tiny_model("gpt_neox")
    noise = 0.06

    def add_noise(forward, **inputs):
        outputs = forward(**inputs)
        if outputs.last_hidden_state.shape[0] > 1 or "segment_lengths" in inputs:
            generator = torch.Generator().manual_seed(inputs["input_ids"].numel())
            hidden = outputs.last_hidden_state
            outputs.last_hidden_state = hidden + noise * torch.randn(
                hidden.shape, generator=generator
            )
        return outputs

    wrap_forward(model, monkeypatch, add_noise)
    run = check(model, PAIRS, make_run(bfloat16=True))
    assert 0.03 < run.info["rounding_noise"] < 0.2
    assert run.info["packed_rows"] is True


def test_numbers_that_depend_on_the_batch(monkeypatch):
    model = tiny_model("gpt_neox")

    def mix(forward, **inputs):
        outputs = forward(**inputs)
        hidden = outputs.last_hidden_state
        outputs.last_hidden_state = hidden + hidden.mean(0)
        return outputs

    wrap_forward(model, monkeypatch, mix)
    with pytest.raises(UserError, match="--model tiny.*other sequences in a batch"):
        check(model, PAIRS)


@pytest.mark.parametrize(
    "longest", [(3, [2, 2]), (160, [64, 64]), (160, [100, 100]), (300, [200, 250])]
)
def test_kernels_are_compiled_for_two_sizes(longest, monkeypatch):
    """A GPU compiles flex attention for the first size, and for all sizes at the second."""
    model = tiny_model("gpt_neox")
    packed.use_packed_attention(model, CPU)
    sizes = []  # to which a GPU pads, and whether the pass has a gradient

    def watch(forward, **inputs):
        size = packed.padded_length(inputs["input_ids"].numel(), "cuda")
        sizes.append((size, torch.is_grad_enabled()))
        return forward(**inputs)

    wrap_forward(model, monkeypatch, watch)
    sample = common.examples_to_check([make_example_set(random_examples([longest, (5, [4, 4])]))])
    common.compile_packed_attention(common.Policy(model, bfloat16=False), sample, make_run())
    first, second = sizes[0][0], sizes[2][0]
    assert sizes == [(first, False), (first, True), (second, False), (second, True)]
    assert first != second


def test_too_many_compilations_are_an_error(monkeypatch):
    """By default torch computes the whole matrix of scores instead, and says nothing."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    packed.use_packed_attention(tiny_model("gpt_neox"), torch.device("cuda"))
    assert torch._dynamo.config.fail_on_recompile_limit_hit is True
