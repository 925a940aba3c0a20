"""Compiler options that make convolutions fast on the device at hand."""

import functools

import jax

# XLA's CPU compiler has two convolution paths. This leaves out the newer one, `ynn_fusion`.
_WITHOUT_YNN = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def candidate_options(backend: str | None = None) -> tuple[dict[str, str], ...]:
    """The sets of compiler options worth trying for a convolutional program on a backend.

    Which of XLA's two convolution paths on the CPU is faster differs by program and by JAX generation, so that
    a fair measurement tries both. The first entry, {}, is XLA's default and the only one on GPU and TPU and
    where this XLA does not know the option.

    Args:
        backend: "cpu", "gpu" or "tpu"; JAX's default backend if None.
    """
    if (backend or jax.default_backend()) != "cpu":
        return ({},)
    try:
        jax.jit(lambda x: x + 1, compiler_options=_WITHOUT_YNN).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:  # "No such compile option"
        return ({},)
    return ({}, _WITHOUT_YNN)


def training_options() -> dict[str, str]:
    """The compiler options for a training step: on the CPU, the convolution path with fast gradients."""
    return candidate_options()[-1]
