"""What the network was made of that a run began from, kept in the folder of the run."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_jax.calibration.inputs import is_iterable_of_batches
from lowrank_jax.io.atomic import whole_file
from lowrank_jax.training.checkpoints import begun
from lowrank_jax.training.fingerprints import fingerprint

FILE = "origin.json"
Origin = Mapping[str, str]
PLAIN = (str, int, float, type(None))


def has_origin(folder: Path, own: Origin) -> bool:
    """Whether the start in a folder is made of the same, so that a run goes on from there.

    A start of something else counts for nothing before a step of its training is saved. A folder
    of an older version does not say what its start was made of, and is taken as it is.

    Args:
        folder: of the run.
        own: texts that tell what the start is made of, by their names.

    Raises:
        ValueError: steps are saved of a start that was made of something else.
    """
    found = _read(folder / FILE)
    if found == own or not begun(folder):
        return found == own
    for name in {*own} & {*found}:
        if found[name] != own[name]:
            raise ValueError(
                f"{folder} holds a run that began from another {name}; give the {name} that it "
                "had, or another folder."
            )
    return True


def origin_of(inputs: Any, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """What a fit was given beside its network, as far as it can be told.

    Args:
        inputs: unlabelled; a loader or a function that gives an iterator tells nothing.
        kwargs: of the model; arrays and functions among them tell nothing.

    Example:
        >>> origin_of(iter([]), {"train": False})
        {'set of arguments': '{"train": false}'}
    """
    plain = {name: x for name, x in sorted(kwargs.items()) if isinstance(x, PLAIN)}
    own = {"set of arguments": json.dumps(plain)}
    if isinstance(inputs, Sequence) or not (callable(inputs) or is_iterable_of_batches(inputs)):
        own["set of inputs"] = fingerprint(inputs)
    return own


@contextlib.contextmanager
def new_origin(folder: Path, own: Origin) -> Iterator[None]:
    """Within it a start is written into a folder, which is known when all of it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).unlink(missing_ok=True)
    yield
    with whole_file(folder / FILE) as scratch:
        scratch.write_text(json.dumps(dict(own), indent=1) + "\n")


def _read(path: Path) -> dict[str, str]:
    return json.loads(path.read_text()) if path.exists() else {}
