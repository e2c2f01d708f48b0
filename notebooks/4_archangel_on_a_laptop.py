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
# # Archangel on a laptop
#
# *The [report](https://github.com/ContextualAI/HALOs/blob/main/assets/report.pdf), sections 3.4, 5
# and 6: Figures 2, 3 and 5, and its claims. The
# [KTO paper](https://arxiv.org/abs/2402.01306), which came after it: two more claims, and the
# sensitivity that a review of the paper asked about.*
#
# The report trained {SFT, SLiC, DPO, SFT+DPO, PPO, SFT+PPO, KTO, SFT+KTO} on seven models of 1B to
# 30B and let GPT-4 judge the replies. Here the same eight were trained on a toy: a shop assistant
# that knows 256 products and has picked up bad manners, whose judge is a program. **A shop of a few
# hundred products says nothing about models of 1B to 30B.** What it shows is what the losses do to
# one small model, with error bars, on a machine without a GPU.
#
# Nothing is trained here. All that follows is drawn from one file, `numbers.json`, by the functions
# that the suite uses. What made it:
#
#     python -m archangel.toy --layers 2 --width 64 --out worlds/small      # the two other sizes
#     python -m archangel.toy --layers 3 --width 96 --out worlds/medium
#     python -m archangel.suite --seeds 5 --models worlds/small/model worlds/medium/model \
#         --data toy --out runs/sizes
#     python -m archangel.suite --seeds 5 --out runs/toy
#     python -m archangel.suite --seeds 3 --experiment ablations contradictory --out runs/more
#     python -m archangel.results runs/sizes/numbers.json runs/toy/numbers.json \
#         runs/more/numbers.json --out archangel/toy_results

# %%
import json
import sys
from pathlib import Path

sys.path.insert(0, "..")  # the project's folder

from IPython.display import Image, Markdown, display

from archangel import figures, results

FOLDER = Path("../archangel/toy_results")
numbers = json.loads((FOLDER / "numbers.json").read_text())
for model in numbers["models"]:
    print(f"{model['name']:<8} {model['parameters']:>9,} parameters")
print(numbers["methods"][0]["prompts"], "held-out prompts, the same for all")


def show(figure, *more, width=720):
    """Draw a picture from the numbers, and show it."""
    path = Path("picture.png")
    figure(numbers, path, *more)
    display(Image(data=path.read_bytes(), width=width))
    path.unlink()


# %% [markdown]
# ## 1. Figure 2: win rates by method and size
#
# Against the chosen reply of the data, minus one half: above 0 the model beats it more often than
# not. Thick lines are the report's 75% intervals, thin ones 95%, over prompts; dots are seeds.

# %%
show(figures.figure2)

# %% [markdown]
# Much the same at all three sizes. What aligns after SFT wins, and so does KTO alone; SFT itself is
# about as good as the data's chosen replies; DPO and PPO alone get a third of the way, SLiC
# alone no further than the model that it started from. Larger is a little better. (The report's
# models show SFT doing nearly all of it: here alignment adds more than half as much again.)
#
# ## 2. Figure 3: how long replies are
#
# *The report:* without SFT, models continue after the answer and invent further turns; SFT stops
# that.

# %%
show(figures.figure3)

# %% [markdown]
# So it is here: the base model's replies run to 45 tokens and half of them are cut off by the limit
# of 64; after SFT all end by themselves, after 19. DPO alone ends even fewer than before. KTO alone
# learns to end without SFT: it sees each reply with its end, as desirable or not.
#
# ## 3. Figure 5: KTO against DPO
#
# *The report:* KTO alone does what needs SFT first with DPO.

# %%
show(figures.figure5)

# %% [markdown]
# So it is here: KTO alone is within 0.03 of SFT+KTO at each size, DPO alone more than 0.3 below
# SFT+DPO. (How much of that is the loss and how much the learning rate, chosen for each method on
# one seed, one cannot tell from this.)
#
# ## 4. The claims, tested
#
# Each claim of the report and of the KTO paper (the last two groups: few desirable rows,
# contradictory labels) as a contrast, with its test and the rule by which it holds, fixed before
# any result was seen (`archangel/claims.py`). p-values are corrected for their number, over all
# sizes together.

# %%
display(Markdown(results.claims_table(numbers["claims"])))

# %% [markdown]
# ## 5. How much depends on the settings
#
# The review of the KTO paper asked for the reference point to be ablated, and for the sensitivity
# to loss aversion; four examples a batch is a claim of the report (four on each GPU, of a batch of
# 32), few desirable rows one of the KTO paper (where it compares with DPO). Dots are seeds, lines
# one standard deviation over them.

# %%
show(figures.ablations, width=900)

# %% [markdown]
# **The reference point** makes no difference here: both classes lose log-probability from the
# start, so that the estimate over mismatched partners is negative at every step, and its clamp is
# no reference point at all; measured against the other half KTO does as well, also with the
# gradient attached or in groups of 4 examples, as in the authors' code of December 2023. **Loss
# aversion**: an undesirable reply that counts 1.5 times costs a little; from 2 on the model falls
# apart, its held-out replies of both classes 50 to 260 nats below where they were, and next to none
# that ends. **Beta**: one value suits both losses, 0.1 or 0.3. **Batches of four** examples at the
# same learning rate cost 0.05 of win rate. **Nine in ten desirable rows dropped**: unlike the KTO
# paper's models this one falls from +0.25 to +0.03; its replies are civil and end, but half are
# wrong.
#
# ## 6. Contradictory labels
#
# *A theorem of the KTO paper.* Each prompt has two replies and is labelled again and again,
# a share p of the labels for one reply, where the model before training likes the other. DPO's
# loss is least where the log-odds have moved by $\log(p/(1-p))/\beta$, however far that is from
# the majority's side; KTO's is least on the majority's side.

# %%
show(figures.contradictory, width=600)

# %% [markdown]
# As the theorem says. DPO ends where its loss is least (the broken line, computed, not fitted):
# with 55% or 60% of the labels for a reply it still prefers the other, as the model did before.
# KTO gives the majority's reply all of the probability from 55% on, and with 50% stays where it
# began. Both are what their losses ask for: DPO's the log-odds of the labels, KTO's the majority.
#
# ## 7. What none of this shows
#
# The toy's world is closed, its labels are clean except for the noise put there, its judge
# cannot be flattered, and a reply is twenty tokens. Learning rates were chosen on the toy's own
# held-out training rows, for the middle size, one seed. Nothing here says which loss is best for a
# language model that people talk to; the same commands, with `--models report`, would.
