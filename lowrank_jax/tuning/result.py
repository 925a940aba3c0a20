"""What `fast` found: a compiled network that is called, saved and loaded."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import jax

from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.program.compiler import default_options
from lowrank_jax.tree.warning import warn
from lowrank_jax.tuning.algorithms import Choose, Layer
from lowrank_jax.tuning.candidate import Candidate, Configuration, Network
from lowrank_jax.tuning.device import Device
from lowrank_jax.tuning.experimental.pools import Pool
from lowrank_jax.tuning.result_file import read_result, write_result
from lowrank_jax.tuning.running import with_algorithms

Elsewhere = Literal["plain", "keep", "error"]


def network_of(
    apply: Callable, args: tuple, kwargs: Mapping[str, Any], constants: Any = None
) -> Network:
    """The network of a function of (variables, inputs, *args, **kwargs).

    Args:
        apply: the function.
        args, kwargs: the function's other arguments, which become part of the program.
        constants: the variables, if they become part of the program, too.
    """

    def call(variables: Any, inputs: Any) -> Any:
        return apply(variables, inputs, *args, **kwargs)

    def network(choose: Choose | None) -> Callable[[Any, Any], Any]:
        run = with_algorithms(call, choose)
        return run if constants is None else lambda _, inputs: run(constants, inputs)

    return network


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Fast:
    """A network as `fast` found it fastest: a compiled function of (variables, inputs).

    It takes any batch and image size, and measures nothing. Layers of a size that was not measured
    run by their plain algorithm. Within another program, as under ``jax.jit``, ``jax.grad`` or
    ``jax.export``, the algorithms stay, and the compiler options are those of the outer program:
    ``jax.jit(fast, compiler_options=fast.options)`` gives it the options found. `save` writes a
    `Fast`, and pickle does not.

    Attributes:
        run: the function, under ``jax.jit`` with ``options``.
        candidate: what was chosen.
        device: on which it was measured.
        seconds: every candidate that was measured, to the median of its time.
        left_out: every candidate and algorithm that was not measured, to the reason: it failed, its
            outputs differ from those of most candidates, or there was no time.
        frozen: whether the variables are part of the program.
    """

    run: Callable
    candidate: Candidate
    device: Device
    seconds: Mapping[str, float]
    left_out: Mapping[str, str]
    frozen: bool = False

    def __call__(self, variables: Any, inputs: Any) -> Any:
        if self.frozen and variables is not None:
            raise ValueError(
                "The variables are part of this program: give None for them, or search without "
                "freeze."
            )
        leaves = jax.tree.leaves((variables, inputs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            inner = self.run.__wrapped__  # type: ignore[attr-defined]
            return inner(variables, inputs)  # compiler options belong to the outer program
        return self.run(variables, inputs)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"The Fast of {self.candidate} holds a compiled program, which cannot be pickled. "
            "Write it by run.save(path), and restore it by Fast.load(path, apply)."
        )

    @property
    def options(self) -> Mapping[str, Any]:
        """Compiler options."""
        return self.candidate.configuration.options

    @property
    def size(self) -> int | None:
        """Images that run through the network at a time; None for all of them."""
        return self.candidate.configuration.size

    @property
    def algorithms(self) -> Mapping[tuple[Layer, Scheme | None], str]:
        """Layers, with their scheme or None if dense, to algorithms; none if all are plain."""
        return self.candidate.choices.algorithms

    @property
    def pools(self) -> Mapping[Pool, str]:
        """Poolings to algorithms; none if all are plain."""
        return self.candidate.choices.pools

    def save(self, path: str | os.PathLike) -> None:
        """Writes what was found as JSON, without the network and its variables.

        Args:
            path: of the file, which appears whole or not at all.
        """
        write_result(path, vars(self))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        apply: Callable,
        *args: Any,
        variables: Any = None,
        elsewhere: Elsewhere = "plain",
        **kwargs: Any,
    ) -> "Fast":
        """Restores what `save` wrote, without a search.

        Args:
            path: of the file.
            apply: the function that `fast` was given.
            *args, **kwargs: its arguments after the inputs, as they were given to `fast`.
            variables: the variables of a search with ``freeze``, which become constants again.
            elsewhere: what happens, after a warning, if the file was measured on another device, or
                with another release of JAX: "plain" runs the plain network, "keep" runs what was
                found there, and "error" raises a ValueError.

        Raises:
            FileNotFoundError: there is nothing at the path.
            ValueError: the file holds something else, was measured elsewhere, or was searched for
                with ``freeze`` and the variables are not given.

        Example:
            >>> import tempfile, jax, jax.numpy as jnp
            >>> from flax import linen as nn
            >>> from lowrank_jax import fast
            >>> model, images = nn.Sequential([nn.Conv(16, (3, 3))]), jnp.ones((4, 8, 8, 8))
            >>> variables = model.init(jax.random.key(0), images)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     fast(model.apply, variables, images, rounds=2).save(f"{folder}/net.json")
            ...     run = Fast.load(f"{folder}/net.json", model.apply)
            >>> run(variables, images).shape
            (4, 8, 8, 16)
        """
        if elsewhere not in ("plain", "keep", "error"):
            raise ValueError(f"{elsewhere=} is not allowed; give 'plain', 'keep' or 'error'.")
        facts = read_result(path)
        if facts["frozen"] and variables is None:
            raise ValueError(f"{path} was searched for with freeze; give the variables, too.")
        if differences := facts["device"].differences(Device.here()):
            facts |= _elsewhere(path, differences, elsewhere)
        facts["frozen"] = variables is not None
        run = facts["candidate"].compiled(network_of(apply, args, kwargs, variables))
        return cls(run=run, **facts)


def _elsewhere(
    path: str | os.PathLike, differences: list[str], elsewhere: Elsewhere
) -> dict[str, Any]:
    """What is other than in a file that was measured on another device."""
    runs = "What was found there" if elsewhere == "keep" else "The plain network"
    message = f"{path} was measured elsewhere: {'; '.join(differences)}"
    if elsewhere == "error":
        raise ValueError(f"{message}. Search anew, or load it with elsewhere='plain' or 'keep'.")
    warn(f"{message}. {runs} runs. Search anew on this device with fast.")
    if elsewhere == "keep":
        return {}
    return {"candidate": Candidate(Configuration(default_options())), "seconds": {}}
