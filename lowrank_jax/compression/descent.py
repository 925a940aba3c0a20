"""Gradient steps on a few arrays, kept where they help on batches that they do not see."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.compression.holding import loaded
from lowrank_jax.program.compiler import default_options

RATE = 0.01  # of the root mean square of an array, for each step at the start
HELD = 8  # one batch of so many is held out
Tree = TypeVar("Tree")
Loss = Callable[[Tree, Any], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Descent(Generic[Tree]):
    """What some steps gave.

    Attributes:
        arrays: after the steps, or as they were where the steps did not help.
        before, after: the loss on the batches that were held out.
    """

    arrays: Tree
    before: float
    after: float

    @property
    def helped(self) -> bool:
        """Whether the steps lowered the loss where they did not see it."""
        return self.after < self.before


def descend(loss: Loss[Tree], start: Tree, batches: Sequence, steps: int) -> Descent[Tree]:
    """Lowers the mean of a loss over batches by Adam (Kingma and Ba, 2015), one batch a step.

    A step is relative to the root mean square of an array, and falls to zero as half a cosine.

    Args:
        loss: function of the arrays and a batch.
        start: the arrays, in float32.
        batches: at least two; what `Holding` keeps of them is read when it is needed.
        steps: how many.
    """
    held = batches[HELD - 1 :: HELD] or batches[-1:]
    data = [batch for batch in batches if not any(batch is other for other in held)]
    measure = jax.jit(loss, compiler_options=default_options())
    new = _stepped(loss, start, data, steps)
    before, after = (
        float(np.mean([measure(arrays, loaded(batch)) for batch in held]))
        for arrays in (start, new)
    )
    found = Descent(arrays=new, before=before, after=after)
    return found if found.helped else Descent(arrays=start, before=before, after=before)


def _stepped(loss: Loss[Tree], arrays: Tree, data: Sequence, steps: int) -> Tree:
    optimizer = _optimizer(steps)

    @functools.partial(jax.jit, compiler_options=default_options())
    def step(arrays: Tree, state: chex.ArrayTree, batch: Any) -> tuple:
        updates, state = optimizer.update(jax.grad(loss)(arrays, batch), state, arrays)
        return jax.tree.map(jnp.add, arrays, updates), state

    state = optimizer.init(arrays)
    for turn in _turns(len(data), steps):
        arrays, state = step(arrays, state, loaded(data[turn]))
    return arrays


def _turns(count: int, steps: int) -> np.ndarray:
    """So many batches at random, each once before one comes again."""
    rng = np.random.default_rng(0)
    rounds = [rng.permutation(count) for _ in range(-(-steps // count))]
    return np.concatenate(rounds)[:steps]


def _optimizer(steps: int) -> Any:
    import optax  # takes a while, and only steps need it

    rate = optax.cosine_decay_schedule(RATE, steps)
    relative = optax.scale_by_param_block_rms()
    return optax.chain(optax.scale_by_adam(), relative, optax.scale_by_learning_rate(rate))
