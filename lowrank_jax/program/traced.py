"""The program of a forward pass, and how its results are put together."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from lowrank_jax.program.jaxprs import check_function, is_array, opened
from lowrank_jax.program.joined import apart
from lowrank_jax.program.names import FIRST, names_in_arguments
from lowrank_jax.program.provenance import Source


@dataclasses.dataclass(frozen=True)
class Program:
    """A function that was traced: its jaxpr, and how its outputs are put together.

    Attributes:
        closed: the jaxpr with its constants.
        inputs: the number of the leaf that each input of the jaxpr is.
        outputs: leaves of the result; `Hole` where one is an output of the jaxpr.
        tree: structure of the result.
    """

    closed: Any
    inputs: tuple[int, ...]
    outputs: list
    tree: Any

    @classmethod
    def of(
        cls, fn: Callable, tree: Any, leaves: Sequence[Any], kernels: Collection[int] | None = None
    ) -> "Program":
        """Traces ``fn(*args, **kwargs)``; leaves that are no arrays stay as they are.

        Kernels that the function joins are read one after the other.

        Args:
            fn: the function.
            tree: structure of (args, kwargs).
            leaves: of that structure; arrays or shapes where the function computes.
            kernels: numbers of the leaves that are to be read alone; without them, all of the first
                argument.
        """
        arrays = {i: leaf for i, leaf in enumerate(leaves) if is_array(leaf)}
        found: dict[str, Any] = {}

        def forward(arrays: dict[int, Any]) -> list:
            args, kwargs = jax.tree.unflatten(
                tree, [arrays.get(i, x) for i, x in enumerate(leaves)]
            )
            results, found["tree"] = jax.tree.flatten(fn(*args, **kwargs))
            found["outputs"] = [Hole() if is_array(leaf) else leaf for leaf in results]
            return [leaf for leaf in results if is_array(leaf)]

        own = range(_leaves_of_first(tree))
        parameters = [i in own for i in arrays]
        wanted = parameters if kernels is None else [i in kernels for i in arrays]
        closed = apart(jax.make_jaxpr(forward)(arrays), parameters, wanted)
        return cls(closed, tuple(arrays), found["outputs"], found["tree"])

    @property
    def jaxpr(self) -> Any:
        return opened(self.closed)

    def sources(self, paths: Sequence[tuple], trees: Collection[tuple] = (FIRST,)) -> list:
        """For each input of the jaxpr the parameter that it is, as a `Source`, or None.

        Args:
            paths: of all leaves of (args, kwargs).
            trees: paths of the arguments that hold parameters.
        """
        own = {i: path for i, path in enumerate(paths) if path[:2] in trees}
        names = dict(zip(own, names_in_arguments(list(own.values())), strict=True))
        pairs = zip(self.inputs, self.jaxpr.invars, strict=True)
        return [Source.of(names[i], var.aval.shape) if i in names else None for i, var in pairs]

    def rebuild(self, results: Sequence[Any]) -> Any:
        """The function's result from the outputs of its jaxpr."""
        given = iter(results)
        leaves = [next(given) if isinstance(leaf, Hole) else leaf for leaf in self.outputs]
        return jax.tree.unflatten(self.tree, leaves)


class Hole:
    """Stands for an output of a jaxpr among the leaves of a result."""


def _leaves_of_first(tree: Any) -> int:
    """How many leaves the first of (args, kwargs) has."""
    args = tree.children()[0].children()
    return args[0].num_leaves if args else 0


def traced(
    apply: Callable, variables: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[Program, list, dict[int, Any]]:
    """Traces ``apply(variables, *args, **kwargs)``; what is no array stays as it is.

    Returns:
        The program; all (path, leaf) pairs of (variables, args, kwargs), those of the variables
        first; and the number of each leaf that is an input of the jaxpr, in the order of the
        inputs, to the leaf.
    """
    check_function(apply, variables)
    leaves, tree = jax.tree_util.tree_flatten_with_path(((variables, *args), kwargs))
    program = Program.of(apply, tree, [leaf for _, leaf in leaves])
    return program, leaves, {i: leaves[i][1] for i in program.inputs}
