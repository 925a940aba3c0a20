"""What to do with a result: sentences, and a command or Python to copy."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from lowrank_jax.report.record import Section
from lowrank_jax.report.scores import Score

CLOSE = 0.005  # of accuracy; less than this is seldom worth a training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What the next command needs to be told again.

    Attributes:
        subject: the network and its images, in words.
        checkpoint: of the dense network.
        options: of the command line, which name the model and the images.
        count: of the command line, too: how many images were read for the plan.
        labels: of the command line, too; empty where no labels were given.
        imports: the line of Python that imports the model.
        apply: Python of its function of (variables, images); "" of a module of NNX.
        model: Python of the module itself.
        call: arguments of the model's call in Python, such as ", train=False".
    """

    subject: str = ""
    checkpoint: str
    options: Sequence[str]
    count: Sequence[str] = ()
    labels: Sequence[str] = ()
    imports: str
    apply: str
    model: str = ""
    call: str = ""


def after_plan(setting: Setting, out: Path) -> list[Section]:
    """After `plan`: compress, on the same images.

    Args:
        setting: of the plan.
        out: folder of the plan.

    Example:
        >>> given = dict(imports="from m import f", apply="f")
        >>> setting = Setting(checkpoint="a.npz", options=["--images", "i.npy"], **given)
        >>> print(after_plan(setting, Path("out"))[0].code)
        lowrank-jax compress --checkpoint a.npz --images i.npy --plan out/plan.json
    """
    text = (
        "The plan costs nothing yet: the network is as it was. The next command fits the factors "
        "to the images and writes the smaller checkpoint, without labels and without training."
    )
    own = ["--checkpoint", setting.checkpoint, *setting.options, *setting.count]
    code = shlex.join(["lowrank-jax", "compress", *own, "--plan", str(out / "plan.json")])
    return [Section(title="What to do next: compress", text=text, code=code)]


def after_compress(setting: Setting, out: Path, score: Score) -> list[Section]:
    """After `compress`: fine-tune where something was lost, and run it fast.

    Args:
        setting: of the compression.
        out: folder of its results.
        score: of the compressed network.
    """
    weights = out / "variables.npz"
    return [_finetune(setting, weights, score), _fast(setting, weights)]


def after_finetune(setting: Setting, weights: Path) -> list[Section]:
    """After `finetune`: run it fast.

    Args:
        setting: of the training.
        weights: of the trained network.
    """
    return [_fast(setting, weights)]


def _finetune(setting: Setting, weights: Path, score: Score) -> Section:
    own = ["--checkpoint", str(weights), "--teacher", setting.checkpoint]
    options = [*own, *setting.options, *setting.labels, "--epochs", "10"]
    how = (
        "Fine-tuning with the dense network as a teacher wins back much of what was lost. It "
        "needs training images; labels help and are not needed."
    )
    return Section(
        title="What to do next: fine-tune",
        text=f"{_lost(score)} {how}",
        code=shlex.join(["lowrank-jax", "finetune", *options]),
    )


def _lost(score: Score) -> str:
    """What the compression cost, in a sentence."""
    if score.small is None or score.dense is None:
        return f"The outputs differ from the dense ones by {100 * score.error:.3g} %."
    lost = 100 * (score.dense - score.small)
    if lost <= 100 * CLOSE:
        return "The compressed network does about as well as the dense one; you may stop here."
    what = "points of accuracy" if score.images.labelled else "% of the dense network's classes"
    return f"The compression costs {lost:.1f} {what}."


def _fast(setting: Setting, weights: Path) -> Section:
    text = (
        "Fewer multiply-adds are not yet less time. fast measures on this device which algorithm "
        "of each layer is fastest, and what it found can be saved. The images are a batch as the "
        "network takes them."
    )
    lines = ["import lowrank_jax as lr", setting.imports]
    lines += _lines(setting, f"lr.load_weights({str(weights)!r})")
    code = "\n".join([*lines, 'run.save("fast.json")'])
    return Section(title="What to do next: run it fast", text=text, code=code)


def _lines(setting: Setting, variables: str) -> list[str]:
    """Python that searches for the fastest program of a network and runs it."""
    if setting.apply:
        return [
            f"small = {variables}",
            f"run = lr.fast({setting.apply}, small, images{setting.call})",
            "outputs = run(small, images)",
        ]
    return [
        "from flax import nnx",
        f"model = lr.nnx.rebuilt({setting.model}, {variables})",
        f"run = lr.nnx.fast(model, images{setting.call})",
        "outputs = run(nnx.state(model), images)",
    ]
