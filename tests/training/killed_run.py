"""Kills a training run at random moments and lets it end; prints what it lost, as lines of JSON.

Usage: python killed_run.py HOME KILLS. This process imports everything, and each run is a fork of
it. The kills fall a random time after a random step, also within checkpoints, which take longer.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optax

from lowrank_jax.io.weights import load_weights, save_weights
from lowrank_jax.training import finetune
from lowrank_jax.training.checkpoints import Checkpoints

EVERY, REACH, LATER = 4, 8, 0.3  # steps between checkpoints and up to a kill, seconds after it


class Batches(Sequence):
    """Batches that note how far the run came; after so many the run waits to be killed."""

    def __init__(self, notes: Path, most: int | None) -> None:
        self.notes, self.left, self.known = notes, most, False

    def __len__(self) -> int:
        return 7

    def __getitem__(self, number: int) -> tuple:
        if self.known:  # the first batch is read once more, before all steps
            self._begin_step()
        self.known = True
        rng = np.random.default_rng(number)
        return rng.normal(size=(8, 6)).astype(np.float32), rng.integers(0, 3, 8)

    def _begin_step(self) -> None:
        if self.left is not None:
            time.sleep(60 if self.left == 0 else 0)
            self.left -= 1
        with self.notes.open("a") as file:
            file.write(".")


def run(folder: Path, steps: int, every: int, most: int | None) -> None:
    """One run, from the start or from its newest checkpoint, and its result in a file."""
    tree = {"w": np.full((6, 3), 0.1, np.float32), "b": np.zeros(3, np.float32)}
    options = dict(steps=steps, save_every=every, tx=optax.adam(0.01), folder=folder)
    tuned = finetune(
        lambda tree, x: x @ tree["w"] + tree["b"],
        tree,
        Batches(folder.with_suffix(".notes"), most),
        augment=lambda key, batch: (batch[0] + noise(key, batch[0]), batch[1]),
        **options,
    )
    save_weights(folder.with_suffix(".npz"), tuned)


def noise(key, like):
    import jax

    return 0.1 * jax.random.normal(key, like.shape)


def forked(folder: Path, steps: int, every: int = EVERY, most: int | None = None) -> int:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            run(folder, steps, every, most)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def lost(folder: Path, before: int) -> int:
    """How many steps a killed run had begun after its newest checkpoint, without the one begun."""
    notes = folder.with_suffix(".notes")
    began = len(notes.read_text()) if notes.exists() else 0
    notes.unlink(missing_ok=True)
    return max(before + began - 1 - newest(folder), 0)


def wait(folder: Path, steps: int) -> None:
    """Until a run has begun so many steps."""
    notes = folder.with_suffix(".notes")
    while steps and not (notes.exists() and notes.stat().st_size >= steps):
        time.sleep(0.001)


def newest(folder: Path) -> int:
    return max(Checkpoints(folder).steps(), default=0)


def main(home: str, kills: str) -> None:
    whole, folder = Path(home) / "whole", Path(home) / "killed"
    steps, rng = (REACH + EVERY) * int(kills), random.Random(0)
    assert os.waitpid(forked(whole, steps, every=steps), 0)[1] == 0
    for _ in range(int(kills)):
        before = newest(folder)
        child = forked(folder, steps, most=REACH + EVERY - 1)
        wait(folder, rng.randrange(REACH))
        time.sleep(rng.uniform(0, LATER))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        print(json.dumps({"killed": killed, "lost": lost(folder, before)}), flush=True)
    assert os.waitpid(forked(folder, steps), 0)[1] == 0
    one, two = (load_weights(path.with_suffix(".npz")) for path in (whole, folder))
    equal = all(one[name].tobytes() == two[name].tobytes() for name in one)
    left = [path.name for path in (folder / "checkpoints").glob(".*")]
    print(json.dumps({"equal": equal, "left": left}))


if __name__ == "__main__":
    main(*sys.argv[1:])
