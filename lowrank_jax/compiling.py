"""Compiler options that make convolutions fast on the device at hand."""

import functools

import jax

# XLA's CPU compiler has two sets of kernels. These leave out the newer one, `ynn_fusion`, for all but products, whose
# half precision it runs twice as fast, and altogether.
_YNN = "xla_cpu_experimental_ynn_fusion_type"
_YNN_PRODUCTS, _WITHOUT_YNN = {_YNN: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}, {_YNN: ""}


@functools.cache
def candidate_options(backend: str | None = None) -> tuple[dict[str, str], ...]:
    """The sets of compiler options worth trying for a convolutional program on a backend.

    Which of XLA's two sets of kernels on the CPU is faster differs by program, type and JAX generation, so that
    a fair measurement tries both, and the one for convolutions with the other for products. The first entry, {},
    is XLA's default and the only one on GPU and TPU and where this XLA does not know the option.

    Args:
        backend: "cpu", "gpu" or "tpu"; JAX's default backend if None.
    """
    if (backend or jax.default_backend()) != "cpu":
        return ({},)
    return ({}, *filter(_known, (_YNN_PRODUCTS, _WITHOUT_YNN)))


def _known(options: dict[str, str]) -> bool:
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:  # "No such compile option", or no such value of it
        return False
    return True


def training_options() -> dict[str, str]:
    """The compiler options for a training step: on the CPU, the convolution path with fast gradients."""
    return candidate_options()[-1]
