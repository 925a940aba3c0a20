"""Flax NNX: the verbs of this library for models, a module in and a module out."""

from lowrank_jax.modules.nnx import Factors, SeparableConv
from lowrank_jax.modules.surgery import rebuilt
from lowrank_jax.nnx.data import calibrate, compress, fast, plan, reestimate
from lowrank_jax.nnx.forms import functional
from lowrank_jax.nnx.training import finetune
from lowrank_jax.nnx.trees import decompose, reconstruct, trace

__all__ = [
    "Factors",
    "SeparableConv",
    "calibrate",
    "compress",
    "decompose",
    "fast",
    "finetune",
    "functional",
    "plan",
    "rebuilt",
    "reconstruct",
    "reestimate",
    "trace",
]
