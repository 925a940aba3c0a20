"""The state of a training run: all that a step reads and changes."""

import dataclasses
from collections.abc import Collection
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from lowrank_jax.factorization.factors import wide
from lowrank_jax.training.arguments import check_kinds
from lowrank_jax.training.partition import Rules, joined, split, trained_leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a training step reads and changes, as a pytree of arrays.

    Attributes:
        step: steps that were taken, int32; it is also the position in the data.
        params: the trained leaves of the variables, None in the places of the others.
        rest: the other leaves: what is frozen, and collections such as "batch_stats".
        optimizer: state of the optimiser.
        average: exponential moving average of the parameters, in float32 or wider; None without
            one.
        key: random key of the run, from which each step's own follows.
    """

    step: jax.Array
    params: chex.ArrayTree
    rest: chex.ArrayTree
    optimizer: optax.OptState
    average: chex.ArrayTree | None
    key: chex.PRNGKey

    @classmethod
    def create(
        cls,
        variables: Any,
        tx: optax.GradientTransformation,
        *,
        seed: int = 0,
        trained: Rules | None = None,
        renewed: Collection[str] = (),
        average: bool = False,
    ) -> "TrainState":
        """A state at step 0. The variables are copied, because a step may donate its state.

        Args:
            variables: Linen variables, or any tree of arrays.
            tx: optimiser.
            seed: of all random numbers of the run.
            trained, renewed: what is trained and what is not, as `trained_leaves` takes them.
            average: whether to keep an average of the parameters.

        Raises:
            ValueError: an argument is of another kind, or as `trained_leaves` says.

        Example:
            >>> tree = {"dense": jnp.ones((3, 2)), "count": jnp.zeros((), int)}
            >>> state = TrainState.create(tree, optax.sgd(0.1))
            >>> state.params, state.variables.keys()
            ({'count': None, 'dense': Array([[1., 1.],
                   [1., 1.],
                   [1., 1.]], dtype=float32)}, dict_keys(['count', 'dense']))
        """
        check_kinds({"tx": tx, "seed": seed, "trained": trained})
        mine = trained_leaves(variables, trained, renewed)
        params, rest = split(jax.tree.map(jnp.array, variables), mine)
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            rest=rest,
            optimizer=_apart(tx.init(params), params),
            average=jax.tree.map(lambda x: jnp.copy(wide(x)), params) if average else None,
            key=jax.random.key(seed),
        )

    @property
    def variables(self) -> Any:
        """The tree that the network takes, as it is trained."""
        return joined(self.params, self.rest)

    @property
    def averaged(self) -> Any:
        """The tree with the averaged parameters, in their own types, where there is an average."""
        if self.average is None:
            return self.variables
        own = jax.tree.map(lambda mean, x: mean.astype(x.dtype), self.average, self.params)
        return joined(own, self.rest)


def _apart(tree: Any, others: Any) -> Any:
    """A tree whose arrays stand nowhere else, because no array can be donated twice."""
    seen = set(map(id, jax.tree.leaves(others)))

    def own(leaf: Any) -> Any:
        taken = id(leaf) in seen
        seen.add(id(leaf))
        return jnp.array(leaf) if taken and isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(own, tree)
