"""Low-rank compression of pretrained Flax convolutional networks."""

from lowrank_jax.allocator import keep_memory as keep_memory
from lowrank_jax.apply import lowrank as lowrank
from lowrank_jax.budget import Budget as Budget
from lowrank_jax.checkpoint import load_weights as load_weights
from lowrank_jax.checkpoint import save_weights as save_weights
from lowrank_jax.compress import compress as compress
from lowrank_jax.decompose import decompose as decompose
from lowrank_jax.decompose import reconstruct as reconstruct
from lowrank_jax.fast import fast as fast
from lowrank_jax.plan import Plan as Plan
from lowrank_jax.planning import plan as plan
from lowrank_jax.schemes import Separable as Separable
from lowrank_jax.schemes import max_rank as max_rank
from lowrank_jax.schemes import merge as merge
from lowrank_jax.schemes import spectrum as spectrum
from lowrank_jax.separable import SeparableConv as SeparableConv
from lowrank_jax.trace import trace as trace
from lowrank_jax.tuning import Timer as Timer
from lowrank_jax.uses import KernelUse as KernelUse
from lowrank_jax.uses import Trace as Trace
