"""The layers of an NNX model: found, judged, cloned, and replaced by others."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lowrank_jax.factorization.layout import AXES

# Arguments with one entry for each spatial axis.
SPLIT: dict[Any, tuple[str, ...]] = {
    nnx.Conv: ("strides", "padding", "input_dilation", "kernel_dilation"),
    nnx.ConvTranspose: ("strides", "padding", "kernel_dilation"),
}

PLAIN = {
    "mask": (None, "it masks its kernel; multiply the kernel by the mask and set mask to None"),
    "transpose_kernel": (False, "transpose_kernel=True flips its kernel"),
    "conv_general_dilated": (
        jax.lax.conv_general_dilated,
        "its own convolution function may do more than convolve",
    ),
}

Layers = dict[tuple, Any]
Users = dict[int, list[tuple[str, Any]]]


def find_layers(model: Any) -> tuple[Layers, Users]:
    """The modules that hold a kernel, by every path of theirs; and the holders of each variable, by
    its id."""
    layers: Layers = {}
    users: Users = {}
    for path, node in nnx.iter_graph(model):
        held = vars(node) if isinstance(node, nnx.Pytree) else {}
        for leaf in jax.tree.leaves(list(held.values()), is_leaf=nnx.is_data):
            users.setdefault(id(leaf), []).append((path_name(path), node))
        if isinstance(held.get("kernel"), nnx.Variable):
            layers[path] = node
    for first, *others in nnx.find_duplicates(model):
        below = {
            path[len(first) :]: layer
            for path, layer in layers.items()
            if path[: len(first)] == first
        }
        layers |= {(*other, *path): layer for other in others for path, layer in below.items()}
    return layers, users


def path_name(path: tuple) -> str:
    return "/".join(map(str, path))


def by_path(model: Any) -> dict[str, Any]:
    """Everything in a model, by the first path of each."""
    return {path_name(path): node for path, node in nnx.iter_graph(model)}


def refusal(sharing: list[tuple[str, Any]]) -> str:
    """Why the layers that share a kernel cannot run as two convolutions; "" if they can."""
    for path, layer in sharing:
        if reason := _reason(layer, groups_of(sharing[0][1])):
            return reason if len(sharing) == 1 else f"{path!r} holds its kernel, too, and {reason}"
    return ""


def _reason(layer: Any, groups: int) -> str:
    if type(layer) not in SPLIT:
        return f"it is a {type(layer).__name__}, no plain nnx.Conv, and may do something else with its kernel"
    for name, (plain, why) in PLAIN.items():
        if getattr(layer, name, plain) is not plain:
            return why
    kernel, kind = layer.kernel, layer.kernel.var_type
    reads = [
        getattr(kind, name) is getattr(nnx.Variable, name) for name in ("get_value", "__getitem__")
    ]
    if not all(reads) or "on_get_value" in kernel.get_metadata():
        return f"its kernel is a {kind.__name__} whose value is changed when it is read"
    shape = _kernel_shape(layer)
    stored = getattr(kernel.get_value(), "shape", shape)
    if stored[-len(shape) :] != shape or len(shape) - 2 not in AXES:
        return f"its kernel {stored} is no {shape} of one to three spatial axes, nor a stack of such along axis 0"
    return "" if groups_of(layer) == groups else f"it has {groups_of(layer)} groups, not {groups}"


def groups_of(layer: Any) -> int:
    return getattr(layer, "feature_group_count", 1)


def _kernel_shape(layer: Any) -> tuple[int, ...]:
    return (*layer.kernel_size, layer.in_features // groups_of(layer), layer.out_features)


def clone_layer(
    layer: Any, kernel: nnx.Variable, bias: nnx.Variable | None, options: Mapping[str, Any]
) -> Any:
    """The same layer with another kernel, the very bias variable given and other options."""
    conv = nnx.clone(layer)
    conv.kernel, conv.bias = kernel, nnx.data(bias)
    for name, value in options.items():
        setattr(conv, name, value)
    conv.kernel_shape = _kernel_shape(conv)
    return conv


def swap(model: Any, new: Mapping[int, nnx.Module]) -> Any:
    """Puts other modules in the places of some, which are given by id; changes the model."""

    def put(value: Any) -> Any:
        return jax.tree.map(lambda leaf: new.get(id(leaf), leaf), value, is_leaf=nnx.is_data)

    for _, node in list(nnx.iter_graph(model)):
        for name, value in list(vars(node).items()) if isinstance(node, nnx.Pytree) else ():
            if any(id(leaf) in new for leaf in jax.tree.leaves(value, is_leaf=nnx.is_data)):
                setattr(node, name, put(value))
    return put(model)
