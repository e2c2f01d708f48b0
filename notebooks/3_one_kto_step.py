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
# From a record to tokens, log-probabilities, the reference point, the loss, a step, and the
# replies before and after, in the toy world that ships with the project: a shop assistant of 0.7 M
# parameters that knows 256 products and has picked up bad manners. Everything is done by the
# functions that `kto.py` runs; the steps themselves by `kto.train`. (In float64 and on the CPU, so
# that another machine prints the same.)

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

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

import common
import dpo
import kto
from archangel import packed, sample
from archangel.records import read_records
from archangel.run import find_model

plt.style.use("figures.mplstyle")
disable_progress_bar()
folder = tempfile.TemporaryDirectory()
os.environ["HALOS_CACHE"] = folder.name  # where token ids are kept

# %% [markdown]
# ## 1. The pipeline
#
# *Figure 1:* supervised finetuning, then a human-centered loss; and KTO does not need pairs. This
# is the second half as the project runs it, with the functions' names. The reference model is not
# there: it never changes, so its log-probabilities are a column, computed once.

# %%
BOXES = {  # name: (x, y, what)
    "record": (0, 1, "records\nprompt, reply, label"),
    "tokens": (0, 0, "token ids\ncommon.load_records"),
    "batch": (1, 1, "a batch of the schedule\ncommon.make_micro_batches"),
    "policy": (2, 1, "log-probabilities\ncommon.completion_logps"),
    "column": (
        1.6,
        0,
        "reference log-probabilities, of all examples, before training\ncommon.add_reference_logps",
    ),
    "ratios": (3, 0.5, "log-ratios\npolicy minus reference"),
    "point": (4, 0, "reference point\nkto.kl_from_other_half"),
    "loss": (4, 1, "loss, equation (7)\nkto.kto_loss"),
    "step": (5, 1, "a step\nkto.train"),
    "replies": (5, 0, "replies\narchangel.sample"),
}
ARROWS = ["record tokens", "tokens batch", "batch policy", "tokens column", "policy ratios"]
ARROWS += ["column ratios", "ratios loss", "ratios point", "point loss", "loss step"]
ARROWS += ["step replies"]
figure, axes = plt.subplots(figsize=(12, 2))
axes.set(xlim=(-0.4, 5.4), ylim=(-0.3, 1.3))
axes.axis("off")
frame = {"boxstyle": "round,pad=0.4", "fc": "#e8f1f8", "ec": "C0"}
place = {"ha": "center", "va": "center", "fontsize": 8, "bbox": frame}
boxes = {name: axes.text(x, y, what, **place) for name, (x, y, what) in BOXES.items()}
figure.canvas.draw()  # the boxes have their sizes from here on, so that arrows can end at them
for arrow in ARROWS:
    start, end = arrow.split()
    ends = {"patchA": boxes[start].get_bbox_patch(), "patchB": boxes[end].get_bbox_patch()}
    style = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 2, "shrinkB": 2, **ends}
    axes.annotate("", BOXES[end][:2], BOXES[start][:2], arrowprops=style)
plt.show()

# %% [markdown]
# ## 2. A record, as tokens
#
# *Section 5: KTO learns from a reply and whether it is desirable; pairs are not needed.* A record
# here is a pair, because all five losses learn from the same data. KTO takes it as two examples.

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
Path(config.data).write_text("".join(json.dumps(record) + "\n" for record in records))
record = records[0]
for column, text in record.items():
    print(f"{column:<10}{text.strip()!r}")

# %%
run = common.start_run(config)
tokenized_records, _ = common.load_records(run, kto.FORMATS)
examples = kto.make_examples(tokenized_records, config)
good = examples[0]  # the first record's chosen reply
bad = examples[1]  # and its rejected one
for index in (0, 1):
    completion_ids = examples[index].completions_ids[0]
    counts = f"{len(examples[index].prompt_ids)} + {len(completion_ids)} tokens"
    print(f"desirable {examples.desirable[index]!s:<6} {counts}")
    print("   ", "|".join(map(repr, run.tokenizer.batch_decode(completion_ids[:, None]))))

# %% [markdown]
# Prompt and reply are tokenized together and divided at their border. The end-of-sequence token
# ends the reply: that a reply *stops* is learned like any word of it. (This base model continues
# with turns of the user, as in the report's Figure 3.)
#
# ## 3. Log-probabilities
#
# *Equations (4) and (7) take $\log\pi(y|x)$, of a whole reply.* It is the sum over the reply's
# tokens, never their mean. The output head runs only on the positions that predict these tokens.

# %%
model, tokenizer = sample.load(find_model("toy"))
model = model.double()
batch = common.make_batch([good, bad])
with torch.no_grad():
    logps = common.completion_logps(model, batch)
figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), sharex=True)
kinds = ("desirable", "undesirable")
values_of_both = batch.pad_completions(logps)
for axes, example, kind, values, colour in zip(
    panels, (good, bad), kinds, values_of_both, ("C0", "C1")
):
    completion_ids = example.completions_ids[0]
    words = [repr(word) for word in run.tokenizer.batch_decode(completion_ids[:, None])]
    values = values[: len(words)]
    axes.barh(range(len(words)), values, color=colour)
    axes.set_yticks(range(len(words)), words, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="log-probability, nats", title=f"{kind}: {values.sum():.2f} nats in all")
plt.show()

# %% [markdown]
# ## 4. Before the first step
#
# *Section 5, equation (7).* The reference is the policy as it is now. So every log-ratio is 0, so
# is the reference point, every reply is worth exactly what was expected, every loss is one half,
# and every reply is pushed as hard as it ever will be, by $\beta/4$. The step's batch has as many
# desirable as undesirable examples (*section 5 found that best*).

# %%
schedule = kto.make_schedule(examples, config)  # the example indices of every step
batch = common.make_batch([examples[index] for index in schedule[0]])
desirable = torch.tensor([examples.desirable[index] for index in schedule[0]])


def completion_sums(model, batch):
    with torch.no_grad():
        return batch.sum_completions(common.completion_logps(model, batch))


reference_logps = completion_sums(model, batch)


def measure(policy_logps):
    """Log-ratios, reference points, losses and how hard each reply is pushed up, of the batch."""
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
up, down = pushes[desirable].mean(), pushes[~desirable].mean()
print(f"pushes {up:+.4f} desirable, {down:+.4f} undesirable")

# %% [markdown]
# ## 5. The step
#
# `kto.train` does it: the same batch (the schedule depends on the seed alone), loss, gradient,
# RMSprop. It writes what a user's run writes; its first line of metrics is what was just computed.


# %%
def train(steps):
    """kto.train, up to so many steps in all, continued where it stopped; what it logged."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar tells the time
        kto.train(dataclasses.replace(config, max_steps=steps, resume=True))
    torch.distributed.destroy_process_group()  # so that it can be called again from here
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return [json.loads(line) for line in Path(config.out, "metrics.jsonl").open()]


(metrics,) = train(steps=1)
print(f"by kto.train  loss {metrics['loss']:.6f}, reference point {metrics['kl']:.6f}")
print(f"by hand       loss {losses.mean():.6f}, reference point {kl.mean():.6f}")
print(f"gradient norm {metrics['grad_norm']:.4f}, learning rate {metrics['lr']:.1e}")
after, _ = sample.load(Path(config.out))
after = after.double()
moves = torch.cat([(a - b).flatten() for a, b in zip(after.parameters(), model.parameters())])
print(f"{len(moves):,} weights moved, by {moves.abs().mean():.1e} on average")

# %% [markdown]
# ## 6. What the step did to its batch
#
# *Section 5: the KL term of one half is estimated from the other.* After one step the log-ratios
# are no longer 0. The dotted lines are the mean log-ratios of the classes; the reference point of a
# class is the *other* class's, and 0 where that is negative.

# %%
log_ratios, kl, losses, pushes = measure(completion_sums(after, batch))
CLASSES = ((True, "C0", "o", "desirable"), (False, "C1", "s", "undesirable"))


def draw_on_curve(axes, log_ratios, kl, losses, reach, title):
    """The batch's examples on the curve of their class's loss, from the reference point."""
    curve = torch.linspace(-reach, reach, 401)
    for is_good, colour, mark, _ in CLASSES:
        of_class = desirable == is_good
        loss = kto.kto_loss(curve, 0 * curve, torch.full(curve.shape, is_good), 0.0, config.beta)
        axes.plot(curve, loss, color=colour, lw=1)
        axes.plot(log_ratios[of_class] - kl[of_class], losses[of_class], mark, color=colour)
    axes.set(xlabel="log-ratio minus reference point, nats", ylabel="loss", title=title)


figure, panels = plt.subplots(1, 2, figsize=(10, 3.6))
for is_good, colour, mark, name in CLASSES:
    r = log_ratios[desirable == is_good]
    panels[0].plot(r, range(1, len(r) + 1), mark, color=colour, label=name)
    panels[0].axvline(r.mean(), color=colour, ls=":")
    point = kl[desirable == is_good][0]
    print(f"{name:<12} mean log-ratio {r.mean():+.3f} nats, reference point {point:.3f}")
panels[0].axvline(0, color="0.8", lw=1, zorder=0)
panels[0].set(xlabel="log-ratio after the step, nats", ylabel="example of its class")
panels[0].set_title("the batch")
panels[0].legend()
draw_on_curve(panels[1], log_ratios, kl, losses, 1.5, "on the curve of its loss, close up")
plt.show()
print(f"the batch's loss, 0.5 before: {losses.mean():.4f}")

# %% [markdown]
# ## 7. Thirty steps
#
# The same run continues from its checkpoint (`--resume`) to step 30, one pass over 240 records.

# %%
metrics = train(steps=30)
final, _ = sample.load(Path(config.out))
final = final.double()
steps = [record["step"] for record in metrics]
figure, panels = plt.subplots(1, 3, figsize=(12, 3.2))
for name, line in (("desirable", "C0-"), ("undesirable", "C1--")):
    rewards = [record[f"reward_{name}"] for record in metrics]
    panels[0].plot(steps, rewards, line, label=name)
points = [config.beta * record["kl"] for record in metrics]
panels[0].plot(steps, points, "k:", label="reference point")
panels[0].set(
    xlabel="step", ylabel=r"mean reward ($\beta$ times nats)", title="rewards of each batch"
)
panels[0].legend()
panels[1].plot(steps, [record["loss"] for record in metrics], "C2-")
panels[1].set(xlabel="step", ylabel="loss", title="loss of each batch")
log_ratios, kl, losses, pushes = measure(completion_sums(final, batch))
draw_on_curve(panels[2], log_ratios, kl, losses, 60, "the first batch, after step 30")
plt.show()
clamped = sum(record["kl"] < 1e-9 for record in metrics)  # at first it is 0 to rounding
last = metrics[-10:]
margin = sum(record["reward_margin"] for record in last) / len(last)
print(f"reference point at its clamp, 0, in {clamped} of {len(metrics)} steps")
print(f"reward margin, mean of the last {len(last)} batches: {margin:.1f}")

# %% [markdown]
# Both classes lose log-probability, the undesirable faster. The mean of either class is then soon
# negative, so the reference point is mostly at its clamp. On the right, what is far from it is
# pushed no more: the report's concave gains and convex losses at work.
#
# ## 8. What changed in the replies
#
# First the two replies that we began with:

# %%
two = common.make_batch([good, bad])
table = {"before": model, "after 1 step": after, "after 30 steps": final}
print(f"{'log-probability, nats':<24}{'desirable':>12}{'undesirable':>14}")
for name, policy in table.items():
    first, second = completion_sums(policy, two).tolist()
    print(f"{name:<24}{first:>12.2f}{second:>14.2f}")

# %% [markdown]
# Then new replies to prompts that it was not trained on, the same luck before and after: what
# `python -m archangel.sample runs/kto --against toy` prints, for fewer prompts.

# %%
prompts = sample.read_prompts("toy", 24)
settings = {"seed": 1, "top_p": 0.95, "max_new_tokens": 48, "batch_size": 24}
paths = {"before": find_model("toy"), "after": Path(config.out)}
with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
    replies = {name: sample.reply_to(path, prompts, **settings) for name, path in paths.items()}
print(sample.show(replies, count=3, is_toy=True))

# %% [markdown]
# Thirty steps made it civil and brief, not yet always right. Twenty-four prompts and one seed are
# an illustration, and a shop of 256 products says nothing about models of 1B to 30B.
#
# ## Appendix: packed micro-batches
#
# *Not in the report, and not needed to understand a step.* A micro-batch is one sequence without
# padding: prompt, reply, next prompt, next reply. The paired losses (DPO, SLiC), and the reference
# pass of all losses, have both replies after one prompt. The rejected reply does not attend to the
# chosen one, and its positions continue from the end of the prompt. Here is our record as DPO has
# it, with the rule and the positions.

# %%
packed.use_packed_attention(model, torch.device("cpu"))
pair = dpo.make_examples(tokenized_records, dpo.Config(model="toy"))[0]
micro_batch = common.make_micro_batch([pair], [0], packed.PackedLayout(), "cpu")
with torch.no_grad():
    packed_logps = common.completion_logps(model, micro_batch)
    padded_logps = common.completion_logps(model, common.make_batch([pair]))
lengths = packed.segment_lengths(pair)  # of the prompt, the chosen reply, the rejected one
start, middle, length = np.cumsum(lengths)
positions = micro_batch.inputs["position_ids"][0]
place = torch.arange(length)
mask = packed.make_block_mask([lengths], padding=0, device="cpu")
visible = mask.mask_mod(0, 0, place[:, None], place)

figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1, 1.2))
panels[0].imshow(visible, cmap="cividis")
for edge in (start, middle):
    panels[0].axvline(edge - 0.5, color="white", lw=1)
    panels[0].axhline(edge - 0.5, color="white", lw=1)
parts = {"prompt": start / 2, "chosen": (start + middle) / 2, "rejected": (middle + length) / 2}
panels[0].set(xlabel="key", ylabel="query", title="yellow: the query attends to the key")
panels[0].set_xticks(list(parts.values()), parts)
panels[0].set_yticks(list(parts.values()), parts, rotation=90, va="center")
panels[1].plot(positions, "C0.-", lw=1)
for edge in (start, middle):
    panels[1].axvline(edge - 0.5, color="0.8", lw=1)
panels[1].set_xticks(list(parts.values()), parts)
panels[1].set(xlabel="place in the sequence", ylabel="position_ids", title="positions")
plt.show()
same = (packed_logps - padded_logps).abs().max() < 1e-9
print(f"log-probabilities as in a sequence for each reply, to 1e-9 nats: {bool(same)}")

# %%
folder.cleanup()
