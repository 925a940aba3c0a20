"""What the report of a command says of the next one: the same network and images again."""

import argparse
import json

from lowrank_jax.report.next_steps import Setting


def setting(args: argparse.Namespace, checkpoint: str | None = None) -> Setting:
    """The network and the images of a command.

    Args:
        args: of the command.
        checkpoint: of the dense network; without one that of the command.
    """
    labels = getattr(args, "labels", None)
    return Setting(
        subject=f"{args.model}, {args.checkpoint}, with {args.images}",
        checkpoint=checkpoint or args.checkpoint,
        options=_options(args),
        labels=["--labels", str(labels)] if labels else [],
        model=_model(args),
        call="".join(f", {name}={value!r}" for name, value in args.model_kwargs.items()),
    )


def _options(args: argparse.Namespace) -> list[str]:
    given = {"--model": args.model, "--images": args.images}
    for name in ("model_args", "model_kwargs"):
        if value := getattr(args, name):
            given[f"--{name.replace('_', '-')}"] = json.dumps(value)
    for name in ("mean", "std"):
        if value := getattr(args, name):
            given[f"--{name}"] = ",".join(map(str, value))
    return [text for pair in given.items() for text in map(str, pair)]


def _model(args: argparse.Namespace) -> str:
    module, _, name = args.model.partition(":")
    attributes = ", ".join(f"{key}={value!r}" for key, value in args.model_args.items())
    return f"from {module} import {name}\n\nmodel = {name}({attributes})"
