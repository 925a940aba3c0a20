"""`decompose`, `reconstruct` and `trace` for Flax NNX: a model in, a new model out."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from lowrank_jax.decompose import Ranks, check_kernel, choose, find_layer
from lowrank_jax.matricize import AXES
from lowrank_jax.schemes import FACTORS, Separable, merge
from lowrank_jax.separable import split_options
from lowrank_jax.trace import trace as trace_program
from lowrank_jax.uses import Trace

Model = TypeVar("Model")

# Arguments with one entry for each spatial axis.
SPLIT: dict[Any, tuple[str, ...]] = {
    nnx.Conv: ("strides", "padding", "input_dilation", "kernel_dilation"),
    nnx.ConvTranspose: ("strides", "padding", "kernel_dilation"),
}

PLAIN = {
    "mask": (None, "it masks its kernel; multiply the kernel by the mask and set mask to None"),
    "transpose_kernel": (False, "transpose_kernel=True flips its kernel"),
    "conv_general_dilated": (jax.lax.conv_general_dilated, "its own convolution function may do more than convolve"),
}


class SeparableConv(nnx.Module):
    """Two convolutions in place of one; `decompose` makes it.

    Its attributes ``vertical`` and ``horizontal``, or ``horizontal_first`` and ``vertical_second``, are each an
    `nnx.Conv` or `nnx.ConvTranspose`, so that its state is the tree of `lowrank_jax.SeparableConv`.
    """

    def __init__(self, first: str, pair: tuple[Any, Any]) -> None:
        self.first = first
        for name, conv in zip(FACTORS[first], pair, strict=True):
            setattr(self, name, conv)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Maps (*batch, *spatial, channels) as the dense layer does; other arguments go to the second convolution."""
        one, two = (getattr(self, name) for name in FACTORS[self.first])
        return two(one(inputs), *args, **kwargs)


def decompose(model: Model, ranks: Ranks | None = None, trace: Trace | None = None) -> Model:
    """Makes a new model, in which the convolutions that a table names are replaced by `SeparableConv`.

    The model given is not changed; the new one shares its arrays but no variable. A layer or a kernel that is
    used in several places stays one, and is named by any of its paths. Stacked kernels, as `nnx.vmap` makes
    them, are decomposed slice by slice. Works under ``nnx.jit`` and ``nnx.eval_shape``.

    Args:
        model: `nnx.Module`, or a container of modules.
        ranks: layer path such as "blocks/0/conv" to the rank, or to `Separable`. Without it, every layer that
            the trace proves safe and that gets smaller is cut to half its weights.
        trace: `trace` of this model; a layer whose kernel the program uses in another way is refused.

    Raises:
        ValueError: the table is empty, or a path, a layer or a rank in it cannot be used.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Conv(8, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> small = decompose(model, {"layers/0": 3})
        >>> small.layers[0].vertical.kernel.shape, small.layers[0].horizontal.kernel.shape
        ((3, 1, 8, 3), (1, 3, 3, 16))
    """
    model = nnx.clone(model)
    layers, users = _layers(model)
    new: dict[int, nnx.Module] = {}
    table = choose(ranks, trace)
    if ranks is None:
        plain = {users[id(x.kernel)][0][0] for x in layers.values() if not _refusal(users[id(x.kernel)])}
        table = choose({path: scheme for path, scheme in table.items() if path in plain}, trace)
    for path, value in table.items():
        layer = layers[find_layer(path, layers)]
        sharing = users[id(layer.kernel)]
        if id(layer) in new:
            raise ValueError(f"{path}: the table names this kernel twice, also as {sharing[0][0]!r}; name it once.")
        scheme = _scheme(path, value, layer, sharing, trace)
        factors = _factor(layer.kernel, scheme)
        new |= {id(conv): _separate(conv, scheme.first, factors) for _, conv in sharing}
    return _swap(model, new)


def reconstruct(model: Model) -> Model:
    """Multiplies all factors back into dense convolutions; the inverse of `decompose` up to the dropped ranks.

    The model, with or without `SeparableConv`, is not changed; the state of the new one has the dense tree.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Conv(8, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> reconstruct(decompose(model, {"layers/0": 3})).layers[0].kernel.shape
        (3, 3, 8, 16)
    """
    model = nnx.clone(model)
    kernels: dict[tuple[int, int], nnx.Variable] = {}
    new: dict[int, nnx.Module] = {}
    for _, node in nnx.iter_graph(model):
        if type(node) is SeparableConv:
            one, two = (getattr(node, name) for name in FACTORS[node.first])
            kernel = kernels.setdefault((id(one.kernel), id(two.kernel)), _merge(one, two))
            options = {key: _whole(getattr(one, key), getattr(two, key)) for key in ("kernel_size", *SPLIT[type(two)])}
            new[id(node)] = _clone(two, kernel, two.bias, options | {"in_features": one.in_features})
    return _swap(model, new)


def trace(model: Any, *args: Any, **kwargs: Any) -> Trace:
    """`lowrank_jax.trace` of ``model(*args, **kwargs)``; a kernel that modules share has the first of its paths.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.eval_shape(lambda: nnx.Sequential(nnx.Conv(4, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.relu))
        >>> [(use.path, use.multiply_adds) for use in trace(model, jnp.zeros((1, 8, 8, 4)))]
        [('layers/0', 36864)]
    """
    graphdef, state = nnx.split(model)

    def forward(variables, *args, **kwargs):
        return nnx.merge(graphdef, variables["params"])(*args, **kwargs)

    # A path loses a leading "params", which could also be the name of a module.
    return trace_program(forward, {"params": state}, *args, **kwargs)


def _layers(model: Any) -> tuple[dict[tuple, Any], dict[int, list[tuple[str, Any]]]]:
    """The modules that hold a kernel, by every path of theirs; and the holders of each variable, by its id."""
    layers: dict[tuple, Any] = {}
    users: dict[int, list[tuple[str, Any]]] = {}
    for path, node in nnx.iter_graph(model):
        held = vars(node) if isinstance(node, nnx.Pytree) else {}
        for leaf in jax.tree.leaves(list(held.values()), is_leaf=nnx.is_data):
            users.setdefault(id(leaf), []).append(("/".join(map(str, path)), node))
        if isinstance(held.get("kernel"), nnx.Variable):
            layers[path] = node
    for first, *others in nnx.find_duplicates(model):
        below = {path[len(first) :]: layer for path, layer in layers.items() if path[: len(first)] == first}
        layers |= {(*other, *path): layer for other in others for path, layer in below.items()}
    return layers, users


def _refusal(sharing: list[tuple[str, Any]]) -> str:
    """Why the layers that share a kernel cannot run as two convolutions; "" if they can."""
    for path, layer in sharing:
        if reason := _reason(layer, _groups(sharing[0][1])):
            return reason if len(sharing) == 1 else f"{path!r} holds its kernel, too, and {reason}"
    return ""


def _reason(layer: Any, groups: int) -> str:
    if type(layer) not in SPLIT:
        return f"it is a {type(layer).__name__}, no plain nnx.Conv, and may do something else with its kernel"
    for name, (plain, why) in PLAIN.items():
        if getattr(layer, name, plain) is not plain:
            return why
    kernel, kind = layer.kernel, layer.kernel.var_type
    reads = [getattr(kind, name) is getattr(nnx.Variable, name) for name in ("get_value", "__getitem__")]
    if not all(reads) or "on_get_value" in kernel.get_metadata():
        return f"its kernel is a {kind.__name__} whose value is changed when it is read"
    shape = _kernel_shape(layer)
    stored = getattr(kernel.get_value(), "shape", shape)
    if stored[-len(shape) :] != shape or len(shape) - 2 not in AXES:
        return f"its kernel {stored} is no {shape} of one to three spatial axes, nor a stack of such along axis 0"
    return "" if _groups(layer) == groups else f"it has {_groups(layer)} groups, not {groups}"


def _groups(layer: Any) -> int:
    return getattr(layer, "feature_group_count", 1)


def _kernel_shape(layer: Any) -> tuple[int, ...]:
    return (*layer.kernel_size, layer.in_features // _groups(layer), layer.out_features)


def _scheme(path: str, value: Any, layer: Any, sharing: list[tuple[str, Any]], trace: Trace | None) -> Separable:
    """The scheme of an entry of the table, checked against the layers that share the kernel, and the trace."""
    kernel = layer.kernel.get_value()
    if reason := _refusal(sharing):
        raise ValueError(f"{path}: cannot be decomposed: {reason}. Leave it out of the table of ranks.")
    check_kernel(path, nnx.to_pure_dict(nnx.state(layer)) | {"kernel": kernel})
    if trace is not None:
        trace.safe_use(sharing[0][0])
    groups, axes = _groups(layer), AXES[len(layer.kernel_size)]
    scheme = value if isinstance(value, Separable) else Separable(value, groups, axes)
    if (scheme.groups, scheme.axes) != (groups, axes):
        raise ValueError(f"{path}: {scheme} does not fit the layer, where groups={groups} and axes={axes!r}.")
    scheme.check(kernel.shape, path)
    return scheme


def _factor(kernel: nnx.Variable, scheme: Separable) -> list[nnx.Variable]:
    """The factors as variables of the kernel's own kind, of which the axis between is on no axis of a mesh."""
    factors = scheme.factor(kernel.get_value())
    if mesh := kernel.get_metadata().get("out_sharding"):
        mesh = (*mesh, *[None] * (factors[0].ndim - len(mesh)))
        meshes = ((*mesh[:-1], None), (*mesh[:-2], None, mesh[-1]))
        return [kernel.copy(factor, out_sharding=axes) for factor, axes in zip(factors, meshes, strict=True)]
    return [kernel.copy(factor) for factor in factors]


def _separate(layer: Any, first: str, factors: list[nnx.Variable]) -> SeparableConv:
    one, two = split_options(layer.kernel_size, first, {name: getattr(layer, name) for name in SPLIT[type(layer)]})
    # Only the second convolution sums to the preferred type: the first hands on what the layer would be given.
    one |= {"out_features": factors[0].get_value().shape[-1], "use_bias": False, "preferred_element_type": None}
    two["in_features"] = one["out_features"]
    return SeparableConv(first, (_clone(layer, factors[0], None, one), _clone(layer, factors[1], layer.bias, two)))


def _merge(one: Any, two: Any) -> nnx.Variable:
    kernel = merge(one.kernel.get_value(), two.kernel.get_value(), AXES[len(two.kernel_size)])
    if mesh := one.kernel.get_metadata().get("out_sharding"):
        return one.kernel.copy(kernel, out_sharding=(*mesh[:-1], two.kernel.get_metadata()["out_sharding"][-1]))
    return one.kernel.copy(kernel)


def _whole(one: Any, two: Any) -> Any:
    """An option of the dense convolution from those of its factors, each of which has it for its own axes."""
    if isinstance(one, str) or callable(one):
        return one
    return tuple((a[0] + b[0], a[1] + b[1]) if isinstance(a, tuple) else a * b for a, b in zip(one, two, strict=True))


def _clone(layer: Any, kernel: nnx.Variable, bias: nnx.Variable | None, options: Mapping[str, Any]) -> Any:
    """The same layer with another kernel, the very bias variable given and other options."""
    conv = nnx.clone(layer)
    conv.kernel, conv.bias = kernel, nnx.data(bias)
    for name, value in options.items():
        setattr(conv, name, value)
    conv.kernel_shape = _kernel_shape(conv)
    return conv


def _swap(model: Any, new: Mapping[int, nnx.Module]) -> Any:
    """Puts other modules in the places of some, which are given by id; changes the model."""

    def swap(value: Any) -> Any:
        return jax.tree.map(lambda leaf: new.get(id(leaf), leaf), value, is_leaf=nnx.is_data)

    for _, node in list(nnx.iter_graph(model)):
        for name, value in list(vars(node).items()) if isinstance(node, nnx.Pytree) else ():
            if any(id(leaf) in new for leaf in jax.tree.leaves(value, is_leaf=nnx.is_data)):
                setattr(node, name, swap(value))
    return swap(model)
