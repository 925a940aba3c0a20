"""Runs an unmodified Flax Linen model with decomposed parameters."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from lowrank_jax.factorization.separable import FACTORS
from lowrank_jax.program.factored import SPLIT, has_own_function, run_dense, run_factored
from lowrank_jax.program.tracing import trace
from lowrank_jax.tree.decomposing import PAIRS, factored_layers, reconstruct
from lowrank_jax.tuning.algorithms import Choose

_KINDS = (nn.Conv, nn.ConvTranspose, nn.ConvLocal)
_FIRST = {names: first for first, names in FACTORS.items()}


def lowrank(apply: Callable, programs: Choose | None = None) -> Callable:
    """Makes a function that runs a Linen model take decomposed variables as well as dense ones.

    Calls of `nn.Conv` and `nn.ConvTranspose` whose parameters hold factors run as two convolutions
    of the same layer's kind and arguments; everything else runs as it is. The interception happens
    while the program is traced (``flax.linen.intercept_methods``), so that the compiled program is
    that of a model written with `SeparableConv`. Kernels that reach a layer through a lifted
    transformation (``nn.scan``, ``nn.map_variables``) are proven unaltered by one trace of the
    dense program.

    Args:
        apply: ``model.apply``, or a function that calls it, of (variables, *args, **kwargs).
        programs: chooses the program of each layer, a function of (layer, scheme), by one of the
            names of `lowrank_jax.programs`; scheme is None for a dense layer. `Timer.fastest` is
            one. Without it, one convolution runs for a kernel and two for factors.

    Returns:
        A function of the same arguments.

    Raises:
        ValueError: when called, if a decomposed layer cannot compute what the dense one does: a
            mask, a custom convolution, a subclass, a kernel that is changed on its way, or factors
            that do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from lowrank_jax import decompose
        >>> model, x = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu]), jnp.ones((1, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), x)
        >>> small = {"params": decompose(variables["params"], {"layers_0": 3})}
        >>> jax.jit(lowrank(model.apply))(small, x).shape
        (1, 8, 8, 16)
    """
    proven: set[str] = set()

    @functools.wraps(apply)
    def run(variables: Any, *args: Any, **kwargs: Any) -> Any:
        given = {id(leaf) for leaf in jax.tree.leaves(variables)}
        lifted: set[str] = set()
        intercept = functools.partial(_intercept, given, lifted, programs)
        try:
            with nn.intercept_methods(intercept):
                result = apply(variables, *args, **kwargs)
        except flax.errors.ScopeParamNotFoundError as error:
            if message := _explain(error, variables):
                raise ValueError(message) from error
            raise
        if lifted - proven:
            _prove(apply, variables, args, kwargs)
            proven.update(lifted)
        return result

    return run


def _intercept(
    given: set[int], lifted: set[str], programs, call: Callable, args, kwargs, context
) -> Any:
    """Runs a convolution as its factors, where its parameters hold them."""
    layer = context.module
    if isinstance(layer, (nn.WeightNorm, nn.SpectralNorm)):
        _refuse_normalised(layer)
    if not isinstance(layer, _KINDS) or context.method_name != "__call__" or layer.scope is None:
        return call(*args, **kwargs)
    names = next(
        (names for names in PAIRS if all(layer.has_variable("params", name) for name in names)),
        None,
    )
    if names is None:
        dense = layer.has_variable("params", "kernel") and len(args) == 1 and not kwargs
        return run_dense(layer, call, args[0], programs) if dense else call(*args, **kwargs)
    path = "/".join(layer.path)
    if reason := _refusal(layer):
        raise ValueError(_REFUSED.format(path, reason))
    factors = [layer.get_variable("params", name) for name in names]
    if any(id(leaf) not in given for leaf in jax.tree.leaves(factors)):
        lifted.add(path)
    run = functools.partial(run_factored, layer, _FIRST[names], factors, path, programs=programs)
    return run(*args, **kwargs)


def _refuse_normalised(wrapper: nn.WeightNorm | nn.SpectralNorm) -> None:
    inner = wrapper.layer_instance
    below = inner.variables.get("params", {}) if inner.scope else {}
    for key in factored_layers(flatten_dict({"/".join(inner.path): below}) if below else {}):
        raise ValueError(
            _REFUSED.format("/".join(key), f"{type(wrapper).__name__} changes its kernel")
        )


_REFUSED = (
    "{}: cannot run decomposed: {}. Leave it out of the table of ranks, or run the model with the dense tree that "
    "reconstruct(params) gives."
)


def _refusal(layer: nn.Module) -> str:
    """Why a layer cannot run as two convolutions; "" if it can."""
    if type(layer) not in SPLIT:
        return f"it is a {type(layer).__name__}, which may change its kernel or not share it between positions"
    if layer.mask is not None:
        return "it masks its kernel; decompose mask * kernel and remove the mask"
    if layer.has_variable("params", "kernel"):
        return "its parameters hold both a dense kernel and factors"
    if getattr(layer, "transpose_kernel", False):
        return "transpose_kernel=True flips its kernel"
    if has_own_function(layer):
        return "it has a convolution function of its own, which may do more than convolve"
    return ""


def _explain(error: Exception, variables: Any) -> str:
    """A missing kernel where the tree holds factors, in plain words; "" if the tree holds none."""
    layers = factored_layers(flatten_dict(variables, keep_empty_nodes=True))
    paths = ", ".join("/".join(map(str, key)).removeprefix("params/") for key in layers)
    return paths and (
        f"The model asks for a parameter that the tree does not hold: {error}. The tree is decomposed at {paths}. "
        "If the layer is one of these, it is no plain nn.Conv or nn.ConvTranspose: leave it out of the table of "
        "ranks, or run the dense tree of reconstruct(params). If not, the tree belongs to another model."
    )


def _prove(apply: Callable, variables: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises ValueError if the dense program changes a kernel that is decomposed before it
    convolves with it."""
    flat = flatten_dict(variables, keep_empty_nodes=True)
    uses = trace(apply, jax.eval_shape(reconstruct, variables), *args, **kwargs)
    for key in factored_layers(flat):
        uses.safe_use("/".join(map(str, key[1:] if key[0] == "params" else key)))
