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
# [KTO paper](https://arxiv.org/abs/2402.01306), which came after it: its claims about KTO's
# settings.*
#
# Three takeaways, all about one toy:
#
# 1. **KTO alone does what DPO does only after SFT.** DPO, PPO and SLiC alone gain less than SFT.
# 2. **KTO needs few labels of either class, but not too much weight on the undesirable ones.** One
#    reply per prompt is enough, and 90% of the desirable examples can be dropped. If undesirable
#    examples count twice, training collapses.
# 3. **KTO follows the majority of contradictory labels, DPO their log-odds**, as the KTO paper's
#    theorem says.
#
# The report trained {SFT, SLiC, DPO, SFT+DPO, PPO, SFT+PPO, KTO, SFT+KTO} on seven models of 1B to
# 30B, and GPT-4 judged the replies. Here the same eight methods were trained on a shop assistant of
# 0.7 M parameters that knows 256 products and has bad manners; its judge is a program. **This says
# nothing about models of 1B to 30B.** It shows what the losses do to one small model, with error
# bars, on a machine without a GPU.
#
# Nothing is trained here. Everything is drawn from `archangel/toy_results/numbers.json` by the
# functions that the suite uses. The commands that made it are in
# [the results](../archangel/RESULTS.md#commands).

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


def show(figure, width=720):
    """Draw a figure from the numbers, and show it."""
    path = Path("picture.png")
    figure(numbers, path)
    display(Image(data=path.read_bytes(), width=width))
    path.unlink()


# %% [markdown]
# ## 1. Figure 2: KTO alone, and everything after SFT, beats the chosen replies
#
# The win rate against the chosen reply of the data, minus one half: above 0 the model wins more
# often than not. Thick lines are 75% intervals, as in the report, thin ones 95%, over prompts; dots
# are training seeds.

# %%
show(figures.figure2)

# %% [markdown]
# The order of the methods is much the same at all three sizes. SFT is about as good as the chosen
# replies. DPO and PPO alone stay below it, and SLiC alone does not improve on the model that it
# started from. In the report's models SFT does nearly all of the work; here alignment adds two
# thirds as much again.
#
# ## 2. Figure 3: SFT and KTO teach the model to stop
#
# The report found that without SFT models continue after their answer and invent further turns.

# %%
show(figures.figure3)

# %% [markdown]
# So it is here. The base model's replies have 45 tokens on average, and half of them reach the
# limit of 64. After SFT all stop at EOS, after 19 tokens. DPO alone makes stopping even rarer. KTO
# alone teaches it without SFT: it sees the end of each reply as desirable or not.
#
# ## 3. Figure 5: KTO alone is close to SFT+KTO, DPO alone is far from SFT+DPO

# %%
show(figures.figure5)

# %% [markdown]
# The report found this for its largest models. Part of the difference may be due to the learning
# rates, which were chosen for each method with one seed.
#
# ## 4. The claims, tested
#
# Each claim is a contrast of methods with a statistical test. The tests and the rules for an
# outcome were fixed before any result was seen (`archangel/claims.py` says which claims were added
# later). p-values are corrected for their number, over all sizes together. In brackets is the
# effect: of win rates, if no unit is given.

# %%
display(Markdown(results.verdicts_table(numbers["claims"])))

# %% [markdown]
# ## 5. What depends on the settings
#
# KTO without SFT on the toy, with one setting changed at a time. Dots are seeds, lines one standard
# deviation over them.

# %%
show(figures.ablations, width=900)

# %% [markdown]
# - **The reference point** makes no difference on the toy's own replies, where both classes lose
#   log-probability and the estimate is clamped at 0 in nearly every step. On replies that all begin
#   with the same greeting it is above 0, and KTO is better without it. The KTO paper found the
#   opposite on its models.
# - **The value function**: with the identity in the place of the sigmoid KTO fails. Log sigmoid is
#   a little better than the sigmoid.
# - **Loss aversion**: undesirable weights from 0.5 to 1 times the desirable one are alike. From 2
#   on, the model collapses at every learning rate that was tried.
# - **Beta**: 0.1 and 0.3 suit both losses.
# - **One reply per prompt** is nearly as good as both, and better than DPO on pairs.
# - **Dropped examples**: KTO without 90% of the desirable examples still beats DPO on all pairs, at
#   the same number of steps.
#
# ## 6. Contradictory labels: KTO follows the majority
#
# Each prompt has two replies and is labelled 20 times. A share $p$ of the labels is for the reply
# that the model before training finds less likely. DPO's loss is least where the log-odds of the
# two replies have moved by $\log(p/(1-p))/\beta$, on whichever side of one half that is. KTO's is
# least where the majority's reply has all of the probability.

# %%
show(figures.contradictory, width=600)

# %% [markdown]
# DPO ends at its optimum (the dashed line, computed and not fitted): with 55% or 60% of the labels
# for a reply it still prefers the other one, as the model before training does. KTO gives the
# majority's reply nearly all of the probability from 55% on. With 50% it stays where it began.
#
# ## 7. What this does not show
#
# The toy's world is closed, its judge is a rule without noise, and a reply has some twenty tokens.
# Learning rates were chosen for the largest of the three sizes, with one seed. Nothing here says
# which loss is best for a language model that people talk to. The same commands with
# `--models report` would test it.
