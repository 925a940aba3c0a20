"""Flax NNX: a model in, a new model out.

`decompose` cuts convolutions to given ranks, `plan` chooses the ranks, `compress` fits the factors
to data, `fast` finds the fastest way to run the model.
"""

from lowrank_jax.nnx.calibrate import reestimate as reestimate
from lowrank_jax.nnx.compress import compress as compress
from lowrank_jax.nnx.decompose import decompose as decompose
from lowrank_jax.nnx.decompose import reconstruct as reconstruct
from lowrank_jax.nnx.decompose import trace as trace
from lowrank_jax.nnx.planning import plan as plan
from lowrank_jax.nnx.programs import fast as fast
from lowrank_jax.nnx.programs import programmed as programmed
from lowrank_jax.nnx.separable import SeparableConv as SeparableConv
