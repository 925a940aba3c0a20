"""Runs an NNX model whose convolutions and batch normalisations an observer runs.

NNX has no interception of calls, so that a clone of the model has a small module in the place of
each of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from lowrank_jax.calibration.observe import Layer, Norm, Observer, split_input
from lowrank_jax.nnx.layers import SPLIT, clone_layer, find_layers, path_name, swap
from lowrank_jax.nnx.separable import separate


def evaluated(model: Any) -> Any:
    """A clone of a model in evaluation mode, or an error if it is no model that can be called."""
    if not isinstance(model, nnx.Module) or not callable(model):
        raise ValueError(
            f"A {type(model).__name__} is not allowed; give an nnx.Module that takes images when called."
        )
    clone = nnx.clone(model)
    clone.eval()
    return clone


def watched(model: Any, observer: Observer, training: bool = False) -> Any:
    """A clone of a model in which an observer runs what it observes.

    Args:
        model: an `nnx.Module`; it is not changed.
        observer: of its plain `nnx.Conv`, `nnx.ConvTranspose` and `nnx.BatchNorm`.
        training: whether batch normalisations take the statistics of the batch; the rest is always
            in evaluation.
    """
    model = evaluated(model)
    _, users = find_layers(model)
    new: dict[int, nnx.Module] = {}
    for path, node in nnx.iter_graph(model):
        if type(node) in SPLIT:
            own_bias = node.bias is not None and len(users[id(node.bias)]) == 1
            new[id(node)] = WatchedConv(
                node, path_name(path), users[id(node.kernel)][0][0], own_bias, observer
            )
        if type(node) is nnx.BatchNorm:
            new[id(node)] = WatchedNorm(node, path_name(path), training, observer)
    return swap(model, new)


class Watched(nnx.Module):
    """Stands in for a layer, and shows its attributes."""

    layer: Any

    def __getattr__(self, name: str) -> Any:
        if name == "layer" or name.startswith("_"):  # not there yet, while NNX builds this module
            raise AttributeError(name)
        return getattr(self.layer, name)


class WatchedConv(Watched):
    def __init__(
        self, layer: Any, path: str, kernel_path: str, own_bias: bool, observer: Observer
    ) -> None:
        self.layer, self.observer = layer, observer
        self.place = (path, kernel_path, own_bias)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        x, rest, options = split_input(args, kwargs)
        return self.observer.convolve(
            NnxLayer(self.layer, *self.place), x, lambda x: self.layer(x, *rest, **options)
        )


class WatchedNorm(Watched):
    def __init__(self, layer: nnx.BatchNorm, path: str, training: bool, observer: Observer) -> None:
        self.layer, self.place, self.training, self.observer = layer, path, training, observer

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        x, _, options = split_input(args, kwargs)  # by position there is only use_running_average
        options |= {"use_running_average": not self.training}
        scale = None if self.layer.scale is None else self.layer.scale.get_value()
        mean, var = self.layer.mean.get_value(), self.layer.var.get_value()
        norm = Norm(self.place, mean, var, scale, self.layer.epsilon, self.layer.axis)
        return self.observer.normalise(norm, x, lambda x: self.layer(x, **options))


class NnxLayer(Layer):
    """An `nnx.Conv` or `nnx.ConvTranspose` that was called; a bias that layers share is not to be
    moved."""

    def __init__(self, module: Any, path: str, kernel_path: str, own_bias: bool) -> None:
        self.module, self.path, self.kernel_path = module, path, kernel_path
        self.kernel = module.kernel.get_value()
        self.bias = module.bias.get_value() if own_bias else None
        own = (
            type(module) is nnx.Conv and module.conv_general_dilated is jax.lax.conv_general_dilated
        )
        dilation = getattr(module, "input_dilation", 1)
        self.measurable = (
            own and module.mask is None and bool(np.max(1 if dilation is None else dilation) == 1)
        )

    def run(self, x: jax.Array, convolve: Callable) -> jax.Array:
        module = self.module
        return clone_layer(module, module.kernel, module.bias, {"conv_general_dilated": convolve})(
            x
        )

    def factored(
        self, first: str, kernels: tuple, bias: jax.Array | None, x: jax.Array
    ) -> jax.Array:
        module = self.module
        variable = module.bias if bias is None else module.bias.copy(bias)
        return separate(
            module, first, [module.kernel.copy(kernel) for kernel in kernels], variable
        )(x)
