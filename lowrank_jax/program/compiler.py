"""Compiler options that make convolutions fast on the device at hand."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

# XLA's CPU compiler has two sets of kernels. These leave out the newer one, `ynn_fusion`, for all
# but products, whose half precision it runs twice as fast, and altogether.
_YNN = "xla_cpu_experimental_ynn_fusion_type"
_YNN_PRODUCTS, _WITHOUT_YNN = {_YNN: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}, {_YNN: ""}
# Of the newer one alone the loops over elements and their sums, which gradients are full of.
_YNN_LOOPS = {_YNN: "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_ELTWISE"}
# A third set is built in, oneDNN's, and used only if asked for and if the newer one does not take
# the layers first.
_CALL = "xla_cpu_experimental_onednn_custom_call"
_ONEDNN = {_CALL: True, _YNN: ""}


@functools.cache
def candidate_options(backend: str | None = None) -> tuple[dict[str, Any], ...]:
    """The sets of compiler options worth trying for a convolutional program on a backend.

    XLA has two sets of kernels on the CPU, and which set is faster differs by program, type and JAX
    generation. So a fair measurement tries both sets, and one set for convolutions with the other
    for products. It also tries the kernels of oneDNN, which PyTorch uses, where this XLA calls them
    (seen with jax 0.12 on x86, not with 0.10.2). The first entry, {}, is XLA's default. There is no
    other entry on GPU and TPU, and where this XLA does not know the options.

    Args:
        backend: "cpu", "gpu" or "tpu"; JAX's default backend if None.
    """
    if (backend or jax.default_backend()) != "cpu":
        return ({},)
    onednn = [_ONEDNN] if _known(_ONEDNN) and _heeded() else []
    return ({}, *filter(_known, (_YNN_PRODUCTS, _WITHOUT_YNN)), *onednn)


def _known(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:  # "No such compile option", or no such value of it
        return False
    return True


def calls_onednn(options: Mapping[str, Any]) -> bool:
    """Whether convolutions run by oneDNN's kernels with these options, bias and activation
    included."""
    return bool(options.get(_CALL))


def _heeded() -> bool:
    """Whether the option for oneDNN is heeded: where oneDNN is left out of the build, XLA knows it
    and does nothing."""
    x, kernel = (
        jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 8, 8, 16), (3, 3, 16, 16))
    )
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    program = jax.jit(convolve, compiler_options=_ONEDNN).lower(x, kernel).compile()
    return "__onednn" in (program.as_text() or "")


@functools.cache
def default_options() -> dict[str, Any]:
    """The compiler options for what is not measured first: on the CPU, XLA's older kernels.

    The older convolutions have the faster gradients, see `gradient_options`. With jax 0.12.0.1 the
    newer kernels return memory that was never written where a max pooling follows two convolutions
    in bfloat16, each with a ReLU.
    """
    return _WITHOUT_YNN if jax.default_backend() == "cpu" and _known(_WITHOUT_YNN) else {}


@functools.cache
def gradient_options(dtype: Any = "float32") -> dict[str, Any]:
    """The compiler options for gradients through a network that computes in a type.

    In float32 on the CPU these are XLA's newer kernels for loops over elements and their sums, and
    the older ones for convolutions and products. In half precision, where the newer ones may be
    wrong, they are the `default_options`.
    """
    wide = jax.numpy.dtype(dtype).itemsize > 2
    cpu = jax.default_backend() == "cpu"
    return _YNN_LOOPS if wide and cpu and _known(_YNN_LOOPS) else default_options()
