"""How a network is called in training and in evaluation."""

import dataclasses
import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank_jax.calibration.inputs import TRAINING
from lowrank_jax.training.features import Layers, with_layers
from lowrank_jax.tuning.algorithms import Choose
from lowrank_jax.tuning.running import with_algorithms

LOG = logging.getLogger("lowrank_jax")
PARAMS = "params"
Found = tuple[Any, Mapping[str, Any], Layers]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Forward:
    """``apply(variables, *inputs, **kwargs)``, as it trains and as it is evaluated.

    Attributes:
        apply: the function; it may hold kernels dense or as factors.
        training, evaluation: its arguments by name.
        mutable: collections of the variables that a training call renews and gives back beside its
            outputs, as Linen does. None for all but "params".
        rngs: names of the random streams that a training call takes as ``rngs``.
        dtype: type of the computation; None for the type of the arrays.
        choose: of the algorithms of convolutions, as `with_algorithms` takes it; None for plain
            ones.
    """

    apply: Callable
    training: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    mutable: Sequence[str] | None = ()
    rngs: Sequence[str] = ()
    dtype: jax.typing.DTypeLike | None = None
    choose: Choose | None = None

    @classmethod
    def of(
        cls,
        apply: Callable,
        kwargs: Mapping[str, Any],
        *,
        train_kwargs: Mapping[str, Any] | None = None,
        mutable: Sequence[str] | None = None,
        rngs: Sequence[str] | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        choose: Choose | None = None,
    ) -> "Forward":
        """The calls of a function; what is None is found out.

        An argument named train, training, is_training or deterministic is set for training, and
        for evaluation. A Linen module renews all collections but "params", and has the stream
        "dropout". Other functions renew nothing and have no streams.

        Args:
            apply: ``model.apply`` of a Linen module, `lowrank` of it, or any function of a tree. Of
                a compiled one the function within is called, because the arguments that are set are
                no arrays.
            kwargs: arguments of the model itself, such as ``method`` of a Linen module.
            train_kwargs: arguments that have other values in training.
            mutable, rngs, dtype, choose: as the attributes.

        Example:
            >>> forward = Forward.of(nn.Dropout(0.5).apply, {"deterministic": True})
            >>> forward.training, forward.evaluation, forward.rngs
            ({'deterministic': False}, {'deterministic': True}, ('dropout',))
        """
        if isinstance(apply, jax.stages.Wrapped):
            apply = getattr(apply, "__wrapped__", apply)
        module = _module_of(apply)
        called = apply if module is None else _method(module, kwargs.get("method"))
        known = {*_parameters(called), *kwargs}
        mode = {name: value for name, value in TRAINING.items() if name in known}
        opposite = {name: not value for name, value in mode.items()}
        if module is None:
            mutable, rngs = mutable or (), rngs or ()
        return cls(
            apply=apply,
            training={**kwargs, **mode, **(train_kwargs or {})},
            evaluation={**kwargs, **opposite},
            mutable=mutable,
            rngs=("dropout",) if rngs is None else rngs,
            dtype=dtype,
            choose=choose,
        )

    def train(
        self, variables: Any, inputs: tuple, key: chex.PRNGKey, layers: Collection[str] = ()
    ) -> Found:
        """A call in training.

        Args:
            variables: the tree.
            inputs: the arguments after it.
            key: of the random streams.
            layers: paths whose outputs are wanted.

        Returns:
            The outputs, the renewed collections, and the outputs of the layers.
        """
        options = dict(self.training)
        mutable = _collections(variables) if self.mutable is None else self.mutable
        if self.rngs:
            keys = jax.random.split(key, len(self.rngs))
            options["rngs"] = dict(zip(self.rngs, keys, strict=True))
        if mutable:
            options["mutable"] = list(mutable)
        found, noted = self._call(variables, inputs, options, layers, kept=mutable)
        outputs, renewed = found if mutable else (found, {})
        return outputs, renewed, noted

    def evaluate(
        self, variables: Any, inputs: tuple, layers: Collection[str] = ()
    ) -> tuple[Any, Layers]:
        """A call in evaluation: the outputs, and the outputs of the layers at some paths."""
        return self._call(variables, inputs, self.evaluation, layers)

    def _call(
        self,
        variables: Any,
        inputs: tuple,
        options: Mapping[str, Any],
        layers: Collection[str],
        kept: Sequence[str] = (),
    ) -> tuple[Any, Layers]:
        """A call in the type of the computation; kept collections stay in their own."""
        if self.dtype is not None:
            own = {name: variables[name] for name in kept}
            variables, inputs = cast((variables, inputs), self.dtype)
            variables = {**variables, **own} if own else variables
        if layers:
            return with_layers(self.apply, layers, self.choose)(variables, *inputs, **options)
        return with_algorithms(self.apply, self.choose)(variables, *inputs, **options), {}


def cast(tree: Any, dtype: jax.typing.DTypeLike) -> Any:
    """A tree whose floating arrays have another type.

    Example:
        >>> cast({"x": jnp.ones(2), "n": jnp.arange(2)}, "bfloat16")["x"].dtype
        dtype(bfloat16)
    """

    def own(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(own, tree)


def tell_kept(apply: Callable, kwargs: Mapping[str, Any], given: Any, variables: Any) -> None:
    """Logs which collections a training leaves as they are, where nobody asked for that.

    Args:
        apply: the function that is trained.
        kwargs: of its calls.
        given: the collections to renew and the arguments in training, None where not given.
        variables: the tree.
    """
    kept = [name for name in _collections(variables) if jax.tree.leaves(variables[name])]
    if not kept or PARAMS not in variables or any(own is not None for own in given):
        return
    if _module_of(apply) is None:
        LOG.warning(
            "%s of the variables stay as they are, for a function of a tree does not say how it is "
            "called in training; give model.apply itself, or mutable=%s and train_kwargs=.",
            " and ".join(kept),
            kept,
        )
    elif flags := _unset_flags(apply, kwargs):
        LOG.warning(
            "The model has %s, and is called in training with %s as in evaluation; if that is what "
            "turns training on, give train_kwargs=%s.",
            " and ".join(kept),
            ", ".join(f"{name}={value}" for name, value in flags.items()),
            {name: not value for name, value in flags.items()},
        )


def _unset_flags(apply: Callable, kwargs: Mapping[str, Any]) -> dict[str, bool]:
    """The flags of a Linen module's call that nobody sets, where none has a known name."""
    module = _module_of(apply)
    assert module is not None
    given = inspect.signature(_method(module, kwargs.get("method"))).parameters
    set_already = {*TRAINING, *kwargs, *getattr(apply, "keywords", {})}
    flags = {name: own.default for name, own in given.items() if isinstance(own.default, bool)}
    fields = any(name in TRAINING for name in vars(module))
    return {} if set_already & {*given, *kwargs} or fields else flags


def check_mutable(mutable: Sequence[str] | None, variables: Any) -> None:
    """Refuses collections that the variables lack, or that are trained.

    Raises:
        ValueError: there is no such collection, or it is "params".
    """
    known = _collections(variables)
    for name in mutable or ():
        if name not in known:
            why = "which is trained" if name == PARAMS else "which the variables do not have"
            raise ValueError(
                f"mutable={name!r} is not allowed, {why}; give some of {sorted(known)}, the "
                "collections that a call renews."
            )


def _collections(variables: Any) -> list[str]:
    """The collections of Linen variables that a call may renew."""
    return [name for name in variables if name != PARAMS] if isinstance(variables, Mapping) else []


def _module_of(apply: Any) -> nn.Module | None:
    """The Linen module whose method this is, within partials and transformations."""
    while apply is not None:
        owner = getattr(apply, "__self__", None)
        if isinstance(owner, nn.Module):
            return owner
        apply = getattr(apply, "func", getattr(apply, "__wrapped__", None))
    return None


def _method(module: nn.Module, method: Callable | str | None) -> Callable:
    """The method of a Linen module that a call with this ``method`` runs."""
    if callable(method):
        return method
    return getattr(type(module), method or "__call__")


def _parameters(apply: Callable) -> Sequence[str]:
    try:
        return list(inspect.signature(apply).parameters)
    except (TypeError, ValueError):  # of a builtin
        return []
