"""The trained network inside the package."""

from importlib import resources
from typing import Any

from lowrank_jax.io.weights import load_weights


def pretrained() -> dict[str, Any]:
    """Variables of `lowrank_jax.models.NIN` trained on CIFAR-10, from inside the package.

    Example:
        >>> pretrained()["params"]["Conv_2"]["kernel"].shape
        (5, 5, 96, 192)
    """
    with resources.as_file(
        resources.files("lowrank_jax.data") / "assets" / "cifar10_nin.npz"
    ) as path:
        return load_weights(path)
