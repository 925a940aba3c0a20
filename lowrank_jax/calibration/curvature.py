"""What an error of a layer's outputs costs the network's outputs, to second order.

With y the outputs of a layer at one position and f those of the network, an error d of y changes f
by J d. The mean of |J d|^2 over inputs is d^T F d, with F the sum over positions of J^T J, where
errors at two positions do not agree. A backward pass from r, random signs on the outputs, gives
g = J^T r, and the mean of g g^T over r is J^T J (Hutchinson, 1990). No label is needed.
"""

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lowrank_jax.calibration.inputs import images, shape_key
from lowrank_jax.calibration.network import Network
from lowrank_jax.calibration.noise import signal_share
from lowrank_jax.calibration.sums import AnyGeometry, geometry_of
from lowrank_jax.factorization.importance import Importance, block_size
from lowrank_jax.io.progress import Progress
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.derivatives import NO_DERIVATIVE, what_is_lacking
from lowrank_jax.program.interpreter import Found, Rule, bind, interpret
from lowrank_jax.program.kernel import dense, sources_of
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.program.reading import READERS, Reading
from lowrank_jax.tree.warning import warn

LEAST, MOST = 64, 1024  # inputs
WORK = 64e9  # multiply-accumulates of a forward pass of all inputs, where they are more than LEAST
AT_ONCE = 32  # a backward pass holds all activations
ALIKE = "All layers count alike in a plan, because the network has no derivative"
LOST = (
    "The derivatives of %d of %d inputs are infinite or NaN, as that of a norm or a root at 0; "
    "these inputs do not tell which errors cost the outputs most."
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(geometry: AnyGeometry, y: jax.Array, total: jax.Array) -> jax.Array:
    """The outputs themselves; the products of their derivatives are those of the total."""
    del geometry, total
    return y


def _backward(geometry: AnyGeometry, _: None, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = geometry.outputs_of(g).astype(jnp.float32)  # (rows, S, groups, m)
    block = block_size(rows.shape[3])
    blocks = rows.reshape(-1, rows.shape[2] * rows.shape[3] // block, block)
    products = jnp.einsum("rki,rkj->kij", blocks, blocks, precision=jax.lax.Precision.HIGHEST)
    return g, products


_tap.defvjp(lambda geometry, y, total: (y, None), _backward)


class Tap(Rule):
    """Taps the outputs of the layers at some paths.

    Attributes:
        totals: path to zeros, the blocks of F, whose derivatives are the sums.
    """

    opens = True

    def __init__(self, totals: Mapping[str, jax.Array]) -> None:
        self.totals = totals

    def apply(self, eqn: Any, values: list) -> Found | None:
        if eqn.primitive.name not in READERS:
            return None
        reading = Reading.of(eqn, sources_of(values))
        source = reading.source
        if reading.reason or source is None or source.path not in self.totals:
            return None
        (outputs,) = bind(eqn, [dense(value) for value in values])
        total = self.totals[source.path]
        # In a shard_map each device has its own derivatives, and thus needs its own total.
        total += jnp.zeros_like(outputs, total.dtype).sum()
        return [_tap(geometry_of(reading), outputs, total)], {}


def importance_of(curvature: Mapping[str, np.ndarray], inputs: int) -> dict[str, Importance]:
    """Layer path to how much errors of the outputs count, by F from some inputs."""
    return {path: Importance.of(own, inputs) for path, own in curvature.items()}


def output_curvature(
    network: Network, batches: Iterable[tuple], trace: Trace, paths: Collection[str]
) -> dict[str, np.ndarray]:
    """F of the outputs of some layers, by a backward pass over a few inputs.

    Args:
        network: where it has no derivative, as with ``while``, a warning says that all layers and
            outputs count alike. Parts of the inputs whose derivatives are not finite are left out,
            and a warning says how many they are.
        batches: of inputs; the first of them are used, `LEAST` or more where these cost little.
        trace: of the network and one input, which tells how many outputs a layer has.
        paths: of the layers.

    Returns:
        Path to the blocks of F along its diagonal, (k, b, b) for k * b outputs, float64: per input,
        and less what is noise beside the diagonal. A layer that no batch reaches has zeros.
    """
    shapes = {path: _blocks_of(trace.at(path)[0]) for path in paths}
    totals = {path: np.zeros((2, *shape)) for path, shape in shapes.items()}
    programs: dict[str, Any] = {}
    counts, asked = np.zeros(2), 0
    wanted = int(np.clip(WORK / max(trace.macs, 1), LEAST, MOST))
    with Progress("derivatives", -(-wanted // AT_ONCE)) as progress:
        for turn, batch in enumerate(progress.over(_few(batches, wanted))):
            shape = shape_key(batch)
            if shape not in programs:
                programs[shape] = _program(network, batch, shapes)
            try:
                sums = programs[shape](turn, network.leaves(batch))
            except NO_DERIVATIVE as error:
                warn(f"{ALIKE}: {what_is_lacking(error)}")
                return {}
            count = images(batch)
            asked += count
            if not all(np.isfinite(own).all() for own in sums.values()):
                continue
            for path, own in sums.items():
                totals[path][turn % 2] += np.asarray(own, np.float64)
            counts[turn % 2] += count
    if counts.sum() < asked:
        warn(LOST % (asked - counts.sum(), asked))
    if not counts.any():
        return {}
    return {path: _less_noise(total, counts) for path, total in totals.items()}


def _less_noise(
    totals: Float[np.ndarray, "2 k b b"], counts: Float[np.ndarray, "2"]
) -> Float[np.ndarray, "k b b"]:
    """The mean of two sums, less the share beside the diagonal that is noise.

    Few signs leave much in wide layers: those of n inputs a share of the root of b / n where F is
    the identity, as in the last layer.
    """
    mean = totals.sum(0) / max(counts.sum(), 1)
    if not counts.all():  # nothing to hold against
        return mean
    beside = 1 - np.eye(mean.shape[-1])
    one, two = beside * totals / counts[:, None, None, None]
    return mean - (1 - signal_share(one, two, counts)) * beside * mean


def _few(batches: Iterable[tuple], left: int) -> Iterator[tuple]:
    """The first inputs, a few at a time, and in two parts at least where there are two."""
    for batch in batches:
        count = min(images(batch), left)
        step = min(AT_ONCE, -(-count // 2))
        for start in range(0, count, step):
            end = min(start + step, count)
            yield jax.tree.map(lambda x, a=start, b=end: x[a:b], batch)
        left -= count
        if not left:
            return


def _blocks_of(use: KernelUse) -> tuple[int, int, int]:
    block = block_size(use.width // use.groups)
    return use.width // block, block, block


def _program(network: Network, batch: tuple, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    traced = network.program(batch)

    def outputs(totals: Mapping[str, jax.Array], inputs: list) -> list:
        results, _ = interpret(traced.program.closed, traced.values(inputs), Tap(totals))
        found = [dense(value) for value in results]
        return [x for x in found if jnp.issubdtype(x.dtype, jnp.floating)]

    def sums(turn: jax.Array, inputs: list) -> Any:
        zeros = {path: jnp.zeros(shape) for path, shape in shapes.items()}
        results, pullback = jax.vjp(lambda totals: outputs(totals, inputs), zeros)
        return pullback(_signs(turn, results))[0]

    return jax.jit(sums, compiler_options=default_options())


def _signs(turn: jax.Array, results: Collection[jax.Array]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), turn), len(results))
    pairs = zip(keys, results, strict=True)
    return [jax.random.rademacher(key, x.shape).astype(x.dtype) for key, x in pairs]
