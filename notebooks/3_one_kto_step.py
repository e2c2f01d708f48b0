# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One KTO step, slowly
#
# *The [report](https://github.com/ContextualAI/HALOs/blob/main/assets/report.pdf),
# Figure 1 (the pipeline) and section 5 (KTO, equation (7)).*
#
# This notebook follows a record to its tokens, log-probabilities, reference point, loss, optimizer
# step, and to the replies before and after training. The model is the project's toy: a shop
# assistant of 0.7 M parameters that knows 256 products and is often rude. Everything is computed by
# the functions that `kto.py` uses, and the optimizer steps are taken by `kto.train`. (`plots.py`,
# beside this notebook, only draws. The model is in float64 and on the CPU, so that the output is
# the same on other machines.)

# %%
import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU, wherever this runs
sys.path.insert(0, "..")  # the project's folder

import contextlib
import dataclasses
import io
import json
import signal
import tempfile
from pathlib import Path

import plots
import torch
from transformers.utils.logging import disable_progress_bar

import common
import dpo
import kto
from archangel import packed, sample
from archangel.records import read_records
from archangel.run import find_model

disable_progress_bar()
folder = tempfile.TemporaryDirectory()
os.environ["HALOS_CACHE"] = folder.name  # where token ids are kept

# %% [markdown]
# ## 1. The pipeline
#
# *Figure 1 has two stages: supervised finetuning, then a human-centered loss.* The picture is the
# second stage with KTO, with the names of the project's functions. The reference model never
# changes, so its log-probabilities of all examples are computed once, before training.

# %%
plots.pipeline()

# %% [markdown]
# ## 2. A record, as tokens
#
# *Section 5: KTO learns from a reply and whether it is desirable. Pairs are not needed.* A record
# of the toy is a pair, because all five losses use the same data. KTO makes two examples of it.

# %%
records = read_records("toy", "train")[:240]
config = kto.Config(
    model="toy",
    data=f"{folder.name}/records.jsonl",  # the toy's first records, for a short run
    out=f"{folder.name}/run",
    batch_size=16,
    lr=2e-4,
    warmup_steps=10,
    save_every=1,
    dtype="float64",
)
with Path(config.data).open("w") as file:
    for record in records:
        file.write(json.dumps(record) + "\n")
record = records[0]
for column, text in record.items():
    print(f"{column:<10}{text.strip()!r}")

# %%
run = common.start_run(config)
tokenized_records, _ = common.load_records(run, kto.FORMATS)
examples = kto.make_examples(tokenized_records, config)
desirable_example = examples[0]  # the first record's chosen reply
undesirable_example = examples[1]  # and its rejected one


def token_texts(example):
    """The text of each token of an example's reply, in quotes."""
    completion_ids = example.completions_ids[0]
    texts = run.tokenizer.batch_decode(completion_ids[:, None])
    return [repr(text) for text in texts]


tokens = {
    "desirable": token_texts(desirable_example),
    "undesirable": token_texts(undesirable_example),
}
prompt_length = len(desirable_example.prompt_ids)
for name, texts in tokens.items():
    print(f"{name}: {prompt_length} prompt tokens, {len(texts)} reply tokens")
    print("   ", "|".join(texts))

# %% [markdown]
# Prompt and reply are tokenized together and then separated. The end-of-sequence token is the last
# token of the reply, so the model learns to *stop* as it learns any other token. (Before training,
# this model often continues with turns of the user, as in the report's Figure 3.)
#
# ## 3. Log-probabilities
#
# *Equations (4) and (7) take $\log\pi(y|x)$, of a whole reply.* It is the sum over the reply's
# tokens, never their mean. The output head runs only on the positions that predict these tokens.

# %%
model, tokenizer = sample.load(find_model("toy"))
model = model.double()
batch = common.make_batch([desirable_example, undesirable_example])
with torch.no_grad():
    logps = common.completion_logps(model, batch)
padded_logps = batch.pad_completions(logps)  # (2, T)
logps_by_name = {}
for (name, texts), values in zip(tokens.items(), padded_logps):
    logps_by_name[name] = values[: len(texts)]
plots.token_logps(tokens, logps_by_name)

# %% [markdown]
# ## 4. Before the first step
#
# *Section 5, equation (7).* Before the first step the policy is the reference model. So every
# log-ratio and every reference point is 0, and every loss is 0.5. The gradient of each loss with
# respect to $\log\pi(y|x)$ has its largest possible magnitude, $\beta/4$. The batch of a step has
# as many desirable as undesirable examples (*section 5 found that best*).

# %%
schedule = kto.make_schedule(examples, config)  # the example indices of every step
batch = common.make_batch([examples[index] for index in schedule[0]])
desirable = torch.tensor([examples.desirable[index] for index in schedule[0]])  # (B,)


def completion_sums(model, batch):
    """The log-probability of each whole reply, (B,)."""
    with torch.no_grad():
        return batch.sum_completions(common.completion_logps(model, batch))


reference_logps = completion_sums(model, batch)


def measure(policy_logps):
    """Log-ratios, reference points, losses and minus their gradients, of the batch; each (B,)."""
    policy_logps = policy_logps.clone().requires_grad_()
    log_ratios = policy_logps.detach() - reference_logps
    kl = kto.kl_from_other_half(log_ratios, desirable)
    losses = kto.kto_loss(policy_logps, reference_logps, desirable, kl, config.beta)
    (slopes,) = torch.autograd.grad(losses.sum(), policy_logps)
    return log_ratios, kl, losses.detach(), -slopes


log_ratios, kl, losses, pushes = measure(reference_logps)
print(f"{desirable.sum()} desirable, {(~desirable).sum()} undesirable")
print(f"largest log-ratio {log_ratios.abs().max():.3f}, reference points up to {kl.max():.3f}")
print(f"losses {losses.min():.3f} to {losses.max():.3f}")
push_desirable = pushes[desirable].mean()
push_undesirable = pushes[~desirable].mean()
print(f"minus the gradient {push_desirable:+.4f} desirable, {push_undesirable:+.4f} undesirable")

# %% [markdown]
# ## 5. The step
#
# `kto.train` takes the step: it computes the loss and its gradient on the same batch (the schedule
# depends only on the seed), and updates the weights by RMSprop. The first line of its metrics
# agrees with what was just computed.


# %%
def train(steps):
    """Run or resume kto.train up to this number of steps in all. Returns the metrics it logged."""
    handlers = {}  # kto.train sets its own
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.getsignal(number)
    with contextlib.redirect_stderr(io.StringIO()):  # hides the progress bar
        kto.train(dataclasses.replace(config, max_steps=steps, resume=True))
    torch.distributed.destroy_process_group()  # so that it can be called again from here
    for number, handler in handlers.items():
        signal.signal(number, handler)
    lines = Path(config.out, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


metrics = train(steps=1)[0]
print(f"by kto.train  loss {metrics['loss']:.6f}, reference point {metrics['kl']:.6f}")
print(f"by hand       loss {losses.mean():.6f}, reference point {kl.mean():.6f}")
print(f"gradient norm {metrics['grad_norm']:.4f}, learning rate {metrics['lr']:.1e}")
after, _ = sample.load(Path(config.out))
after = after.double()
weights_before = torch.nn.utils.parameters_to_vector(model.parameters())
weights_after = torch.nn.utils.parameters_to_vector(after.parameters())
mean_change = (weights_after - weights_before).abs().mean()
print(f"{len(weights_after):,} weights changed by {mean_change:.1e} on average")

# %% [markdown]
# ## 6. What the step did to its batch
#
# *Section 5: the KL term of one half is estimated from the other.* After one step the log-ratios
# are no longer 0. The dotted lines are the mean log-ratios of the classes. The reference point of a
# class is the mean of the *other* class, or 0 where that is negative.

# %%
log_ratios, kl, losses, pushes = measure(completion_sums(after, batch))


def by_class(values):
    """Values of the batch, desirable and undesirable."""
    return {"desirable": values[desirable], "undesirable": values[~desirable]}


def loss_curves(distances):
    """The loss of each class at distances of the log-ratio from the reference point."""
    zeros = torch.zeros_like(distances)
    is_desirable = torch.ones_like(distances, dtype=torch.bool)
    return {
        "desirable": kto.kto_loss(distances, zeros, is_desirable, 0.0, config.beta),
        "undesirable": kto.kto_loss(distances, zeros, ~is_desirable, 0.0, config.beta),
    }


means = {}
for name, of_class in by_class(log_ratios).items():
    means[name] = of_class.mean().item()
    point = by_class(kl)[name][0]
    print(f"{name:<12} mean log-ratio {means[name]:+.3f} nats, reference point {point:.3f}")
distances = torch.linspace(-1.5, 1.5, 401)
plots.batch_after_step(
    by_class(log_ratios),
    means,
    distances,
    loss_curves(distances),
    by_class(log_ratios - kl),
    by_class(losses),
)
print(f"mean loss of the batch {losses.mean():.4f}, before the step 0.5")

# %% [markdown]
# ## 7. Thirty steps
#
# The same run continues from its checkpoint (`--resume`) to step 30, one pass over 240 records.

# %%
metrics = train(steps=30)
final, _ = sample.load(Path(config.out))
final = final.double()
log_ratios, kl, losses, pushes = measure(completion_sums(final, batch))
rewards = {
    "desirable": [record["reward_desirable"] for record in metrics],
    "undesirable": [record["reward_undesirable"] for record in metrics],
    "reference point": [config.beta * record["kl"] for record in metrics],
}
distances = torch.linspace(-60, 60, 401)
plots.training_run(
    [record["step"] for record in metrics],
    rewards,
    [record["loss"] for record in metrics],
    distances,
    loss_curves(distances),
    by_class(log_ratios - kl),
    by_class(losses),
)
clamped = sum(record["kl"] < 1e-9 for record in metrics)  # at step 1 it is 0 up to rounding
last = metrics[-10:]
margin = sum(record["reward_margin"] for record in last) / len(last)
print(f"reference point clamped to 0 in {clamped} of {len(metrics)} steps")
print(f"reward margin, mean of the last {len(last)} batches: {margin:.1f}")

# %% [markdown]
# Both classes lose log-probability, the undesirable one more. The means of both classes are soon
# negative, so the reference point is clamped to 0 in most steps. On the right, the curves are
# flatter far from the reference point, so examples there have smaller gradients. This is the effect
# of the report's concave gains and convex losses.
#
# ## 8. What changed in the replies
#
# The log-probabilities of the two replies of section 2:

# %%
two = common.make_batch([desirable_example, undesirable_example])
policies = {"before": model, "after 1 step": after, "after 30 steps": final}
print(f"{'log-probability, nats':<24}{'desirable':>12}{'undesirable':>14}")
for name, policy in policies.items():
    logp_desirable, logp_undesirable = completion_sums(policy, two).tolist()
    print(f"{name:<24}{logp_desirable:>12.2f}{logp_undesirable:>14.2f}")

# %% [markdown]
# The next cell samples replies to prompts that were not used in training, with the same random seed
# before and after. `python -m archangel.sample runs/kto --against toy` does this for more prompts.

# %%
prompts = sample.read_prompts("toy", 24)
settings = {"seed": 1, "top_p": 0.95, "max_new_tokens": 48, "batch_size": 24}
paths = {"before": find_model("toy"), "after": Path(config.out)}
replies = {}
with contextlib.redirect_stderr(io.StringIO()):  # hides a progress bar
    for name, path in paths.items():
        replies[name] = sample.reply_to(path, prompts, **settings)
print(sample.show(replies, count=3, is_toy=True))

# %% [markdown]
# Thirty steps made the replies polite and brief, but not always right. Twenty-four prompts and one
# seed are an illustration, and a shop of 256 products says nothing about models of 1B to 30B.
#
# ## Appendix: packed micro-batches
#
# *Not in the report, and not needed to understand a step.* A micro-batch is one sequence without
# padding: prompt, reply, next prompt, next reply. The paired losses (DPO, SLiC), and the reference
# pass of all losses, have both replies after one prompt. The rejected reply does not attend to the
# chosen one, and its positions continue from the end of the prompt. The picture shows the record of
# section 2 as a pair for DPO.

# %%
packed.use_packed_attention(model, torch.device("cpu"))
pair = dpo.make_examples(tokenized_records, dpo.Config(model="toy"))[0]
micro_batch = common.make_micro_batch([pair], [0], packed.PackedLayout(), "cpu")
with torch.no_grad():
    packed_logps = common.completion_logps(model, micro_batch)
    unpacked_logps = common.completion_logps(model, common.make_batch([pair]))
lengths = packed.segment_lengths(pair)  # of the prompt, the chosen reply, the rejected one
positions = micro_batch.inputs["position_ids"][0]
places = torch.arange(sum(lengths))
mask = packed.make_block_mask([lengths], padding=0, device="cpu")
visible = mask.mask_mod(0, 0, places[:, None], places)  # (T, T): query, key
named_lengths = {"prompt": lengths[0], "chosen": lengths[1], "rejected": lengths[2]}
plots.packed_pair(visible, positions, named_lengths)
is_equal = bool((packed_logps - unpacked_logps).abs().max() < 1e-9)
print(f"log-probabilities equal those of unpacked sequences to 1e-9 nats: {is_equal}")

# %%
folder.cleanup()
