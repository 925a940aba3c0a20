"""`compress`: factors fitted, layer by layer, to what the compressed network really sees."""

from collections.abc import Callable, Mapping
from typing import Any

from lowrank_jax.calibration.amount import tell_amount
from lowrank_jax.calibration.collecting import Calibration, prepared
from lowrank_jax.calibration.curvature import importance_of, output_curvature
from lowrank_jax.calibration.inputs import Inputs, images
from lowrank_jax.compression.reconstruction import Job, Reconstruction
from lowrank_jax.program.jaxprs import check_options
from lowrank_jax.tree.decomposing import find_schemes
from lowrank_jax.tree.kinds import whole


def compress(
    source: Calibration | Callable,
    *given: Any,
    sweeps: int = 1,
    match_means: bool = True,
    steps: int = 0,
    fit_dense: bool = True,
    return_fits: bool = False,
    **kwargs: Any,
) -> Any:
    """Decomposes the layers of a table so that the network's outputs change least.

    The dense network and the one being compressed run side by side. At each decomposed layer the
    factors are fitted, in closed form, to give the dense network's outputs from the inputs that the
    compressed network has there, so that later layers make up for the errors of earlier ones.
    Errors count by what they cost the network's outputs, to second order. The fit of a layer is
    held against images that it was not fitted to. The first parameter that is added to a layer's
    output channel by channel, or subtracted, such as a bias or the mean of a batch normalisation,
    is set so that the means are those of the dense network. A layer behind which no parameter takes
    up the means is fitted to the means, too. Where an activation such as a ReLU
    follows, a layer is fitted again to the errors that are left behind the activation (Zhang et
    al., 2015, arXiv 1505.06798), and the means behind the activation are matched. Without ``steps``
    nothing is trained. Layers within ``while`` and ``cond`` have the factors of `decompose`.

    With ``steps`` the layers of three blocks, once fitted, are trained without labels: Adam changes
    their factors, and the parameters that match their means, so that the outputs of the last block
    come closer to those of the dense network (after BRECQ, Li et al., 2021, arXiv 2102.05426, which
    trains one block at a time). A block ends where one value alone leads on, as after a residual
    block or a plain layer. One batch of eight is held out; blocks whose outputs are not closer
    there keep the closed form.

    ``compress(calibration, table)`` takes what `calibrate` gave. ``compress(apply, variables,
    inputs, table, *args, **kwargs)`` takes what `calibrate` takes, and a table.

    Args:
        source: a `Calibration`, or the function of (variables, *inputs, *args, **kwargs).
        *given: the table, or variables, inputs, table and other arguments of the model. The table
            is a `Plan`, or layer path to rank or scheme, as in `decompose`.
        sweeps: alternating refinements of the two factors.
        match_means: whether parameters behind the layers match the means.
        steps: gradient steps for each block, on up to 64 images each; 200 are enough for most.
            Three blocks take all of their steps together.
        fit_dense: whether layers that stay dense are fitted, too, to make up for the errors of the
            layers before them.
        return_fits: whether to return the fits beside the tree.
        **kwargs: arguments of the model, in evaluation.

    Returns:
        The tree for `lowrank`; with ``return_fits`` also layer path to the `Fit` of each kernel of
        its stack, which holds the errors on images that the kernel was not fitted to, and the
        errors of its block before and after the steps.

    Raises:
        ValueError: the table or an option cannot be used, the inputs are empty or of a shape that
            the model does not take, or the activations are not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu]), jnp.ones((4, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> small = compress(model.apply, variables, images, {"layers_0": 3})
        >>> small["params"]["layers_0"]["kernel"]["vertical"].shape
        (3, 1, 4, 3)
    """
    sweeps, steps = whole("sweeps", sweeps, 0), whole("steps", steps, 0)
    known = isinstance(source, Calibration)
    check_options(compress, None if known else source, kwargs)
    job = _of_calibration(source, given, kwargs) if known else _of_call(source, given, kwargs)  # type: ignore[arg-type]
    run = Reconstruction(job, sweeps, match_means, steps, fit_dense)
    tree = run.fit()
    fits = {path: run.layers.fits[path] for path in job.schemes if path in run.layers.fits}
    return (tree, fits) if return_fits else tree


def _of_call(apply: Callable, given: tuple, kwargs: Mapping[str, Any]) -> Job:
    if len(given) < 3:
        raise ValueError(
            "compress needs (calibration, table) or (apply, variables, inputs, table); got "
            f"{1 + len(given)} arguments."
        )
    variables, inputs, table, *args = given
    network, batches, trace = prepared(apply, variables, inputs, tuple(args), kwargs)
    batches = Inputs(list(batches))  # all of them are needed at every layer
    count = sum(map(images, batches))
    tell_amount(trace, count)
    schemes = find_schemes(variables, table, trace=trace)
    curvature = output_curvature(network, batches, trace, list(schemes))
    return Job(network, batches, schemes, importance_of(curvature, count))


def _of_calibration(found: Calibration, given: tuple, kwargs: Mapping[str, Any]) -> Job:
    if len(given) != 1 or kwargs:
        raise ValueError(
            "compress of a calibration needs its table alone, compress(calibration, table); the "
            "arguments of the model were given to calibrate."
        )
    schemes = find_schemes(found.network.variables, given[0], trace=found.trace)
    return Job(found.network, found.inputs, schemes, found.importance)
