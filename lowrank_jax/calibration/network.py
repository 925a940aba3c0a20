"""A network as the verbs see it: a function, its variables, the arguments of its call."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax.calibration.inputs import picking
from lowrank_jax.factorization.factors import is_factors
from lowrank_jax.program.changed import ChangedKernels
from lowrank_jax.program.jaxprs import check_function, is_array
from lowrank_jax.program.kernel import Kernel
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.program.names import leaf_names, names_of
from lowrank_jax.program.provenance import Source
from lowrank_jax.program.traced import Program
from lowrank_jax.program.tracing import NEEDED, trace


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """``apply(variables, *inputs, *args, **kwargs)``.

    Attributes:
        apply: the function.
        variables: its first argument.
        args, kwargs: the arguments of the model itself, after its inputs.
        changed: name of a kernel that the program changes first to the changed kernel, which stands
            for the stored one in all that follows.
    """

    apply: Callable
    variables: Any
    args: tuple = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_function(self.apply, self.variables)
        leaves = jax.tree_util.tree_leaves_with_path(self.variables, is_leaf=is_factors)
        for path, leaf in leaves:
            if is_factors(leaf):
                raise ValueError(
                    f"{names_of([path])[0]} is decomposed already; give the variables of the dense "
                    "network, as reconstruct(variables) makes them."
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each leaf of the variables to its shape."""
        return {name: np.shape(leaf) for name, leaf in self.named().items()}

    def named(self) -> dict[str, Any]:
        """Name of each leaf of the variables to the leaf."""
        leaves = jax.tree.leaves(self.variables)
        own = dict(zip(leaf_names(self.variables), leaves, strict=True))
        return own | dict(self.changed)

    def with_changed(self, found: Trace) -> "Network":
        """The network whose program reads the kernels that it changes as a trace found them."""
        if found.changed is None:
            return self
        values = found.changed.values(list(found.changed.roots), self.named())
        return dataclasses.replace(self, changed=values)

    def trace(self, inputs: tuple) -> Trace:
        """What becomes of every kernel; see `lowrank_jax.trace`."""
        with _tells(inputs):
            return trace(self.apply, self.variables, *inputs, *self.args, **self.kwargs)

    def program(self, inputs: tuple) -> "NetworkProgram":
        """The traced program, at these inputs' shapes."""
        given = ((self.variables, *inputs, *self.args), dict(self.kwargs))
        paths, tree = jax.tree_util.tree_flatten_with_path(given)
        with _tells(inputs):
            program = Program.of(self.apply, tree, [leaf for _, leaf in paths])
        sources = program.sources([path for path, _ in paths])
        if self.changed:
            kernels = ChangedKernels.of(program.closed, sources)
            program = dataclasses.replace(program, closed=kernels.cut(self.changed))
        count = len(jax.tree.leaves(inputs))
        return NetworkProgram(program, sources, len(jax.tree.leaves(self.variables)), count)

    def leaves(self, inputs: tuple) -> list:
        """The arrays that a `NetworkProgram` takes."""
        own = list(self.named().values()) if self.changed else self.variables
        leaves = jax.tree.leaves(((own, *inputs, *self.args), dict(self.kwargs)))
        return [leaf for leaf in leaves if is_array(leaf)]


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkProgram:
    """A traced network: which of the program's inputs are variables, and which are images.

    Attributes:
        program: the traced function.
        sources: for each input of the jaxpr the parameter that it is.
        variables: how many leaves the variables have; they come first.
        images: how many leaves follow that hold images.
    """

    program: Program
    sources: list[Source | None]
    variables: int
    images: int

    def values(self, inputs: Sequence) -> list:
        """The inputs of the jaxpr, the variables among them as kernels."""
        pairs = zip(self.sources, inputs, strict=True)
        return [x if s is None else Kernel.dense(s, x) for s, x in pairs]

    def kinds(self) -> list[str]:
        """For each input of the jaxpr "variable", "image" or "other"."""
        ends = (self.variables, self.variables + self.images)
        return [
            "variable" if index < ends[0] else "image" if index < ends[1] else "other"
            for index in self.program.inputs
        ]


@contextlib.contextmanager
def _tells(inputs: tuple) -> Iterator[None]:
    """An error of the model says what the model was given."""
    try:
        yield
    except Exception as error:
        shapes = [f"{tuple(x.shape)} {x.dtype}" for x in jax.tree.leaves(inputs)]
        raise ValueError(
            f"The model does not run on inputs {', '.join(shapes)}: {type(error).__name__}: "
            f"{error}\n{picking(inputs)}{NEEDED}"
        ) from error
