"""Token ids to log-probabilities, against a full log-softmax of one sequence at a time."""

import copy
import functools
import inspect
import textwrap
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    ARCHITECTURES,
    HIDDEN_SIZE,
    PACKABLE,
    VOCAB_SIZE,
    plain_logps,
    random_examples,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from archangel import packed
from archangel.packed import PackedLayout
from common import Example, MicroBatch, PaddedLayout, TokenLogps, completion_logps, make_batch

LAYOUTS = {"padded": PaddedLayout(), "packed": PackedLayout()}
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
RAGGED = random_examples([(5, [4, 7]), (1, [3]), (9, [1, 2, 6]), (3, [8, 1]), (2, [1])])


def collate(examples: list[Example], layout_name: str) -> MicroBatch:
    return common.make_micro_batch(examples, range(len(examples)), LAYOUTS[layout_name], CPU)


def collate_for_gpu(examples: list[Example], monkeypatch) -> MicroBatch:
    """The packed micro-batch that a GPU gets, but with its tensors on the CPU."""
    torch_on_gpu = SimpleNamespace(**vars(torch))
    torch_on_gpu.device = lambda _: CUDA
    with monkeypatch.context() as patch:
        patch.setattr(packed, "torch", torch_on_gpu)
        return collate(examples, "packed")


@functools.cache
def cached_model(name: str, dtype: torch.dtype = torch.float32, layout_name: str = "padded"):
    """A tiny model for tests that do not change it, with the attention that the layout needs."""
    model = tiny_model(name, dtype)
    if layout_name == "packed":
        packed.use_packed_attention(model, CPU)
    return model


def compute_gradients(model, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient by parameter of a sum of logps in which every token has another weight."""
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return gradients


# ------------------------------------------------------------------- against plain transformers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padded_equals_plain(name):
    model = cached_model(name)
    with torch.no_grad():
        plain = plain_logps(model, RAGGED)
        logps = completion_logps(model, make_batch(RAGGED))
    assert plain.std() > 0.4, "too flat to tell right from wrong"
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_equals_plain(name):
    model = cached_model(name, layout_name="packed")
    with torch.no_grad():
        plain = plain_logps(cached_model(name), RAGGED)
        from_packed = completion_logps(model, collate(RAGGED, "packed"))
        from_padded = completion_logps(model, collate(RAGGED, "padded"))  # the same model
    torch.testing.assert_close(from_packed, plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(from_padded, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_float64(layout_name):
    model = cached_model("gpt_neox", torch.float64, layout_name)
    with torch.no_grad():
        plain = plain_logps(cached_model("gpt_neox", torch.float64), RAGGED)
        logps = completion_logps(model, collate(RAGGED, layout_name))
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, plain, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("name", "layout_name"),
    [
        ("gpt_neox", "padded"),
        ("gpt_neox", "packed"),
        ("llama_tied", "padded"),
        ("llama_tied", "packed"),
        ("gemma2", "padded"),
        ("phi", "padded"),
        ("phi", "packed"),
    ],
)
def test_gradients_equal_plain(name, layout_name, monkeypatch):
    """Through several chunks of the output head."""
    model = cached_model(name)
    plain = compute_gradients(model, plain_logps(model, RAGGED))
    assert max(gradient.abs().max() for gradient in plain.values()) > 0.1

    model = cached_model(name, layout_name=layout_name)
    monkeypatch.setattr(common, "MAX_LOGITS", 3 * VOCAB_SIZE)
    ours = compute_gradients(model, completion_logps(model, collate(RAGGED, layout_name)))
    assert ours.keys() == plain.keys()
    for parameter_name, gradient in plain.items():
        atol = 1e-4 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(ours[parameter_name], gradient, atol=atol, rtol=0)


def test_hidden_states():
    model = cached_model("gpt_neox")
    micro_batch = make_batch(RAGGED)
    with torch.no_grad():
        logps, hidden = completion_logps(model, micro_batch, return_hidden=True)
        all_logps = model.get_output_embeddings()(hidden).log_softmax(-1)
    assert hidden.shape == (len(logps), HIDDEN_SIZE)
    expected = all_logps.gather(1, micro_batch.targets[:, None]).squeeze(1)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=0)


def test_docstring_example():
    docstring = inspect.cleandoc(completion_logps.__doc__)
    lines = [line for line in docstring.splitlines() if line.startswith("    ")]
    names = {**vars(common), "torch": torch, "model": cached_model("gpt_neox")}
    exec(textwrap.dedent("\n".join(lines)), names)
    assert len(names["ours"]) == 2
    torch.testing.assert_close(names["ours"], names["plain"], atol=1e-5, rtol=0)


def smooth_model(dtype: torch.dtype = torch.float32):
    """A model as smooth as a trained one, so that bfloat16 is close; the others are rougher."""
    model = tiny_model("gpt_neox")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)
    return model.to(dtype)


def test_bfloat16():
    micro_batch = make_batch(RAGGED)
    with torch.no_grad():
        exact = plain_logps(smooth_model(), RAGGED)
        with_weights = completion_logps(smooth_model(torch.bfloat16), micro_batch)
        with_autocast = common.Policy(smooth_model(), bfloat16=True)(micro_batch)
        without_autocast = common.Policy(smooth_model(), bfloat16=False)(micro_batch)
    assert exact.std() > 0.2
    torch.testing.assert_close(without_autocast, exact, atol=1e-4, rtol=0)
    for logps in (with_weights, with_autocast):
        assert logps.dtype == torch.float32
        assert logps.isfinite().all()
        errors = (logps - exact).abs()
        assert 1e-4 < errors.mean() < 0.08
        # A bfloat16 value has 8 bits. More of them show that the softmax was taken in float32.
        assert (logps != logps.bfloat16().float()).any()


def test_from_logits():
    """The model's own forward pass, which the check at start compares with."""
    policy = common.Policy(cached_model("cohere"), bfloat16=False)
    with torch.no_grad():
        logps = policy(make_batch(RAGGED), from_logits=True)
        plain = plain_logps(cached_model("cohere"), RAGGED)
    torch.testing.assert_close(logps, plain, atol=1e-4, rtol=0)


def test_dropout_is_off(monkeypatch):
    """GPT-2 has a dropout of 0.1 by default, and a model may arrive in training mode."""
    model = tiny_model("gpt2").train()
    micro_batch = make_batch(RAGGED)
    with torch.no_grad():
        first = completion_logps(model, micro_batch)
        second = completion_logps(model, micro_batch)
    assert not torch.equal(first, second), "this model has no dropout"

    monkeypatch.setattr(common, "load_language_model", lambda path, dtype: model)
    run = SimpleNamespace(
        rank=0,
        world_size=1,
        device=CPU,
        dtype=torch.float32,
        bfloat16=False,
        model_path="model",
        info={},
        raise_everywhere=lambda error: None,
        config=SimpleNamespace(activation_checkpointing=False),
    )
    policy = common.load_policy(run)
    assert torch.equal(policy(micro_batch), policy(micro_batch))


# ------------------------------------------------------------------------------ the output head


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_head_chunks(chunk_size, with_gradient, monkeypatch):
    """The head gets positions that predict a completion token, no others, a chunk at a time."""
    model = cached_model("gpt_neox")
    plain = plain_logps(model, RAGGED).detach()
    num_seen = []
    head_logits = common.head_logits

    def count(head, hidden):
        num_seen.append(len(hidden))
        return head_logits(head, hidden)

    max_logits = chunk_size * VOCAB_SIZE + 1
    # Without gradient it takes an eighth.
    monkeypatch.setattr(common, "MAX_LOGITS", max_logits if with_gradient else 8 * max_logits)
    monkeypatch.setattr(common, "head_logits", count)
    with torch.set_grad_enabled(with_gradient):
        logps = completion_logps(model, make_batch(RAGGED))
    num_in_forward = sum(num_seen)
    if with_gradient:
        logps.sum().backward()
    torch.testing.assert_close(logps.detach(), plain, atol=1e-4, rtol=0)
    assert num_in_forward == len(plain)
    assert max(num_seen) == min(chunk_size, len(plain))
    # Several chunks are computed again in the backward pass, so that only one is in memory.
    recomputed = with_gradient and chunk_size < len(plain)
    assert sum(num_seen) == (2 * len(plain) if recomputed else len(plain))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_smallest_chunk(with_gradient, monkeypatch):
    """Even a limit below the logits of one token leaves chunks of one token."""
    monkeypatch.setattr(common, "MAX_LOGITS", 1)
    model = cached_model("gpt_neox")
    with torch.set_grad_enabled(with_gradient):
        logps = completion_logps(model, make_batch(RAGGED))
    plain = plain_logps(model, RAGGED)
    torch.testing.assert_close(logps, plain, atol=1e-4, rtol=0)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**31), st.sampled_from([0, 50, 1e4]))
def test_token_logps(num_tokens, vocab_size, seed, shift):
    """Equal to cross-entropy, values and gradient; the exponential of large logits overflows."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, vocab_size, dtype=torch.float64, generator=generator)
    logits = logits * 30 + shift
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    weights = torch.randn(num_tokens, dtype=torch.float64, generator=generator)

    expected_leaf = logits.clone().requires_grad_()
    expected = -torch.nn.functional.cross_entropy(expected_leaf, targets, reduction="none")
    (expected * weights).sum().backward()

    leaf = logits.clone().requires_grad_()
    logps, _ = TokenLogps.apply(leaf * 1, targets)  # like a head's output, leaf * 1 is not a leaf
    (logps * weights).sum().backward()
    torch.testing.assert_close(logps, expected, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(leaf.grad, expected_leaf.grad, atol=1e-10, rtol=0)


def test_token_logps_second_backward():
    """It is refused, since the first one has overwritten the logits."""
    logits = torch.zeros(2, 3, requires_grad=True) * 1
    logps, _ = TokenLogps.apply(logits, torch.tensor([0, 1]))
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


# --------------------------------------------------------------------- the attention of a GPU


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_block_mask(lengths, padding):
    """Against the rule for every query and key: own prompt and own completion, nothing later."""
    segments = []  # of each token: the number of its example, and of its segment in it
    for example_number, segment_lengths in enumerate(lengths):
        for segment_number, length in enumerate(segment_lengths):
            segments += [(example_number, segment_number)] * length
    num_tokens = len(segments)
    total = num_tokens + padding
    mask = packed.make_block_mask(lengths, padding, CPU)
    assert mask.shape == (1, 1, total, total)
    zero = torch.tensor(0)
    queries = torch.arange(total)[:, None]
    keys = torch.arange(total)
    found = mask.mask_mod(zero, zero, queries, keys)  # (total, total)
    for query in range(num_tokens):
        example_number, segment_number = segments[query]
        visible = [(example_number, 0), (example_number, segment_number)]
        for key in range(total):
            may_attend = key <= query and segments[key] in visible
            assert found[query, key] == may_attend, (query, key)
    # A query of padding attends to padding alone, and at least to itself: no softmax of nothing.
    assert not found[num_tokens:, :num_tokens].any()
    assert found.diagonal().all()


def test_collate_for_gpu(monkeypatch):
    micro_batch = collate_for_gpu(RAGGED, monkeypatch)
    on_cpu = collate(RAGGED, "packed")
    num_tokens = on_cpu.inputs["input_ids"].shape[1]
    assert num_tokens == 53
    for name in ("input_ids", "position_ids"):
        ids = micro_batch.inputs[name]
        assert ids.shape == (1, 256)
        assert torch.equal(ids[:, :num_tokens], on_cpu.inputs[name])
        assert not ids[:, num_tokens:].any()
    assert micro_batch.inputs["attention_mask"].shape == (1, 1, 256, 256)
    assert torch.equal(micro_batch.predictors, on_cpu.predictors)
    assert torch.equal(micro_batch.targets, on_cpu.targets)


def test_padded_length():
    """On a GPU whole blocks, at least two."""
    assert [packed.padded_length(n, "cuda") for n in (1, 256, 257, 1000)] == [256, 256, 384, 1024]
    assert packed.padded_length(257, "cpu") == 257


@pytest.mark.parametrize("name", ["gpt_neox", "llama_tied"])
def test_flex_attention(name, monkeypatch):
    """Equal to the attention of a CPU, forward and backward, and compiled a few times only.

    Here it is traced, not compiled to kernels. The micro-batches have many sizes, one of them a
    single short example: at the ninth compilation torch would give up, mention it in its log only,
    and compute all scores.
    """
    import torch.nn.attention.flex_attention as torch_flex
    import transformers.integrations.flex_attention as transformers_flex

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    flex_attention = torch.compile(torch_flex.flex_attention, backend=backend)
    monkeypatch.setattr(
        transformers_flex, "WrappedFlexAttention", lambda training: lambda: flex_attention
    )
    # torch refuses gradients on a CPU, for which it has no kernel.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)

    cpu_model = tiny_model(name)
    packed.use_packed_attention(cpu_model, CPU)
    gpu_model = tiny_model(name)
    packed.use_packed_attention(gpu_model, CUDA)
    assert gpu_model.config._attn_implementation != cpu_model.config._attn_implementation
    random = Random(0)
    for count in (12, 1, 40, 3, 1, 2, 30, 7):
        shapes = []
        for _ in range(count):
            shapes.append((random.randint(1, 20), random.choices(range(1, 20), k=2)))
        examples = random_examples(shapes, seed=count)
        results = []
        for model, micro_batch in (
            (cpu_model, collate(examples, "packed")),
            (gpu_model, collate_for_gpu(examples, monkeypatch)),
        ):
            model.zero_grad()
            logps = completion_logps(model, micro_batch)
            logps.square().mean().backward()
            with torch.no_grad():
                without_gradient = completion_logps(model, micro_batch)
            gradients = [parameter.grad for parameter in model.parameters()]
            results.append([logps.detach(), without_gradient, *gradients])
        for on_cpu, on_gpu in zip(*results):
            torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=1e-4)
    # With and without gradient, each for the first size and then for all others.
    assert 0 < len(graphs) <= 4 < torch._dynamo.config.recompile_limit


@pytest.mark.parametrize("name", ["gpt_neox", "llama_tied"])
def test_flex_attention_dtype(name, monkeypatch):
    """bfloat16 under autocast, although rotary embeddings make query and key float32."""
    dtypes = []

    def record_dtypes(module, query, key, value, attention_mask, **kwargs):
        dtypes.extend([query.dtype, key.dtype, value.dtype])
        return query.transpose(1, 2), None

    monkeypatch.setattr(packed, "flex_attention_forward", record_dtypes)
    model = tiny_model(name)
    packed.use_packed_attention(model, CUDA)
    with torch.no_grad():
        common.Policy(model, bfloat16=True)(collate_for_gpu(RAGGED, monkeypatch))
    assert dtypes == [torch.bfloat16] * len(dtypes)
    assert len(dtypes) == 6  # in two layers


def test_flex_attention_padded(monkeypatch):
    """A model prepared for packed sequences on a GPU takes padded ones too."""
    model = tiny_model("llama")
    packed.use_packed_attention(model, CUDA)
    with torch.no_grad():
        logps = completion_logps(model, collate(RAGGED, "padded"))
        plain = plain_logps(cached_model("llama"), RAGGED)
    torch.testing.assert_close(logps, plain, atol=1e-4, rtol=0)


# ----------------------------------------------------------------- examples do not affect others

TOKEN = st.integers(0, VOCAB_SIZE - 1)
COMPLETION = st.lists(TOKEN, min_size=1, max_size=6)
EXAMPLE = st.builds(
    Example,
    prompt_ids=st.lists(TOKEN, min_size=1, max_size=7),
    completions_ids=st.lists(COMPLETION, min_size=1, max_size=3),
)
EXAMPLES = st.lists(EXAMPLE, min_size=1, max_size=4)


@settings(max_examples=60)
@given(EXAMPLES, st.randoms(use_true_random=False), TOKEN, st.sampled_from(list(LAYOUTS)))
def test_order_and_company(examples, random, padding_id, layout_name):
    """An example's numbers depend neither on the others, nor on the order, nor on padding."""
    model = cached_model("gpt_neox", torch.float64, layout_name)
    random.shuffle(examples)
    micro_batch = collate(examples, layout_name)
    if layout_name == "padded":
        input_ids = micro_batch.inputs["input_ids"]
        sequence = 0
        for example in examples:
            for completion_ids in example.completions_ids:
                input_ids[sequence, len(example.prompt_ids) + len(completion_ids) :] = padding_id
                sequence += 1
    with torch.no_grad():
        together = completion_logps(model, micro_batch)
        alone = []
        for example in examples:
            alone.append(completion_logps(model, collate([example], layout_name)))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gpt2"])
def test_sibling_completions(name):
    """A completion does not attend to the other completions of its prompt."""
    model = cached_model(name, layout_name="packed")
    examples = random_examples([(5, [4, 6, 3])])
    changed = copy.deepcopy(examples)
    changed[0].completions_ids[0] = [(token + 7) % VOCAB_SIZE for token in [9, 2, 5, 1]]
    with torch.no_grad():
        before = completion_logps(model, collate(examples, "packed"))
        after = completion_logps(model, collate(changed, "packed"))
    torch.testing.assert_close(after[4:], before[4:], atol=1e-6, rtol=0)
    assert (after[:4] - before[:4]).abs().max() > 0.1


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("max_logits", [1, 2**24])
def test_no_examples(max_logits, layout_name, monkeypatch):
    """A process without examples takes part, with gradients of zero."""
    monkeypatch.setattr(common, "MAX_LOGITS", max_logits)
    model = tiny_model("gpt_neox")
    if layout_name == "packed":
        packed.use_packed_attention(model, CPU)
    micro_batch = collate([], layout_name)
    logps = completion_logps(model, micro_batch)
    sums = micro_batch.sum_completions(logps)
    assert logps.shape == (0,)
    assert logps.dtype == torch.float32
    assert sums.shape == (0,)
    assert micro_batch.places.shape == (0,)
    (logps.sum() + sums.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


# --------------------------------------------------------------------------------- the layouts

PAIR = Example([11, 12], [[21, 22, 23], [31]])
SINGLE = Example([13], [[41, 42]])


def test_padded_layout():
    micro_batch = collate([PAIR, SINGLE], "padded")
    assert micro_batch.inputs.keys() == {"input_ids"}
    assert micro_batch.inputs["input_ids"].tolist() == [
        [11, 12, 21, 22, 23],
        [11, 12, 31, 0, 0],
        [13, 41, 42, 0, 0],
    ]
    assert micro_batch.predictors.tolist() == [1, 2, 3, 6, 10, 11]
    assert micro_batch.targets.tolist() == [21, 22, 23, 31, 41, 42]
    assert micro_batch.places.tolist() == [0, 1]
    assert micro_batch.reference_logps is None


def test_packed_layout():
    micro_batch = collate([PAIR, SINGLE], "packed")
    assert micro_batch.inputs.keys() == {"input_ids", "position_ids", "segment_lengths"}
    assert micro_batch.inputs["input_ids"].tolist() == [[11, 12, 21, 22, 23, 31, 13, 41, 42]]
    assert micro_batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2]]
    assert micro_batch.inputs["segment_lengths"] == [[2, 3, 1], [1, 2]]
    assert micro_batch.predictors.tolist() == [1, 2, 3, 1, 6, 7]
    assert micro_batch.targets.tolist() == [21, 22, 23, 31, 41, 42]
    assert micro_batch.places.tolist() == [0, 1]
    assert micro_batch.reference_logps is None


@settings(max_examples=50)
@given(EXAMPLES, st.sampled_from(list(LAYOUTS)))
def test_num_tokens(examples, layout_name):
    micro_batch = collate(examples, layout_name)
    num_tokens = LAYOUTS[layout_name].num_tokens(examples)
    assert num_tokens == micro_batch.inputs["input_ids"].numel()


def test_make_batch():
    """Mappings and Example objects, of lists, arrays and tensors."""
    expected = make_batch([PAIR, SINGLE])
    convert_to_int32 = functools.partial(np.array, dtype=np.int32)
    for convert in (list, tuple, np.array, convert_to_int32, torch.tensor):
        converted = []
        for example in (PAIR, SINGLE):
            completions_ids = [convert(ids) for ids in example.completions_ids]
            converted.append(Example(convert(example.prompt_ids), completions_ids))
        mappings = [vars(example) for example in converted]
        assert mappings[0].keys() == {"prompt_ids", "completions_ids"}
        packed_batch = collate(converted, "packed")
        for micro_batch in (make_batch(converted), make_batch(mappings)):
            assert micro_batch.inputs["input_ids"].dtype == torch.long
            assert torch.equal(micro_batch.inputs["input_ids"], expected.inputs["input_ids"])
            assert torch.equal(micro_batch.predictors, expected.predictors)
            assert torch.equal(micro_batch.targets, expected.targets)
            assert micro_batch.places.tolist() == [0, 1]
        assert packed_batch.inputs["input_ids"].dtype == torch.long
        assert torch.equal(packed_batch.targets, expected.targets)


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_indices(layout_name):
    micro_batch = common.make_micro_batch(RAGGED[:2], [7, 3], LAYOUTS[layout_name], CPU)
    assert micro_batch.places.tolist() == [7, 3]


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_reference_logps(layout_name, max_tokens, world_size):
    """They arrive in the order of the targets. Here, that of a token is the token's id."""
    examples = common.Examples()
    token_ids = []
    for example in RAGGED:
        examples.append(example)
        for completion_ids in example.completions_ids:
            token_ids += completion_ids
    examples.reference_logps = np.array(token_ids, dtype=np.float32)
    batch = [4, 0, 2, 3, 1]
    places = []
    for rank in range(world_size):
        run = SimpleNamespace(
            rank=rank,
            world_size=world_size,
            device=CPU,
            layout=LAYOUTS[layout_name],
            config=SimpleNamespace(micro_batch_tokens=max_tokens),
        )
        for micro_batch in common.make_micro_batches(examples, batch, run):
            assert micro_batch.reference_logps.dtype == torch.float32
            assert torch.equal(micro_batch.reference_logps, micro_batch.targets.float())
            its_token_ids = []
            for place in micro_batch.places.tolist():
                for completion_ids in RAGGED[batch[place]].completions_ids:
                    its_token_ids += completion_ids
            assert micro_batch.targets.tolist() == its_token_ids
            places += micro_batch.places.tolist()
    assert sorted(places) == [0, 1, 2, 3, 4]


@settings(max_examples=50)
@given(EXAMPLES, st.sampled_from(list(LAYOUTS)))
def test_pad_and_sum_completions(examples, layout_name):
    lengths = []
    for example in examples:
        for completion_ids in example.completions_ids:
            lengths.append(len(completion_ids))
    values = torch.arange(1.0, sum(lengths) + 1, dtype=torch.float64, requires_grad=True)
    padded = []
    sums = []
    start = 0
    for length in lengths:
        its_values = values[start : start + length].tolist()
        padded.append(its_values + [0.0] * (max(lengths) - length))
        sums.append(sum(its_values))
        start += length
    micro_batch = collate(examples, layout_name)
    assert micro_batch.pad_completions(values).tolist() == padded
    assert micro_batch.sum_completions(values).tolist() == sums
    micro_batch.sum_completions(values).sum().backward()
    assert values.grad.tolist() == [1.0] * sum(lengths)
