"""A checkpoint, a model and images of the user: what `plan`, `compress`, `finetune` work on."""

import argparse
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from lowrank_jax.calibration.collecting import Calibration, calibrate
from lowrank_jax.cli.checkpoints import Found, find_variables
from lowrank_jax.cli.choice import Choice, Examples
from lowrank_jax.cli.examples import checked, load_examples, load_labels, scaled
from lowrank_jax.cli.models import Model, load_model
from lowrank_jax.cli.options import (
    DATA_DIR,
    floats,
    image_size,
    parse_budget,
    parse_object,
    positive,
    rates,
    seed,
)
from lowrank_jax.io.weights import load_weights
from lowrank_jax.nnx.forms import functional
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.program.tracing import trace
from lowrank_jax.program.transform import lowrank

LOG = logging.getLogger("lowrank_jax")
CALIBRATION = 2048  # images that are read for a plan or a fit
BATCH = 256  # images in a forward pass


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A network and its images.

    Attributes:
        model: as it was named.
        apply: of the model.
        variables: of the network, for `plan` and `compress` dense.
        source: Python that makes them of what `load_weights` gives; "" where that is long.
        examples: the images that were read, as they are stored.
        images: inputs as the network takes them.
        kwargs: arguments of the model's call.
    """

    model: Model
    apply: Callable
    variables: Any
    source: str
    examples: Examples
    images: np.ndarray
    kwargs: Mapping[str, Any]

    def labels(self, images: str, labels: str | None) -> np.ndarray | None:
        """The classes of the images, or None where neither option has some.

        Args:
            images, labels: the options. Labels of a file count before those with the images.

        Raises:
            ValueError: they are no classes of the network.
        """
        if labels:
            return load_labels(labels, self.examples, self.class_count)
        if self.examples.labels is None:
            return None
        return checked(self.examples, images, self.class_count)

    @property
    def call(self) -> Callable:
        """The network as a function of a dense or decomposed tree and images."""
        return lowrank(functools.partial(self.apply, **self.kwargs))

    @functools.cached_property
    def trace(self) -> Trace:
        """The program for one image."""
        return trace(self.apply, self.variables, self.images[:1], **self.kwargs)

    def calibrate(self) -> Calibration:
        """The one pass over the images that plans and fits share."""
        return calibrate(self.apply, self.variables, self.images, **self.kwargs)

    def outputs(self, variables: Any) -> Iterator[np.ndarray]:
        """The outputs of a dense or decomposed network, batch by batch."""
        program = jax.jit(self.call, compiler_options=default_options())
        for start in range(0, len(self.images), BATCH):
            yield np.asarray(program(variables, self.images[start : start + BATCH]))

    def classes(self, variables: Any) -> np.ndarray:
        """The class of the largest output of each image."""
        return np.concatenate([batch.argmax(-1) for batch in self.outputs(variables)])

    @property
    def class_count(self) -> int:
        """Of the network's outputs."""
        return jax.eval_shape(self.call, self.variables, self.images[:1]).shape[-1]


def add_network_options(command: argparse.ArgumentParser, count: int | None = None) -> None:
    """The options that name a network and its images.

    Args:
        command: that gets them.
        count: images that are read without the option; None for all.
    """
    add = command.add_argument
    about = "variables: .npz, .safetensors, .msgpack, a folder of Orbax; of a training state, too"
    add("--checkpoint", required=True, help=about)
    about = (
        "import path, package.module:name, of a Linen or NNX class, of a function that makes a "
        "module, or of a function of (variables, images)"
    )
    add("--model", required=True, help=about)
    about = "arguments of the class or function that makes the model, as JSON"
    add("--model-args", type=parse_object, default={}, help=about)
    about = 'arguments of the call as JSON, such as {"train": false}'
    add("--model-kwargs", type=parse_object, default={}, help=about)
    about = (
        "images: .npy or .npz (batch, h, w, c), float or uint8; a folder of pictures, or of a "
        "folder for each class; tfds:name/split, or a folder with its array_record files; "
        "package.module:name of an iterator of batches"
    )
    add("--images", required=True, help=about)
    add("--data-dir", help=DATA_DIR.format("the data set of tfds:name"))
    about = "images that are read at most, a random choice; the first ones of batches"
    add("--count", type=positive, default=count, help=f"{about}{'' if count else '; all without'}")
    about = "height and width, such as 224 or 224x320, to which pictures are scaled and cropped"
    add("--size", type=image_size, help=about)
    add("--seed", type=seed, default=0, help="of the choice of images and of all random numbers")
    about = "of the channels, subtracted from images scaled to [0, 1]"
    add("--mean", type=floats, help=about)
    add("--std", type=rates, help="of the channels, by which the rest is divided")


def add_job_options(command: argparse.ArgumentParser, folder: str) -> Any:
    """The options that `plan` and `compress` share.

    Returns:
        The group of --budget, to which a command adds what excludes a budget.
    """
    add_network_options(command, CALIBRATION)
    add, ranks = command.add_argument, command.add_mutually_exclusive_group()
    about = "macs, parameters, bytes or latency=share, or a count"
    ranks.add_argument("--budget", type=parse_budget, default="macs=0.5", help=about)
    about = "images that run at once, for a budget of latency or for --time"
    add("--batch", type=positive, default=1, help=about)
    about = "ranks are restricted to multiples of this; without it 8 on an accelerator, 1 on a CPU"
    add("--multiple", type=positive, help=about)
    add("--out", type=Path, default=Path(folder), help="folder for the results")
    return ranks


def load_job(args: argparse.Namespace) -> Job:
    """The network and the images that the options name."""
    model = load_model(args.model, args.model_args)
    tree = load_weights(args.checkpoint)  # before the images, which may take minutes
    choice = Choice(count=args.count, seed=args.seed, size=args.size, data_dir=args.data_dir)
    examples = load_examples(args.images, choice)
    LOG.info("%s images of %s are read.", f"{len(examples.images):,}", f"{examples.total:,}")
    images = scaled(examples.images, args.images, args.mean, args.std)
    found = variables_from(tree, args.checkpoint, model, images[:1], args.model_kwargs)
    apply, variables = model.apply, found.variables
    if model.is_nnx:
        apply, variables = functional(model.filled(model.weights(variables)))
    if not isinstance(model.module, nn.Module):
        model.check_output(apply, variables, images[:1], args.model_kwargs)
    source = found.source.format(f"lr.load_weights({args.checkpoint!r})")
    return Job(
        model=model,
        apply=apply,
        variables=variables,
        source=source,
        examples=examples,
        images=images,
        kwargs=args.model_kwargs,
    )


def variables_from(
    tree: Any, path: str, model: Model, image: np.ndarray, kwargs: Mapping[str, Any]
) -> Found:
    """The variables of a model in what was read of a checkpoint, dense or decomposed.

    Raises:
        ValueError: they are not those of the model, or the model does not run.
    """

    def runs(variables: Any) -> bool:
        try:
            model.check_output(model.apply, variables, image, kwargs)
        except ValueError:
            return False
        return True

    network = f"{model.path} for {image.shape[1:]}"
    return find_variables(tree, path, model.shapes(image, kwargs), network, model.optional, runs)
