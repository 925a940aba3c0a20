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
# # Reading a plan
#
# A plan says what becomes of every layer, what that costs, and what it is predicted to lose. This
# notebook reads one line by line, draws where its ranks lie, and holds the prediction against the
# network.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import lowrank_jax as lr
from lowrank_jax import data
from lowrank_jax.models import NIN
from lowrank_jax.planning.curves import draw_curve
from lowrank_jax.planning.planner import calibrated_spectra

model, variables = NIN(), data.pretrained()
images = data.normalize(data.sample("train").images[:256])
fresh = data.normalize(data.sample("test").images[:256])
found = lr.calibrate(model.apply, variables, images)
plan = lr.plan(found, macs=0.4)
print(plan)

# %% [markdown]
# - **layer** is the path in the tree, without "params" and "kernel".
# - **first** names the form: "vertical" is a vertical convolution and then a horizontal one,
#   "spatial" all taps and then 1 x 1.
# - **rank** is the number of channels between the two. "dense" says that no rank is worth its
#   loss, or that none is cheaper.
# - **parameters** and **macs** are dense, low-rank, and the share that is left. A plan within a
#   budget of macs may leave a layer more parameters than another budget would.
# - **error** is the share of the variance of the layer's outputs that the rank leaves out, as the
#   network weighs its channels.
# - **other layers** cannot be decomposed. **total** is the network.
# - The last line has the selector, the budget, and what was reached.

# %%
for choice in plan:
    if choice.scheme:
        dense, low = choice.macs
        name = f"{choice.path}: {choice.scheme.name}, rank {choice.scheme.rank}"
        print(f"{name}, {low / dense:.0%} of its macs, error {choice.error:.3f}")

# %% [markdown]
# ## Where the ranks lie
#
# Each curve is the error of a layer over the rank, from the singular values of its whitened
# kernel. The dots are the plan. The search puts ranks where a mac buys the most, so that errors
# differ from layer to layer.

# %%
spectra = calibrated_spectra(found)
figure, axis = plt.subplots(figsize=(6, 3.5))
for choice in plan:
    if choice.scheme:
        curve = spectra.left_out(choice.path, choice.scheme.name)
        (line,) = axis.plot(np.linspace(0, 1, len(curve)), curve, label=choice.path)
        place = choice.scheme.rank / (len(curve) - 1)
        axis.plot(place, curve[choice.scheme.rank], "o", color=line.get_color())
axis.set(xlabel="rank over the largest", ylabel="error of the outputs", yscale="log", ylim=1e-4)
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## Another budget, another plan
#
# `compare` puts two plans side by side. A budget of parameters takes from late layers, which hold
# many; a budget of macs takes from early ones, which run at many positions.

# %%
other = lr.plan(found, parameters=0.4)
print(plan.compare(other))

# %%
names = [choice.path for choice in plan]
figure, axis = plt.subplots(figsize=(6, 3))
for label, own, shift in (("macs", plan, -0.2), ("parameters", other, 0.2)):
    shares = [100 * choice.macs[1] / choice.macs[0] for choice in own]
    axis.bar(np.arange(len(names)) + shift, shares, width=0.4, label=f"budget of {label}")
axis.set_xticks(range(len(names)), names)
axis.set_ylabel("macs left, %")
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## The prediction and the network
#
# The error is a prediction for one layer alone. What the network does is measured. Here it is the
# part of the images that the compressed network classifies as the dense one does.

# %%
apply = jax.jit(lr.lowrank(model.apply))
wanted = np.argmax(apply(variables, fresh), -1)


def kept(own):
    return float(np.mean(np.argmax(apply(lr.compress(found, own), fresh), -1) == wanted))


plans = [lr.plan(found, macs=share) for share in (0.2, 0.4, 0.6)]
points = [(own, kept(own)) for own in plans]
draw_curve({"classified as by the dense network": points})

# %% [markdown]
# ## A plan is plain data
#
# It is saved as JSON, and it holds the shapes of the tree. `skeleton` makes the tree of the
# compressed network from it, without the dense checkpoint.

# %%
tree = lr.skeleton(plan)
print(tree["params"]["Conv_2"]["kernel"])
