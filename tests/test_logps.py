"""Token ids to log-probabilities, against a full log-softmax of one sequence at a time."""

import copy
import functools
import inspect
import textwrap
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXForCausalLM

import common
from archangel import fast
from archangel.fast import TokenLogps, block_mask, packed_arguments, row_length, use_packed
from common import completion_logps, make_batch

VOCABULARY = 97
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES = {  # name: (model_type, settings); scales and caps strong enough to matter
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox_eager": ("gpt_neox", {"attn_implementation": "eager"}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": (
        "gemma2",
        {
            "attn_implementation": "eager",
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "mistral": ("mistral", {}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "granite": ("granite", {"logits_scaling": 2.0, "residual_multiplier": 0.7}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True}),
    "phi": ("phi", {}),  # its head has a bias
}
PACKED = [name for name in ARCHITECTURES if name != "gemma2"]  # it caps what attention compares


def tiny(name: str, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A random model with weights so large that log-probabilities differ by nats."""
    model_type, special = ARCHITECTURES[name]
    special = {**special, **changes}
    how = {"attn_implementation": special.pop("attn_implementation", "sdpa")}
    size = GPT2 | {"bos_token_id": 1, "eos_token_id": 2} if model_type == "gpt2" else SIZE
    config = AutoConfig.for_model(model_type, **{**size, **special})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **how)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 if parameter.dim() > 1 else 0.1))
    return model.eval().to(dtype)


@functools.cache
def cached(name: str, dtype: torch.dtype = torch.float32, packed=False) -> torch.nn.Module:
    """`tiny`, for tests that leave the model as it is; packed: told to attend to packed rows."""
    model = tiny(name, dtype)
    if packed:
        use_packed(model, torch.device("cpu"))
    return model


def make_examples(shapes, seed: int = 0) -> list[dict]:
    """Random ids for shapes [(length of the prompt, lengths of its completions), ...]."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(VOCABULARY, (n,), generator=generator).tolist()

    return [{"prompt_ids": ids(p), "completions_ids": [ids(c) for c in cs]} for p, cs in shapes]


RAGGED = make_examples([(5, [4, 7]), (1, [3]), (9, [1, 2, 6]), (3, [8, 1]), (2, [1])])


def plain_logps(model, examples) -> torch.Tensor:
    """The same by plain transformers: one sequence at a time, all logits, full log-softmax."""
    found = []
    for example in examples:
        prompt = example["prompt_ids"]
        for completion in example["completions_ids"]:
            ids = torch.tensor([prompt + completion])
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
            for place, token in enumerate(completion):
                found.append(logps[len(prompt) + place - 1, token])
    return torch.stack(found)


def gradients(model, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient by parameter of a sum of logps in which every token has a weight of its own."""
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------- against plain transformers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_a_full_log_softmax_of_one_sequence_at_a_time(name):
    with torch.no_grad():
        plain = plain_logps(cached(name), RAGGED)
        ours = completion_logps(cached(name), make_batch(RAGGED))
    assert plain.std() > 0.4, "too flat to tell right from wrong"
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_equal_one_sequence_at_a_time(name):
    model = cached(name, packed=True)
    with torch.no_grad():
        plain = plain_logps(cached(name), RAGGED)
        packed = completion_logps(model, make_batch(RAGGED, packed=True))
        apart = completion_logps(model, make_batch(RAGGED))  # the same model takes both
    torch.testing.assert_close(packed, plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(apart, plain, atol=1e-4, rtol=0)


def test_a_packed_batch_is_refused_by_a_model_that_was_not_told():
    with pytest.raises(ValueError, match="use_packed"):
        completion_logps(cached("gpt_neox"), make_batch(RAGGED, packed=True))


OTHERS = [  # the same prompts with other completions, as KTO's partners
    {"prompt_ids": row["prompt_ids"], "completions_ids": other["completions_ids"]}
    for row, other in zip(RAGGED, RAGGED[1:] + RAGGED[:1])
]


@pytest.mark.parametrize("name", PACKED)
def test_completions_behind_prompts_already_seen_equal_whole_sequences(name):
    model = cached(name, packed=True)
    batch = make_batch(RAGGED, packed=True)
    after = make_batch(OTHERS, packed=True, after=batch)
    assert after.input_ids.shape[1] == len(OTHERS) + len(after.targets)  # a token of each prompt
    logps = completion_logps(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(
            completion_logps(model, after), plain_logps(cached(name), OTHERS), atol=1e-4, rtol=0
        )
    # What is computed before the backward pass leaves the gradient alone.
    expected = gradients(model, completion_logps(model, make_batch(RAGGED, packed=True)))
    for parameter, gradient in gradients(model, logps).items():
        assert torch.equal(gradient, expected[parameter])


def test_what_was_kept_is_freed_when_taken_and_not_kept_again():
    """Activation checkpointing computes a block, so its keys too, again in the backward pass."""
    before, module = common.Layout([[2, 1]]), torch.nn.Identity()
    after = common.Layout([[1, 1]], before)
    key, value = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    before.keep(module, key, value)
    taken = after.take(module)
    assert [x.requires_grad for x in taken] == [False, False] and torch.equal(taken[0], key)
    before.keep(module, key, value)
    assert before.kept[module] is None
    after.keep(module, key, value)  # nothing comes after it
    assert after.kept is None


def test_behind_an_empty_batch_nothing_comes():
    model = cached("gpt_neox", packed=True)
    batch = make_batch([], packed=True)
    after = make_batch([], packed=True, after=batch)
    for each in (batch, after):
        assert completion_logps(model, each).shape == (0,)


def test_rows_apart_are_whole_though_their_prompts_have_been_seen():
    batch = make_batch(RAGGED)
    after = make_batch(OTHERS, after=batch)
    assert after.input_ids.tolist() == make_batch(OTHERS).input_ids.tolist()


@pytest.mark.parametrize("packed", [True, False])
def test_float64_stays_float64(packed):
    model = cached("gpt_neox", torch.float64, packed)
    with torch.no_grad():
        logps = completion_logps(model, make_batch(RAGGED, packed=packed))
        plain = plain_logps(model, RAGGED)
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, plain, atol=1e-10, rtol=0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["gpt_neox", "llama_tied", "gemma2", "phi"])
def test_gradients_through_several_chunks_are_the_plain_ones(name, packed, monkeypatch):
    packed = packed and name in PACKED
    model = cached(name, packed=packed)
    plain = gradients(model, plain_logps(model, RAGGED))
    monkeypatch.setattr(common, "CHUNK", 3 * VOCABULARY)
    ours = gradients(model, completion_logps(model, make_batch(RAGGED, packed=packed)))
    assert ours.keys() == plain.keys()
    assert max(gradient.abs().max() for gradient in plain.values()) > 0.1
    for parameter, gradient in plain.items():
        limit = 1e-4 * max(1, float(gradient.abs().max()))
        torch.testing.assert_close(ours[parameter], gradient, atol=limit, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**31), st.sampled_from([0, 50, 1e4]))
def test_token_logps_are_cross_entropy(n, vocabulary, seed, shift):
    """Values and gradient, also of logits far from 0, whose exponentials overflow."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocabulary, dtype=torch.float64, generator=generator) * 30 + shift
    targets = torch.randint(vocabulary, (n,), generator=generator)
    weights = torch.randn(n, dtype=torch.float64, generator=generator)
    found = []
    for plain in (True, False):
        leaf = logits.clone().requires_grad_()
        its = leaf * 1  # not a leaf, as a head's output is not
        if plain:
            logps = -torch.nn.functional.cross_entropy(its, targets, reduction="none")
        else:
            logps, _ = TokenLogps.apply(its, targets)
        (logps * weights).sum().backward()
        found.append((logps.detach(), leaf.grad))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-10, rtol=0)


def test_token_logps_refuse_a_second_backward_whose_logits_are_gone():
    its = torch.zeros(2, 3, requires_grad=True) * 1
    logps, _ = TokenLogps.apply(its, torch.tensor([0, 1]))
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_block_mask_lets_a_token_see_its_prompt_and_its_own_completion(lengths):
    """Against the rule written out, token by token; padding sees no row and no row sees it."""
    owner = [(r, k) for r, row in enumerate(lengths) for k, n in enumerate(row) for _ in range(n)]
    owner += [(-1, 0)] * 3
    for before in ([], [-2, 0, 0, -2, len(lengths) - 1]):  # rows of what the tokens go on from
        mask = block_mask(*torch.tensor(owner).T, torch.tensor(before, dtype=torch.long))
        assert mask.shape == (1, 1, len(owner), len(before) + len(owner))
        for q, of_q in enumerate(owner):
            for k, of_k in enumerate([(row, 0) for row in before] + owner):
                may = of_k in (of_q, (of_q[0], 0)) and k - len(before) <= q
                here = [torch.tensor(number) for number in (0, 0, q, k)]
                assert bool(mask.mask_mod(*here)) == bool(may), (q, k)


@pytest.mark.parametrize("name", ["gpt_neox", "llama_tied"])
def test_flex_attention_gives_the_same_numbers_and_is_compiled_a_few_times(name, monkeypatch):
    """What a GPU uses, forward and backward, but for its kernels: here it is traced, not fused.

    Rows of all sizes, that of one short example too: at the ninth compilation torch would give up,
    say so in the log alone, and compute all scores.
    """
    import torch.nn.attention.flex_attention as torch_flex
    import transformers.integrations.flex_attention as flex

    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    attention = torch.compile(torch_flex.flex_attention, backend=backend)
    monkeypatch.setattr(flex, "WrappedFlexAttention", lambda training: lambda: attention)
    # Refuses gradients on a CPU, which has no kernel for them.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    model, random = tiny(name), Random(0)
    for count in (12, 1, 40, 3, 1, 2, 30, 7):
        lengths = [(random.randint(1, 20), random.choices(range(1, 20), k=2)) for _ in range(count)]
        examples, found = make_examples(lengths, seed=count), []
        for device, its_own in (("cpu", "packed"), ("cuda", "packed_flex")):
            use_packed(model, torch.device(device))
            assert model.config._attn_implementation == its_own
            monkeypatch.setattr(common, "row_length", lambda n, _, to=device: row_length(n, to))
            batch = make_batch(examples, packed=True)
            after = make_batch(examples, packed=True, after=batch)
            model.zero_grad()
            logps = completion_logps(model, batch)
            logps.square().mean().backward()
            with torch.no_grad():
                others = [completion_logps(model, after), completion_logps(model, batch)]
            gradients = [parameter.grad for parameter in model.parameters()]
            found.append([logps.detach(), *others, *gradients])
        for flexible, plain in zip(*reversed(found)):
            torch.testing.assert_close(flexible, plain, atol=1e-4, rtol=1e-4)
    # With a gradient, without, after another row; each for the first size, then for all others.
    assert 0 < len(compiled) <= 6 < torch._dynamo.config.recompile_limit


@pytest.mark.parametrize("name", ["gpt_neox", "llama_tied"])
def test_flex_attention_runs_in_bfloat16_where_the_rest_does(name, monkeypatch):
    """Rotary positions have made float32 of queries and keys: slow, and not of the values' kind."""
    model, seen = tiny(name), []

    def look(module, query, key, value, attention_mask, **others):
        seen.extend([query.dtype, key.dtype, value.dtype])
        return query.transpose(1, 2), None

    monkeypatch.setattr(fast, "flex_attention_forward", look)
    use_packed(model, torch.device("cuda"))
    with torch.no_grad():
        common.Policy(model, None, bfloat16=True)(make_batch(RAGGED, packed=True))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_only_completion_positions_reach_the_head_in_chunks(at_once, monkeypatch):
    model = cached("gpt_neox")
    batch, rows = make_batch(RAGGED), []
    monkeypatch.setattr(common, "CHUNK", at_once * VOCABULARY + 1)
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1]))
    try:
        with torch.no_grad():
            logps = completion_logps(model, batch)
    finally:
        hook.remove()
    seen = [shape.numel() for shape in rows]
    assert sum(seen) == len(logps) == sum(len(c) for e in RAGGED for c in e["completions_ids"])
    assert max(seen) <= at_once
    torch.testing.assert_close(logps, plain_logps(model, RAGGED).detach(), atol=1e-4, rtol=0)


def test_a_head_smaller_than_one_row_of_logits_still_runs(monkeypatch):
    monkeypatch.setattr(common, "CHUNK", 1)
    with torch.no_grad():
        logps = completion_logps(cached("gpt_neox"), make_batch(RAGGED))
        plain = plain_logps(cached("gpt_neox"), RAGGED)
    torch.testing.assert_close(logps, plain, atol=1e-4, rtol=0)


def test_hidden_states_are_those_that_predict_the_tokens():
    model = cached("gpt_neox")
    with torch.no_grad():
        logps, hidden = completion_logps(model, make_batch(RAGGED), return_hidden=True)
        again = model.get_output_embeddings()(hidden).log_softmax(-1)
    assert hidden.shape == (len(logps), 32)
    targets = make_batch(RAGGED).targets[:, None]
    torch.testing.assert_close(again.gather(1, targets)[:, 0], logps, atol=1e-5, rtol=0)


def test_the_example_in_the_docstring_holds():
    docstring = inspect.cleandoc(completion_logps.__doc__)
    lines = [line for line in docstring.splitlines() if line.startswith("    ")]
    assert len(lines) == 5, "the docstring has no example of five lines any more"
    scope = {**vars(common), "torch": torch, "model": cached("gpt_neox")}
    exec(textwrap.dedent("\n".join(lines)), scope)
    assert len(scope["ours"]) == 2
    torch.testing.assert_close(scope["ours"], scope["plain"], atol=1e-5, rtol=0)


def calm(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model as smooth as a trained one, so that bfloat16 is near; the others are rougher."""
    model = tiny("gpt_neox")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)
    return model.to(dtype)


def test_bfloat16_is_finite_near_and_summed_in_float32():
    with torch.no_grad():
        exact = plain_logps(calm(), RAGGED)
        weights = completion_logps(calm(torch.bfloat16), make_batch(RAGGED))
        autocast = common.Policy(calm(), None, True)(make_batch(RAGGED))
    assert exact.std() > 0.2
    for logps in (weights, autocast):
        assert logps.dtype == torch.float32 and logps.isfinite().all()
        assert (logps - exact).abs().mean() < 0.08
        # A bfloat16 value has 8 bits: more of them say that the softmax was not taken in it.
        assert (logps != logps.bfloat16().float()).any()


# ------------------------------------------------------------------------- what changes nothing

TOKENS = st.integers(0, VOCABULARY - 1)
EXAMPLES = st.lists(
    st.fixed_dictionaries(
        {
            "prompt_ids": st.lists(TOKENS, min_size=1, max_size=7),
            "completions_ids": st.lists(
                st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=3
            ),
        }
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(EXAMPLES, st.randoms(use_true_random=False), TOKENS, st.booleans())
def test_padding_order_and_company_change_nothing(examples, random, pad_id, packed):
    model = cached("gpt_neox", torch.float64, packed)
    order = list(range(len(examples)))
    random.shuffle(order)
    batch = make_batch([examples[i] for i in order], pad_id=pad_id, packed=packed)
    with torch.no_grad():
        together = completion_logps(model, batch)
        alone = [completion_logps(model, make_batch([examples[i]], packed=packed)) for i in order]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gpt2"])
def test_a_completion_does_not_see_its_sibling(name):
    model = cached(name, packed=True)
    first, second = make_examples([(5, [4, 6])]), make_examples([(5, [4, 6])])
    second[0]["completions_ids"][0] = [(token + 7) % VOCABULARY for token in [9, 2, 5, 1]]
    assert first[0]["completions_ids"][1] == second[0]["completions_ids"][1]
    with torch.no_grad():
        before = completion_logps(model, make_batch(first, packed=True))
        after = completion_logps(model, make_batch(second, packed=True))
    torch.testing.assert_close(after[4:], before[4:], atol=1e-6, rtol=0)
    assert (after[:4] - before[:4]).abs().max() > 0.1


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_an_empty_batch_takes_part_with_gradients_of_zero(chunk, packed, monkeypatch):
    monkeypatch.setattr(common, "CHUNK", chunk)
    model = tiny("gpt_neox")
    if packed:
        use_packed(model, torch.device("cpu"))
    batch = make_batch([], packed=packed)
    logps = completion_logps(model, batch)
    assert logps.shape == (0,) and logps.dtype == torch.float32
    assert batch.sum(logps).shape == (0,) and batch.indices.shape == (0,)
    (logps.sum() + batch.sum(logps).sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


# ---------------------------------------------------------------------------------- the layout


def test_the_two_layouts_by_hand():
    pair = {"prompt_ids": [11, 12], "completions_ids": [[21, 22, 23], [31]]}
    other = {"prompt_ids": [13], "completions_ids": [[41, 42]]}
    apart = make_batch([pair, other], pad_id=9)
    assert apart.input_ids.tolist() == [
        [11, 12, 21, 22, 23],
        [11, 12, 31, 9, 9],
        [13, 41, 42, 9, 9],
    ]
    assert apart.layout is None
    packed = make_batch([pair, other], pad_id=9, packed=True)
    assert packed.input_ids.tolist() == [[11, 12, 21, 22, 23, 31, 13, 41, 42]]
    assert packed.layout.lengths == [[2, 3, 1], [1, 2]]
    told = packed_arguments(cached("gpt_neox", packed=True), packed.layout, packed.input_ids)
    assert told["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2]]
    for batch in (packed, apart):
        assert batch.targets.tolist() == [21, 22, 23, 31, 41, 42]
        flat = batch.input_ids.flatten()
        assert flat[batch.predictors].tolist() == [12, 21, 22, 12, 13, 41]


def test_for_a_gpu_a_packed_row_is_padded_to_two_whole_blocks_or_more():
    batch = make_batch(RAGGED, "meta", packed=True)
    assert batch.input_ids.shape == (1, 256)
    assert sum(map(sum, batch.layout.lengths)) == 53
    assert [row_length(n, "cuda") for n in (0, 256, 257, 1000)] == [256, 256, 384, 1024]
    assert row_length(257, "cpu") == 257


def test_indices_are_those_given_or_count_from_0():
    assert make_batch(RAGGED).indices.tolist() == [0, 1, 2, 3, 4]
    assert make_batch(RAGGED[:2], indices=[7, 3]).indices.tolist() == [7, 3]


def test_reference_logps_come_along_in_order():
    examples, n = copy.deepcopy(RAGGED), 0
    for example in examples:
        size = sum(map(len, example["completions_ids"]))
        example["reference_logps"] = torch.arange(n, n + size, dtype=torch.float32).numpy()
        n += size
    for packed in (True, False):
        batch = make_batch(examples, packed=packed)
        assert batch.reference_logps.tolist() == list(range(n)) == list(range(len(batch.targets)))
    assert make_batch(RAGGED).reference_logps.shape == (0,)


@settings(max_examples=50, deadline=None)
@given(EXAMPLES, st.booleans())
def test_pad_and_sum_are_the_plain_loop(examples, packed):
    lengths = [len(ids) for example in examples for ids in example["completions_ids"]]
    values = torch.arange(1.0, sum(lengths) + 1, dtype=torch.float64, requires_grad=True)
    padded, sums, start = [], [], 0
    for length in lengths:
        piece = values[start : start + length].tolist()
        padded.append(piece + [0.0] * (max(lengths) - length))
        sums.append(sum(piece))
        start += length
    batch = make_batch(examples, packed=packed)
    assert batch.pad(values).tolist() == padded
    assert batch.sum(values).tolist() == sums
    batch.sum(values).sum().backward()
    assert values.grad.tolist() == [1.0] * sum(lengths)


# --------------------------------------------------------------------------- the check at start


def check(model, examples, bfloat16: bool = False, world_size: int = 1) -> SimpleNamespace:
    """What `self_check` says of a model: a run with `packed` and `record`."""
    run = SimpleNamespace(
        device=torch.device("cpu"),
        bfloat16=bfloat16,
        dtype=torch.float32,
        model_path="tiny",
        record={},
        packed=None,
        world_size=world_size,
        all_agree=bool,
        say=print,
    )
    common.self_check(common.Policy(model, None, bfloat16), as_arrays(examples), run)
    return run


def as_arrays(examples) -> list[dict]:
    """The examples as `tokenise` gives them."""
    return [
        {
            "prompt_ids": torch.tensor(example["prompt_ids"]).numpy(),
            "completions_ids": [torch.tensor(ids).numpy() for ids in example["completions_ids"]],
        }
        for example in examples
    ]


PAIRS = make_examples([(3, [2, 2]), (8, [7, 9]), (5, [1, 4])])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_self_check_packs_rows_where_that_is_right(name):
    model = tiny(name)
    own = model.config._attn_implementation
    run = check(model, PAIRS)
    assert run.packed is run.record["packed_rows"] is (name in PACKED)
    assert model.config._attn_implementation == ("packed" if name in PACKED else own)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_self_check_passes_bfloat16():
    assert check(calm(), PAIRS, bfloat16=True).packed is True


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_self_check_keeps_rows_apart_under_a_short_window(name):
    model = tiny(name, sliding_window=4)
    run = check(model, PAIRS)
    assert run.packed is False and run.record["packed_rows"] is False
    with torch.no_grad():  # which is then right
        apart = completion_logps(model, make_batch(PAIRS))
        torch.testing.assert_close(apart, plain_logps(model, PAIRS), atol=1e-4, rtol=0)


def test_self_check_looks_at_the_longest_sequence_not_at_the_longest_row():
    # Prompt and completion pass the window only in the second; its row is the shorter one.
    examples = make_examples([(4, [12, 12]), (22, [2, 2])])
    for few, packed in ((examples[:1], True), (examples[1:], False), (examples, False)):
        assert check(tiny("mistral", sliding_window=20), few).packed is packed


@pytest.mark.parametrize("bfloat16", [False, True])
def test_self_check_sees_a_window_that_is_passed_late_in_a_completion(bfloat16):
    examples = make_examples([(60, [20, 20])])  # its first twelve tokens are as they should be
    assert check(tiny("mistral", sliding_window=72), examples, bfloat16).packed is False
    assert check(tiny("mistral", sliding_window=96), examples, bfloat16).packed is True


@pytest.mark.parametrize("ignored", ["position_ids", "layout"])
def test_self_check_keeps_rows_apart_where_what_it_says_is_ignored(ignored, monkeypatch):
    model = tiny("gpt_neox")
    forward = model.base_model.forward

    def ignore(*rows, **given):  # the plain pass gives rows of its own
        return forward(*rows, **{**given, ignored: None})

    monkeypatch.setattr(model.base_model, "forward", ignore)
    assert check(model, PAIRS).packed is False


def test_self_check_keeps_rows_apart_where_only_another_row_is_seen(monkeypatch):
    """One completion each: nothing but what lies before in the packed row could be seen wrongly."""
    model, examples = tiny("gpt_neox"), make_examples([(3, [2]), (8, [7])])
    assert check(model, examples).packed is True
    forward = model.base_model.forward

    def ignore(*rows, layout=None, **given):
        if layout and not layout.before:  # the others as more completions of the first
            told, (first, *others) = copy.copy(layout), layout.lengths
            told.lengths = [[*first, *map(sum, others)]]
            return forward(*rows, layout=told, **given)
        return forward(*rows, layout=layout, **given)

    monkeypatch.setattr(model.base_model, "forward", ignore)
    assert check(model, examples).packed is False


def test_self_check_keeps_rows_apart_where_one_after_another_goes_wrong(monkeypatch):
    take = common.Layout.take

    def forget(*given):
        return tuple(torch.zeros_like(kept) for kept in take(*given))

    monkeypatch.setattr(common.Layout, "take", forget)
    assert check(tiny("gpt_neox"), PAIRS).packed is False


def test_self_check_sees_a_sibling_though_each_example_has_one_completion():
    """As KTO's: the reference pass puts both halves of a pair behind one prompt."""
    short_convolutions = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
    config = AutoConfig.for_model("lfm2", **SIZE | short_convolutions)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    assert check(model, make_examples([(40, [20]), (42, [20])]), bfloat16=True).packed is False


def test_self_check_does_not_take_no_memory_for_no_such_attention(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(common, "packed_arguments", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        check(tiny("gpt_neox"), PAIRS)


@pytest.mark.parametrize("error", [TypeError, AttributeError, RuntimeError])
def test_self_check_keeps_rows_apart_where_they_are_refused(error, monkeypatch, capsys):
    """In one process; several end with a line, since FSDP does not recover from a broken pass."""
    model = tiny("gpt_neox")
    forward = model.base_model.forward

    def refuse(input_ids=None, position_ids=None, **others):
        if position_ids is not None:
            raise error("no such argument")
        return forward(input_ids=input_ids, **others)

    monkeypatch.setattr(model.base_model, "forward", refuse)
    run = check(model, PAIRS)
    assert run.packed is False and run.record["packed_rows"] is False
    assert "no such argument" in capsys.readouterr().out  # said why
    assert 0 <= run.record["self_check_error"] < 1e-4
    with pytest.raises(common.UserError, match="--model: packed rows fail .no such argument"):
        check(model, PAIRS, world_size=2)


def test_a_model_with_no_attention_but_its_own_is_known_before_a_pass():
    """So that several processes, too, go on with rows apart."""
    config = AutoConfig.for_model(
        "bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="no attention but its own"):
        use_packed(model, torch.device("cpu"))
    assert check(model, PAIRS, world_size=2).packed is False


def test_self_check_keeps_rows_apart_where_the_backward_pass_fails(monkeypatch):
    """As what a GPU compiles might, only then."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(common, "packed_arguments", lambda *_: {"broken": True})
    model = tiny("gpt_neox")
    forward = model.base_model.forward

    def fail_later(*rows, broken=False, **given):
        result = forward(*rows, **given)
        if broken:
            result.last_hidden_state = Broken.apply(result.last_hidden_state)
        return result

    monkeypatch.setattr(model.base_model, "forward", fail_later)
    run = check(model, make_examples([(4, [3])]))
    assert run.packed is False and model.config._attn_implementation == "sdpa"


class Scaled(GPTNeoXForCausalLM):
    """Scales its logits behind the head, as no setting says."""

    def forward(self, *arguments, **others):
        result = super().forward(*arguments, **others)
        result.logits = result.logits * 0.9
        return result


def test_self_check_refuses_an_unknown_logit_scaling():
    model = tiny("gpt_neox")
    model.__class__ = Scaled
    with pytest.raises(common.UserError, match="--model tiny") as caught:
        check(model, PAIRS)
    assert "\n" not in str(caught.value)


def test_self_check_refuses_a_model_of_nan():
    model = tiny("gpt_neox")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(common.UserError):
        check(model, PAIRS)
