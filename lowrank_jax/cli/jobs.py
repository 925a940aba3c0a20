"""A checkpoint, a model and images of the user's own: what `plan` and `compress` work on."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowrank_jax.calibration.collecting import Calibration, calibrate
from lowrank_jax.cli.arrays import load_images
from lowrank_jax.cli.models import check_model, load_model
from lowrank_jax.cli.options import floats, parse_budget, parse_object, positive, rates
from lowrank_jax.io.weights import load_weights
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.transform import lowrank
from lowrank_jax.tree.decomposing import reconstruct

BATCH = 256  # images in a forward pass


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A network and its images.

    Attributes:
        apply: of the model.
        variables: of the network, for `plan` and `compress` dense.
        images: inputs as the network takes them.
        kwargs: arguments of the model's call.
    """

    apply: Callable
    variables: Any
    images: np.ndarray
    kwargs: Mapping[str, Any]

    def calibrate(self) -> Calibration:
        """The one pass over the images that plans and fits share."""
        return calibrate(self.apply, self.variables, self.images, **self.kwargs)

    def outputs(self, variables: Any) -> Iterator[np.ndarray]:
        """The outputs of a dense or decomposed network, batch by batch."""
        apply = lowrank(functools.partial(self.apply, **self.kwargs))
        program = jax.jit(apply, compiler_options=default_options())
        for start in range(0, len(self.images), BATCH):
            yield np.asarray(program(variables, self.images[start : start + BATCH]))

    def classes(self, variables: Any) -> np.ndarray:
        """The class of the largest output of each image."""
        return np.concatenate([batch.argmax(-1) for batch in self.outputs(variables)])

    @property
    def class_count(self) -> int:
        """Of the network's outputs."""
        call = functools.partial(self.apply, **self.kwargs)
        return jax.eval_shape(call, self.variables, self.images[:1]).shape[-1]

    def output_error(self, variables: Any) -> float:
        """Norm of the change of the outputs over the norm of the dense network's outputs."""
        gap = norm = 0.0
        pairs = zip(self.outputs(self.variables), self.outputs(variables), strict=True)
        for wanted, found in pairs:
            wide = wanted.astype(np.float64)
            gap += float(np.sum((found - wide) ** 2))
            norm += float(np.sum(wide**2))
        return (gap / norm) ** 0.5 if norm else 0.0


def add_network_options(command: argparse.ArgumentParser) -> None:
    """The options that name a network and its images."""
    add = command.add_argument
    formats = ".npz, .safetensors, .msgpack, Orbax folder"
    add("--checkpoint", required=True, help=f"variables: {formats}")
    add("--model", required=True, help="Linen module by import path, as in package.module:Class")
    add("--model-args", type=parse_object, default={}, help="its attributes as JSON")
    about = 'arguments of its call as JSON, such as {"train": false}'
    add("--model-kwargs", type=parse_object, default={}, help=about)
    about = "images (batch, h, w, c): .npy, float or uint8"
    add("--images", required=True, help=about)
    about = "of the channels, subtracted from images scaled to [0, 1]"
    add("--mean", type=floats, help=about)
    add("--std", type=rates, help="of the channels, by which the rest is divided")


def add_job_options(command: argparse.ArgumentParser, folder: str) -> None:
    """The options that `plan` and `compress` share."""
    add_network_options(command)
    add = command.add_argument
    about = "macs, parameters, bytes or latency=share, or a count"
    add("--budget", type=parse_budget, default="macs=0.5", help=about)
    about = "images that run at once, for a budget of latency"
    add("--batch", type=positive, default=1, help=about)
    about = "ranks are restricted to multiples of this; without it 8 on an accelerator, 1 on a CPU"
    add("--multiple", type=positive, help=about)
    add("--out", type=Path, default=Path(folder), help="folder for the results")


def load_variables(path: str) -> dict[str, Any]:
    """The variables of a Linen model from a checkpoint."""
    variables = jax.tree.map(jax.numpy.asarray, load_weights(path))
    if "params" not in variables:
        raise ValueError(
            f"{path} holds {sorted(variables)}, not 'params': save the variables of the model."
        )
    return variables


def check_shapes(path: str, variables: Any, expected: Any, network: str) -> None:
    """Refuses variables, dense or decomposed, that are not those of a network."""
    dense = jax.eval_shape(reconstruct, variables)
    if jax.tree.map(np.shape, dict(dense)) != jax.tree.map(np.shape, dict(expected)):
        raise ValueError(
            f"{path} does not hold the variables of {network}. Give the checkpoint of this model, "
            "or --model-args as it had."
        )


def load_job(args: argparse.Namespace) -> Job:
    """The network and the images that the options name."""
    model = load_model(args.model, args.model_args)
    variables = load_variables(args.checkpoint)
    images = load_images(args.images, args.mean, args.std)
    expected = check_model(args.model, model, images[:1], args.model_kwargs)
    check_shapes(args.checkpoint, variables, expected, f"{args.model} for {images.shape[1:]}")
    return Job(apply=model.apply, variables=variables, images=images, kwargs=args.model_kwargs)
