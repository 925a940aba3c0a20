"""Compression with a little unlabelled data: one walk through the network fits every layer to what it will see."""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from lowrank_jax.apply import run_factored
from lowrank_jax.calibrate import output_scales, spy
from lowrank_jax.decompose import Ranks, decompose, find_layer, find_scheme, layer_leaves
from lowrank_jax.fitting import fit_layer
from lowrank_jax.moments import Moments, moments
from lowrank_jax.schemes import FACTORS, Separable
from lowrank_jax.trace import trace


def compress(
    apply: Callable,
    variables: Any,
    images: Any,
    ranks: Ranks,
    *args: Any,
    sweeps: int = 1,
    batch_norm: str = "mean",
    **kwargs: Any,
) -> dict[str, Any]:
    """Decomposes the layers of a table so that the network's outputs, not its kernels, change least.

    The dense network and the one being compressed run side by side, once. At each decomposed layer the factors
    are fitted, in closed form, to give the dense network's outputs from the inputs that the compressed network
    has there, so that later layers make up for the errors of earlier ones. The means of what enters a batch
    normalisation, and biases of decomposed layers, are set to those of the dense network. Nothing is trained.

    Args:
        apply: ``model.apply`` of a Linen model, or a function that calls it.
        variables: trained variables of the dense model.
        images: calibration inputs, (batch, ...); all layers' activations of twice as many are held at a time.
        ranks: layer path to rank or `Separable`, as in `decompose`.
        *args, **kwargs: other arguments of ``apply``, in evaluation.
        sweeps: alternating refinements of the two factors.
        batch_norm: "mean" to match the means, "full" to re-estimate means and variances, "keep" for neither.

    Returns:
        Variables for `lowrank(apply)`, a plain nested dict.

    Raises:
        ValueError: the table or an option cannot be used, or the activations are not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu]), jnp.ones((4, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> compress(model.apply, variables, images, {"layers_0": 3})["params"]["layers_0"]["vertical"]["kernel"].shape
        (3, 1, 4, 3)
    """
    if batch_norm not in ("mean", "full", "keep"):
        raise ValueError(f"batch_norm={batch_norm!r} is not allowed; give 'mean', 'full' or 'keep'.")
    variables = flax.core.unfreeze(variables)
    images = jnp.asarray(images)
    uses = trace(apply, variables, images[:1], *args, **kwargs)
    layers = layer_leaves(flatten_dict(variables["params"]))
    kernels = {path: layers[find_layer(path, layers)]["kernel"] for path in ranks}
    schemes = {path: find_scheme(path, value, kernels[path], "HWIO", uses) for path, value in ranks.items()}
    scales = output_scales(apply, variables, images[:1], *args, **kwargs)
    walk = _Walk(schemes, scales, sweeps, batch_norm)
    with nn.intercept_methods(walk.step):
        apply(variables, jnp.concatenate([images, images]), *args, **kwargs)
    return walk.result(variables)


class _Walk:
    """Runs the dense network on the first half of a batch and the compressed one on the second."""

    def __init__(self, schemes: Mapping[str, Separable], scales: Mapping, sweeps: int, batch_norm: str) -> None:
        self.schemes, self.scales, self.sweeps, self.batch_norm = schemes, scales, sweeps, batch_norm
        self.factors: dict[str, list[dict[str, Any]]] = {}
        self.statistics: dict[tuple, Any] = {}

    def step(self, call: Callable, args, kwargs, context) -> Any:
        layer = context.module
        path = "/".join(layer.path) if layer.scope is not None else ""
        if context.method_name != "__call__" or kwargs.get("inputs") is not None:
            return call(*args, **kwargs)
        if type(layer) in (nn.Conv, nn.ConvTranspose) and path in self.schemes:
            return self._convolve(call, layer, path, args[0])
        if type(layer) is nn.BatchNorm and self.batch_norm != "keep" and not isinstance(args[0], jax.core.Tracer):
            return call(self._align(layer, args[0]), *args[1:], **kwargs)
        return call(*args, **kwargs)

    def _convolve(self, call: Callable, layer: Any, path: str, x: jax.Array) -> jax.Array:
        scheme, half = self.schemes[path], len(x) // 2
        if isinstance(x, jax.core.Tracer) or type(layer) is not nn.Conv:
            return self._plain(call, layer, path, x)  # inside a lifted transformation nothing can be measured
        dense, patches = spy(layer, x[:half])
        if path not in self.factors:
            _, seen = spy(layer, x[half:])
            found = moments(seen.inputs, patches.outputs, seen.geometry)
            self.factors[path] = self._fit(layer, path, scheme, found)
            if layer.use_bias:
                low = run_factored(layer, scheme.first, self.factors[path], path, x[half:])
                axes = tuple(range(low.ndim - 1))
                bias = self.factors[path][1]["bias"]
                shift = dense.astype(jnp.float32).mean(axes) - low.astype(jnp.float32).mean(axes)
                self.factors[path][1]["bias"] = (bias + shift).astype(bias.dtype)
        return jnp.concatenate([dense, run_factored(layer, scheme.first, self.factors[path], path, x[half:])])

    def _plain(self, call: Callable, layer: Any, path: str, x: jax.Array) -> jax.Array:
        scheme, half = self.schemes[path], len(x) // 2
        params = dict(layer.variables["params"])
        first, second = scheme.factor(params.pop("kernel"))
        low = run_factored(layer, scheme.first, [{"kernel": first}, {"kernel": second, **params}], path, x[half:])
        return jnp.concatenate([call(x)[:half], low])

    def _fit(self, layer: Any, path: str, scheme: Separable, found: Moments) -> list[dict[str, Any]]:
        params = dict(layer.variables["params"])
        kernel = params.pop("kernel")
        first, second = fit_layer(np.asarray(kernel, np.float64), found, scheme, self.scales.get(path), self.sweeps)
        factors = [jnp.asarray(factor, kernel.dtype) for factor in (first, second)]
        return [{"kernel": factors[0]}, {"kernel": factors[1], **params}]

    def _align(self, norm: nn.BatchNorm, x: jax.Array) -> jax.Array:
        """Moves the second half to where the new statistics would take it, and keeps these."""
        half, axes = len(x) // 2, tuple(range(x.ndim - 1))
        mean: jax.Array = norm.get_variable("batch_stats", "mean")
        var: jax.Array = norm.get_variable("batch_stats", "var")
        old, low = (part.astype(jnp.float32) for part in (x[:half], x[half:]))
        if self.batch_norm == "mean":
            new_mean, new_var = mean + (low.mean(axes) - old.mean(axes)), var
        else:
            new_mean, new_var = low.mean(axes), low.var(axes)
        self.statistics[(*norm.path, "mean")], self.statistics[(*norm.path, "var")] = new_mean, new_var
        ratio = jnp.sqrt((var + norm.epsilon) / (new_var + norm.epsilon))
        moved = (low - new_mean) * ratio + mean
        return jnp.concatenate([x[:half], moved.astype(x.dtype)])

    def result(self, variables: dict[str, Any]) -> dict[str, Any]:
        params = decompose(variables["params"], self.schemes)
        flat = flatten_dict(params)
        for path, factors in self.factors.items():
            for name, factor in zip(FACTORS[self.schemes[path].first], factors, strict=True):
                flat |= {(*path.split("/"), name, leaf): value for leaf, value in factor.items()}
        stats = flatten_dict(variables.get("batch_stats", {}))
        stats |= {key: jnp.asarray(value, stats[key].dtype) for key, value in self.statistics.items()}
        new = {**variables, "params": unflatten_dict(flat)}
        return {**new, "batch_stats": unflatten_dict(stats)} if stats else new
