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
# # Compress your own model, end to end
#
# Plan, compress, fine-tune, save, reload in a new process, export. Put your model, your variables
# and your images into the next cell. The rest stays as it is.

# %%
import pathlib
import subprocess
import sys
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
from jax import export

import lowrank_jax as lr
from lowrank_jax import data
from lowrank_jax.models import NIN

model, variables = NIN(), data.pretrained()  # any Linen model, or any function of a tree
train, test = data.sample("train"), data.sample("test")
images, labels = data.normalize(train.images[:512]), train.labels[:512]
fresh, truth = data.normalize(test.images[:256]), test.labels[:256]
folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## What can be decomposed?

# %%
print(lr.trace(model.apply, variables, images[:1]))

# %% [markdown]
# ## Plan and compress
#
# One pass over unlabelled images serves every plan and every fit.

# %%
found = lr.calibrate(model.apply, variables, images)
plan = lr.plan(found, macs=0.3)
small = lr.compress(found, plan)
print(plan)

# %%
apply = jax.jit(lr.lowrank(model.apply))


def accuracy(tree):
    return float(np.mean(np.argmax(apply(tree, fresh), -1) == truth))


scores = {
    "dense": accuracy(variables),
    "kernels alone": accuracy(lr.decompose(variables, plan)),
    "fitted": accuracy(small),
}
print({name: f"{score:.1%}" for name, score in scores.items()})

# %% [markdown]
# ## Fine-tune
#
# Towards the dense network's probabilities and the labels. A run in a folder can be stopped and
# goes on.

# %%
tuned = lr.finetune(
    model.apply,
    small,
    (images, labels),
    teacher=variables,
    steps=16,
    batch_size=32,
    learning_rate=0.005,
    folder=folder / "run",
)
scores["fine-tuned"] = accuracy(tuned)

figure, axis = plt.subplots(figsize=(5, 2.5))
axis.barh(list(scores), [100 * score for score in scores.values()])
axis.set(xlabel="accuracy, %", xlim=(0, 100))
figure.tight_layout()
assert scores["fitted"] > scores["kernels alone"]

# %% [markdown]
# ## Save, and reload in a new process
#
# The other process has the file and the model's code. It has no dense checkpoint.

# %%
lr.save_weights(folder / "small.safetensors", tuned)
plan.save(folder / "plan.json")
np.save(folder / "images.npy", fresh)
code = """
import jax, numpy as np, lowrank_jax as lr
from lowrank_jax.models import NIN

tree = lr.load_weights("small.safetensors")
logits = jax.jit(lr.lowrank(NIN().apply))(tree, np.load("images.npy"))
np.save("logits.npy", logits)
"""
subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
difference = np.abs(np.load(folder / "logits.npy") - apply(tuned, fresh)).max()
print(f"largest difference of a logit: {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# ## Export
#
# StableHLO for three kinds of device, from this one. The batch is a symbol.

# %%
(batch,) = export.symbolic_shape("batch")
shape = jax.ShapeDtypeStruct((batch, *fresh.shape[1:]), fresh.dtype)
serve = jax.jit(lambda images: lr.lowrank(model.apply)(tuned, images))
program = export.export(serve, platforms=("cpu", "cuda", "tpu"))(shape)
(folder / "network.stablehlo").write_bytes(program.serialize())

code = """
import pathlib, numpy as np
from jax import export

program = export.deserialize(bytearray(pathlib.Path("network.stablehlo").read_bytes()))
np.save("exported.npy", program.call(np.load("images.npy")[:4]))
"""
subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
difference = np.abs(np.load(folder / "exported.npy") - apply(tuned, fresh[:4])).max()
print(f"largest difference of a logit: {difference:.1e}")
assert difference < 1e-3
