"""Checkpoints of a training run: each is whole or not there, and damage is found."""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.io import atomic
from lowrank_jax.io.folders import check_path
from lowrank_jax.io.names import nest
from lowrank_jax.io.orbax import read_orbax, write_orbax
from lowrank_jax.io.seals import damage, seal
from lowrank_jax.planning.plans import Plan
from lowrank_jax.training.state import TrainState
from lowrank_jax.tree.warning import warn

CHECKPOINTS, DAMAGED = "checkpoints", "damaged"  # folders of a run
FACTS, PLAN, NEW = "facts.json", "plan.json", ".new"
VARIABLES, TRAINING = "default", "training"  # the trees in a checkpoint


class Checkpoints:
    """The newest checkpoints of one run, in a folder: one folder for each, named by its step.

    A checkpoint is a step of Orbax's ``CheckpointManager``. ``load_weights(path)`` reads its
    variables. The optimiser's state, the average and the random key are beside them, as are the
    facts of the run and the plan of the ranks. A checkpoint appears when it is whole and on the
    disk. Hashes of all its files tell later damage.

    Args:
        folder: of the run; the checkpoints are in the folder "checkpoints" within.
        keep: how many of the newest stay; 2 at least, as the last one may be damaged.

    Example:
        >>> import optax, tempfile
        >>> state = TrainState.create({"w": jnp.ones(3)}, optax.sgd(0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kept = Checkpoints(folder)
        ...     kept.save(state, {"seed": 0})
        ...     again, facts = kept.newest(state)
        >>> again.variables["w"].tolist(), facts
        ([1.0, 1.0, 1.0], {'seed': 0})
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder) / CHECKPOINTS, max(keep, 2)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_scratch()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, the newest first."""
        names = [path.name for path in self.folder.iterdir() if path.name.isdecimal()]
        own = [int(name) for name in names if self.path(int(name)).name == name]
        return sorted(own, reverse=True)

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / f"{step:09d}"

    def save(self, state: TrainState, facts: Mapping[str, Any], plan: Plan | None = None) -> None:
        """Writes a checkpoint; only then are older ones removed.

        Args:
            state: whose step names the checkpoint.
            facts: plain values that `newest` gives back.
            plan: of the ranks.

        Raises:
            OSError: the disk is full, or the folder cannot be written to. What was saved before
                stays.
        """
        target = self.path(int(state.step))
        scratch = self.folder / f".{target.name}.{secrets.token_hex(8)}{NEW}"
        try:
            self._write(scratch, state, facts, plan)
            shutil.rmtree(target, ignore_errors=True)  # a damaged one of this step
            scratch.rename(target)
        except Exception as error:
            if _is_full(error):
                raise OSError(errno.ENOSPC, self._full(int(state.step))) from error
            raise
        finally:
            self._remove_scratch()
        older = [step for step in self.steps() if step <= int(state.step)]
        for step in older[self.keep :]:
            shutil.rmtree(self.path(step))

    def newest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole checkpoint and its facts; None where there is none.

        A warning names a damaged checkpoint, which is moved to the folder "damaged" beside the
        checkpoints, so that no later one is taken for older. The checkpoint before it is read.

        Args:
            like: a state of the same network and optimiser.

        Raises:
            ValueError: the checkpoint is of another network or optimiser.
        """
        steps = self.steps()
        for step in steps:
            path = self.path(step)
            if reason := damage(path):
                self._set_aside(path, reason)
                continue
            return _state(path, like), json.loads((path / FACTS).read_text())
        if steps:
            warn(f"No checkpoint in {self.folder} is whole; the run starts at step 0.")
        return None

    def _set_aside(self, path: Path, reason: str) -> None:
        """Moves a damaged checkpoint out of the folder."""
        target = self.folder.with_name(DAMAGED) / path.name
        shutil.rmtree(target, ignore_errors=True)  # of an earlier run in this folder
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        warn(f"The checkpoint {path} is damaged ({reason}) and left out; {target} has its files.")

    def _write(
        self, folder: Path, state: TrainState, facts: Mapping[str, Any], plan: Plan | None
    ) -> None:
        write_orbax(folder, {name: nest(_arrays(tree)) for name, tree in _trees(state).items()})
        (folder / FACTS).write_text(json.dumps(dict(facts), indent=1) + "\n")
        if plan is not None:
            plan.save(folder / PLAN)
        seal(folder)

    def _remove_scratch(self) -> None:
        """Removes what is half written, also under the name that Orbax gives it meanwhile."""
        for left in self.folder.glob(f".*{NEW}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _full(self, step: int) -> str:
        kept = [str(self.path(own)) for own in self.steps()[:1]]
        last = f"The last checkpoint is {kept[0]}" if kept else "There is no checkpoint yet"
        return f"The disk is full: step {step} was not saved. {last}; make room and call again"


def begun(folder: str | os.PathLike) -> bool:
    """Whether a folder has a checkpoint, whole or damaged. It is not changed."""
    return any((Path(folder) / CHECKPOINTS).glob("[0-9]*"))


def last_step(folder: str | os.PathLike) -> int | None:
    """The step of the newest checkpoint in a folder, whole or damaged; None where there is none."""
    found = (Path(folder) / CHECKPOINTS).glob("[0-9]*")
    return max((int(path.name) for path in found), default=None)


@contextlib.contextmanager
def held(folder: str | os.PathLike) -> Iterator[None]:
    """Holds the folder of a run, which one process at a time may use.

    Raises:
        FileExistsError: the path is a file, or lies below one.
        ValueError: another process uses it.
    """
    check_path(folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    if atomic.fcntl is None:  # Windows has no such locks
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(atomic.flock(Path(folder), wait=False))
        except BlockingIOError as error:
            raise ValueError(
                f"{folder} is in use by another run; wait for it, or give another folder."
            ) from error
        yield


def save_tree(path: Path, tree: Any) -> None:
    """Writes any tree of arrays into a new folder, for `load_tree`."""
    write_orbax(path, {VARIABLES: nest(_arrays(tree))})


def load_tree(path: Path, like: Any) -> Any:
    """A tree that `save_tree` wrote.

    Args:
        path: of the folder.
        like: a tree of the same structure, or of its shapes.

    Raises:
        ValueError: the tree is of another network.
    """
    return _tree(read_orbax(path), like, path)


def _trees(state: TrainState) -> dict[str, Any]:
    """The two trees of a checkpoint."""
    names = ("step", "optimizer", "average", "key")
    return {
        VARIABLES: state.variables,
        TRAINING: {name: getattr(state, name) for name in names},
    }


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree by their paths, on the host; random keys as their data."""
    return {name: np.asarray(plain(leaf)) for name, leaf in _named(tree)}


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    texts = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return [(text or "value", leaf) for text, (_, leaf) in zip(texts, leaves, strict=True)]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
    """A leaf, or the data of a random key."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _state(path: Path, like: TrainState) -> TrainState:
    trees = {
        name: _tree(read_orbax(path / name), tree, path) for name, tree in _trees(like).items()
    }
    variables = trees[VARIABLES]
    params, rest = (_part(own, variables) for own in (like.params, like.rest))
    return TrainState(params=params, rest=rest, **trees[TRAINING])


def _part(like: Any, tree: Any) -> Any:
    """The leaves of a tree where another one has some."""
    return jax.tree.map(
        lambda own, leaf: None if own is None else leaf, like, tree, is_leaf=lambda x: x is None
    )


def _tree(saved: dict[str, Any], like: Any, path: Path) -> Any:
    """A tree of a checkpoint, in the structure of another one."""
    found, wanted = dict(_named(saved)), dict(_named(like))
    odd = sorted(set(found) ^ set(wanted)) or [
        name for name, leaf in wanted.items() if not _same(found[name], plain(leaf))
    ]
    if odd:
        raise ValueError(
            f"{path} is of another network or optimiser, or of a run with other trained=, average= "
            f"or accumulate=: {odd[0]} differs. Give those of the run that wrote it, or another "
            "folder."
        )
    leaves = [_placed(found[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _same(one: Any, two: Any) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype


def _placed(array: np.ndarray, like: jax.Array) -> jax.Array:
    """An array as another one is: a random key again, and on its devices."""
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    committed = getattr(like, "committed", False)
    return jax.device_put(array, like.sharding) if committed else jnp.asarray(array)


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is the cause; the library that writes arrays says so in words alone."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
            return True
        error = error.__cause__ or error.__context__
    return False
