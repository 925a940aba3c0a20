"""`decompose`, `reconstruct` and `trace` for Flax NNX models."""

from typing import Any, TypeVar

from flax import nnx

from lowrank_jax.factorization.layout import AXES
from lowrank_jax.factorization.separable import Separable, factor_all
from lowrank_jax.nnx.layers import Layers, Users, find_layers, groups_of, refusal, swap
from lowrank_jax.nnx.separable import SeparableConv, as_variables, merged, pair, separate, whole
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.program.tracing import trace as trace_program
from lowrank_jax.tree.decomposing import Ranks, check_kernel, choose, find_layer

Model = TypeVar("Model")


def decompose(model: Model, ranks: Ranks | None = None, trace: Trace | None = None) -> Model:
    """Makes a new model, in which the convolutions that a table names are replaced by
    `SeparableConv`.

    The model given is not changed; the new one shares its arrays but no variable. A layer or a
    kernel that is used in several places stays one, and is named by any of its paths. Stacked
    kernels, as `nnx.vmap` makes them, are decomposed slice by slice. Works under ``nnx.jit`` and
    ``nnx.eval_shape``.

    Args:
        model: `nnx.Module`, or a container of modules.
        ranks: layer path such as "blocks/0/conv" to the rank, or to `Separable`. Without it, every
            layer that the trace proves safe and that gets smaller is cut to half its parameters.
        trace: `trace` of this model; a layer whose kernel the program uses in another way is
            refused.

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
    layers, users = find_layers(model)
    new: dict[int, nnx.Module] = {}
    schemes = find_schemes(layers, users, ranks, trace)
    kernels = [layers[find_layer(path, layers)].kernel for path in schemes]
    pairs = factor_all(list(schemes.values()), [kernel.get_value() for kernel in kernels])
    for kernel, scheme, pair_ in zip(kernels, schemes.values(), pairs, strict=True):
        factors = as_variables(kernel, pair_)
        new |= {
            id(conv): separate(conv, scheme.first, factors, conv.bias)
            for _, conv in users[id(kernel)]
        }
    return swap(model, new)


def find_schemes(
    layers: Layers, users: Users, ranks: Ranks | None, trace: Trace | None
) -> dict[str, Separable]:
    """The first path of each kernel that a table names to its scheme, checked."""
    table = choose(ranks, trace)
    if ranks is None:
        plain = {
            users[id(x.kernel)][0][0] for x in layers.values() if not refusal(users[id(x.kernel)])
        }
        table = choose({path: scheme for path, scheme in table.items() if path in plain}, trace)
    found: dict[str, Separable] = {}
    for path, value in table.items():
        layer = layers[find_layer(path, layers)]
        sharing = users[id(layer.kernel)]
        if sharing[0][0] in found:
            raise ValueError(
                f"{path}: the table names this kernel twice, also as {sharing[0][0]!r}; name it once."
            )
        found[sharing[0][0]] = _scheme(path, value, layer, sharing, trace)
    return found


def _scheme(
    path: str, value: Any, layer: Any, sharing: list[tuple[str, Any]], trace: Trace | None
) -> Separable:
    """The scheme of an entry of the table, checked against the layers that share the kernel, and
    the trace."""
    kernel = layer.kernel.get_value()
    if reason := refusal(sharing):
        raise ValueError(
            f"{path}: cannot be decomposed: {reason}. Leave it out of the table of ranks."
        )
    check_kernel(path, nnx.to_pure_dict(nnx.state(layer)) | {"kernel": kernel})
    if trace is not None:
        trace.safe_use(sharing[0][0])
    groups, axes = groups_of(layer), AXES[len(layer.kernel_size)]
    scheme = value if isinstance(value, Separable) else Separable(value, groups, axes)
    if (scheme.groups, scheme.axes) != (groups, axes):
        raise ValueError(
            f"{path}: {scheme} does not fit the layer, where groups={groups} and axes={axes!r}."
        )
    scheme.check(kernel.shape, path)
    return scheme


def reconstruct(model: Model) -> Model:
    """Multiplies all factors back into dense convolutions; the inverse of `decompose` up to the
    dropped ranks.

    The model, with or without `SeparableConv`, is not changed; the state of the new one has the
    dense tree.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Conv(8, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> reconstruct(decompose(model, {"layers/0": 3})).layers[0].kernel.shape
        (3, 3, 8, 16)
    """
    model = nnx.clone(model)
    kernels: dict[tuple[int, ...], nnx.Variable] = {}
    new: dict[int, nnx.Module] = {}
    for _, node in nnx.iter_graph(model):
        if type(node) is SeparableConv:
            key = tuple(id(conv.kernel) for conv in pair(node))
            new[id(node)] = whole(node, kernels.setdefault(key, merged(node)))
    return swap(model, new)


def trace(model: Any, *args: Any, **kwargs: Any) -> Trace:
    """`lowrank_jax.trace` of ``model(*args, **kwargs)``; a kernel that modules share has the first
    of its paths.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.eval_shape(lambda: nnx.Sequential(nnx.Conv(4, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.relu))
        >>> [(use.path, use.macs) for use in trace(model, jnp.zeros((1, 8, 8, 4)))]
        [('layers/0', 36864)]
    """
    graphdef, state = nnx.split(model)

    def forward(variables, *args, **kwargs):
        return nnx.merge(graphdef, variables["params"])(*args, **kwargs)

    # A path loses a leading "params", which could also be the name of a module.
    return trace_program(forward, {"params": state}, *args, **kwargs)
