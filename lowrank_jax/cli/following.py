"""What the report of a command says of the next one: the same network and images again."""

import argparse
import json

from lowrank_jax.cli.models import Model
from lowrank_jax.report.next_steps import Setting


def setting(args: argparse.Namespace, model: Model) -> Setting:
    """The network and the images of a command.

    Args:
        args: of the command.
        model: that it names.
    """
    labels = getattr(args, "labels", None)
    return Setting(
        subject=f"{args.model}, {args.checkpoint}, with {args.images}",
        checkpoint=args.checkpoint,
        options=_options(args),
        count=["--count", str(args.count)] if args.count else [],
        labels=["--labels", str(labels)] if labels else [],
        imports=model.imports,
        model=model.expression if model.module else "",
        apply=model.function,
        call="".join(f", {name}={value!r}" for name, value in args.model_kwargs.items()),
    )


def _options(args: argparse.Namespace) -> list[str]:
    given = {"--model": args.model, "--images": args.images}
    for name in ("model_args", "model_kwargs"):
        if value := getattr(args, name):
            given[f"--{name.replace('_', '-')}"] = json.dumps(value)
    if args.seed:
        given["--seed"] = args.seed
    if folder := getattr(args, "data_dir", None):
        given["--data-dir"] = folder
    if args.size:
        given["--size"] = "x".join(map(str, args.size))
    for name in ("mean", "std"):
        if value := getattr(args, name):
            given[f"--{name}"] = ",".join(map(str, value))
    return [text for pair in given.items() for text in map(str, pair)]
