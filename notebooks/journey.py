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
# # From a pretrained network to a low-rank one
#
# A network trained on CIFAR-10 and a sample of the images come with the package. We look at the
# singular values of two layers, drop the small ones, measure what is lost, fine-tune it back and
# time both networks.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

import lowrank_jax as lr
from lowrank_jax import data
from lowrank_jax.experiments import journey
from lowrank_jax.experiments.cifar10 import Recipe
from lowrank_jax.models import NIN
from lowrank_jax.report import pictures
from lowrank_jax.report.journey import markdown

variables = data.pretrained()
train, test = data.sample("train"), data.sample("test")

figure, axes = plt.subplots(1, 8, figsize=(12, 2))
for axis, image, label in zip(axes, test.images[:8], test.labels[:8], strict=True):
    axis.imshow(image)
    axis.set_title(data.CLASSES[label], size=9)
    axis.axis("off")

# %% [markdown]
# ## How much rank do the kernels need?
#
# The Frobenius error at rank K is exactly the root of the sum of the squared singular values
# after the K-th (Tai et al., 2016).

# %%
kernel = variables["params"]["Conv_2"]["kernel"]
values = np.asarray(lr.spectrum(kernel)).ravel()
error = np.sqrt(np.append(np.cumsum(values[::-1] ** 2)[::-1], 0)) / np.linalg.norm(values)

figure, axis = plt.subplots(figsize=(6, 3))
axis.plot(error)
axis.set(xlabel="rank of Conv_2", ylabel="relative error", ylim=0)
axis.axvline(20, color="black", ls="--")
figure.tight_layout()

# %% [markdown]
# ## Decompose
#
# A pure function from tree to tree. The factors stand in the kernel's place, and the other leaves
# are the same objects. The prediction above is met.

# %%
ranks = {"Conv_0": 10, "Conv_2": 20}
small = lr.decompose(variables, ranks)
print(jax.tree.map(np.shape, small["params"]["Conv_2"]))

back = lr.reconstruct(small)["params"]["Conv_2"]["kernel"]
measured = np.linalg.norm(back - kernel) / np.linalg.norm(kernel)
print(f"relative error {measured:.4f}, predicted {error[20]:.4f}")
assert abs(measured - error[20]) < 1e-4  # float32 rounding of a sum over 460,800 entries

# %% [markdown]
# ## Fit, tune, plan and measure
#
# `journey.run` is what `lowrank-jax demo` calls: the ranks above in closed form, fitted to images,
# and tuned; then the ranks that `plan` chooses at the same cost.

# %%
recipe = Recipe(epochs=1, peak=0.003, batch_size=50, crop=24, padding=0, distill=1.0)
options = dict(images=512, batch_size=32, rounds=3, limit=5)  # less than the demo, to be quick
few = data.Dataset(train.images[:600], train.labels[:600])
found = journey.run(NIN(), variables, ranks, few, test, recipe, **options)
stages = found.stages
assert stages["planned"].accuracy > stages["tuned"].accuracy > stages["closed form"].accuracy

# %%
Markdown(markdown(found))

# %%
pictures.draw_accuracy(found)

# %%
pictures.draw_costs(found)
