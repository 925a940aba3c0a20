"""Low-rank compression of pretrained networks that are JAX functions of a parameter tree.

    import lowrank_jax as lr

    found = lr.calibrate(model.apply, variables, images)  # once, for all plans and fits
    small = lr.compress(found, lr.plan(found, macs=0.5))  # half of the multiply-accumulates
    logits = lr.lowrank(model.apply)(small, images)  # the model's code is unchanged

=============  =====================================================================
trace          every kernel's use, cost and safety
decompose      the named kernels become factors, in closed form, without data
reconstruct    factors become dense kernels again
lowrank        a function of a tree that runs with factors
calibrate      what layers read and give, from unlabelled images
plan           the rank of every layer within a budget
compress       factors fitted to data, without training
finetune       trains a network, dense or decomposed; stops and resumes
fast           the fastest program on this device, measured
load_weights   a tree from a file or folder; save_weights writes it
=============  =====================================================================

``help(lr.plan)`` tells the arguments of a verb. The model's own arguments, such as ``train=False``,
follow by name in every verb that calls the model. ``lr.nnx`` has the verbs for models of NNX. Long
verbs show a bar on a terminal and in a notebook, and log lines elsewhere;
``logging.getLogger("lowrank_jax").setLevel("ERROR")`` silences both.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lowrank_jax.calibration.collecting import Calibration, calibrate
from lowrank_jax.compression.compressing import compress
from lowrank_jax.factorization.channel import Channel
from lowrank_jax.factorization.matrix import Matrix
from lowrank_jax.factorization.merging import merge
from lowrank_jax.factorization.ranks import max_rank
from lowrank_jax.factorization.scheme import Scheme, spectrum
from lowrank_jax.factorization.separable import Separable
from lowrank_jax.factorization.tucker import Tucker
from lowrank_jax.io.weights import load_weights, save_weights
from lowrank_jax.modules.linen import SeparableConv
from lowrank_jax.planning.budget import Budget
from lowrank_jax.planning.leaves import skeleton
from lowrank_jax.planning.planner import plan
from lowrank_jax.planning.plans import Plan
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.program.tracing import trace
from lowrank_jax.program.transform import lowrank
from lowrank_jax.tree.decomposing import decompose, reconstruct

if TYPE_CHECKING:
    from lowrank_jax import data, models, nnx, training
    from lowrank_jax.training.finetuning import finetune
    from lowrank_jax.tuning.experimental.allocator import keep_memory
    from lowrank_jax.tuning.search import fast
    from lowrank_jax.tuning.timer import Timer

__version__ = version("lowrank-jax")

__all__ = [
    "Budget",
    "Calibration",
    "Channel",
    "KernelUse",
    "Matrix",
    "Plan",
    "Scheme",
    "Separable",
    "SeparableConv",
    "Timer",
    "Trace",
    "Tucker",
    "calibrate",
    "compress",
    "data",
    "decompose",
    "fast",
    "finetune",
    "keep_memory",
    "load_weights",
    "lowrank",
    "max_rank",
    "merge",
    "models",
    "nnx",
    "plan",
    "reconstruct",
    "save_weights",
    "skeleton",
    "spectrum",
    "trace",
    "training",
]

# Loaded when used: `import lowrank_jax` costs what its verbs need.
_LATER = {
    "Timer": "lowrank_jax.tuning.timer",
    "data": "lowrank_jax",
    "fast": "lowrank_jax.tuning.search",
    "finetune": "lowrank_jax.training.finetuning",
    "keep_memory": "lowrank_jax.tuning.experimental.allocator",
    "models": "lowrank_jax",
    "nnx": "lowrank_jax",
    "training": "lowrank_jax",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'lowrank_jax' has no attribute {name!r}")
    if _LATER[name] == "lowrank_jax":
        return importlib.import_module(f"lowrank_jax.{name}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
