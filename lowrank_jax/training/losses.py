"""Losses: pure functions of what networks give, which add with weights.

A term of a loss is a function that names what it needs, of these:

- ``outputs`` of the trained network, an array (batch, ..., classes) or what else it gives.
- ``labels`` of the batch: the last thing in it.
- ``teacher``: the outputs of the teacher.
- ``layers``: for each layer that both networks have and that one network has decomposed, the pair
  of outputs (of the trained network, of the teacher).

It gives one number, the mean over the batch.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.training.labels import one_array, probabilities
from lowrank_jax.tree.kinds import is_above_zero, is_number

NEEDS = ("outputs", "labels", "teacher", "layers")
Term = Callable[..., jax.Array]
Name = Literal["cross_entropy", "distillation", "layers", "squared_error"]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A weighted sum of terms; ``0.5 * one + 2.0 * other`` is a loss, too.

    Attributes:
        terms: (name, weight, function).

    Example:
        >>> loss = cross_entropy() + 0.5 * Loss.of(lambda outputs: jnp.mean(outputs**2))
        >>> sorted(loss.needs), float(loss(outputs=jnp.zeros((2, 4)), labels=jnp.zeros(2, int)))
        (['labels', 'outputs'], 1.3862943649291992)
    """

    terms: tuple[tuple[str, float, Term], ...]

    @classmethod
    def of(cls, given: "Loss | Term | Name", name: str = "") -> "Loss":
        """A loss from its name, from a function of things that `NEEDS` names, or from a `Loss`.

        Raises:
            ValueError: there is no such loss, or the function needs something else.
        """
        if isinstance(given, Loss):
            return given
        if isinstance(given, str):
            return _by_name(given)
        if not callable(given):
            raise ValueError(f"loss={given!r:.80} is not allowed; give {_ALLOWED}.")
        unknown = set(_arguments(given)) - set(NEEDS)
        if unknown or not _arguments(given):
            raise ValueError(
                f"The loss {given!r:.80} takes {_arguments(given)}; name its arguments as some "
                f"of {NEEDS}, or call what makes a loss, as in distillation()."
            )
        return cls(((name or _name_of(given), 1.0, given),))

    def __str__(self) -> str:
        texts = [f"{weight:g} {name}{_settings(term)}" for name, weight, term in self.terms]
        return " + ".join(texts)

    @property
    def needs(self) -> set[str]:
        """Which of `NEEDS` the terms take."""
        return {name for _, _, term in self.terms for name in _arguments(term)}

    def values(self, **given: Any) -> dict[str, jax.Array]:
        """Each term by its name, in float32, without its weight.

        Raises:
            ValueError: a term is no single number.
        """
        found: dict[str, jax.Array] = {}
        for name, _, term in self.terms:
            own = {need: given[need] for need in _arguments(term)}
            found[name] = jnp.asarray(term(**own), jnp.float32)
            if found[name].ndim:
                raise ValueError(
                    f"The loss {name!r} gives an array of shape {found[name].shape}; give one "
                    "number, such as its mean over the batch."
                )
        return found

    def __call__(self, **given: Any) -> jax.Array:
        """The sum, from what the terms need by name."""
        return self.total(self.values(**given))

    def total(self, values: Mapping[str, jax.Array]) -> jax.Array:
        """The weighted sum of what `values` gives."""
        return sum(
            (weight * values[name] for name, weight, _ in self.terms), jnp.zeros((), jnp.float32)
        )

    def __add__(self, other: "Loss | Term | Name") -> "Loss":
        other = Loss.of(other)
        names = {name for name, _, _ in self.terms}
        twice = [name for name, _, _ in other.terms if name in names]
        if twice:
            raise ValueError(
                f"The loss {twice[0]!r} comes twice; add its weights, or name another function of "
                'this name, as in Loss.of(function, "name").'
            )
        return Loss(self.terms + other.terms)

    def __radd__(self, other: "Loss | Term | Name | Literal[0]") -> "Loss":
        return self if other == 0 else Loss.of(other) + self

    def __mul__(self, weight: float) -> "Loss":
        if not math.isfinite(weight):
            raise ValueError(f"The weight {weight!r} of a loss is not allowed; give a number.")
        return Loss(tuple((name, weight * own, term) for name, own, term in self.terms))

    __rmul__ = __mul__


def cross_entropy(smoothing: float = 0.0) -> Loss:
    """The cross-entropy of logits (batch, ..., classes) and labels.

    Labels are ints (batch, ...), or probabilities of the shape of the logits. An int that is no
    class makes the loss NaN.

    Args:
        smoothing: the share of each label that all classes get alike (Szegedy et al., 2015, arXiv
            1512.00567).

    Raises:
        ValueError: the smoothing is not from 0 to below 1.

    Example:
        >>> float(cross_entropy()(outputs=jnp.zeros((2, 4)), labels=jnp.array([0, 3])))
        1.3862943649291992
    """
    if not (is_number(smoothing) and 0 <= smoothing < 1):
        raise ValueError(f"smoothing={smoothing!r} is not allowed; give a share from 0 to below 1.")

    def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
        logits = _one_array(outputs)
        targets = probabilities(labels, logits.shape)
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing)).mean()

    return Loss.of(cross_entropy)


def distillation(temperature: float = 1.0) -> Loss:
    """The divergence of the trained network's probabilities from the teacher's.

    The mean over the batch of T^2 KL(softmax(t / T) || softmax(y / T)) for logits t of the teacher
    and y of the network (Hinton et al., 2015, arXiv 1503.02531). No label is needed.

    Args:
        temperature: T, by which the logits are divided.

    Raises:
        ValueError: the temperature is not above 0.

    Example:
        >>> y = jnp.array([[0.0, 1.0]])
        >>> float(distillation(4.0)(outputs=y, teacher=y))
        0.0
    """
    if not is_above_zero(temperature):
        raise ValueError(f"temperature={temperature!r} is not allowed; give a number above 0.")

    def distillation(outputs: jax.Array, teacher: jax.Array) -> jax.Array:
        own = jax.nn.log_softmax(_one_array(outputs) / temperature)
        target = jax.nn.log_softmax(_one_array(teacher) / temperature)
        divergence = optax.losses.kl_divergence_with_log_targets(own, target)
        return temperature**2 * divergence.mean()

    return Loss.of(distillation)


def taught(share: float, temperature: float, smoothing: float = 0.0) -> Loss:
    """The teacher's probabilities with a weight from 0 to 1, the labels with the rest.

    Args:
        share: weight of `distillation`; at 1 no label is needed, at 0 no teacher.
        temperature: of the probabilities.
        smoothing: of the labels, as in `cross_entropy`.

    Example:
        >>> str(taught(0.75, 4.0))
        '0.75 distillation(temperature=4) + 0.25 cross_entropy(smoothing=0)'
        >>> sorted(taught(1.0, 4.0).needs)
        ['outputs', 'teacher']
    """
    if not (is_number(share) and 0 <= share <= 1):
        raise ValueError(f"share={share!r} is not allowed; give a weight from 0 to 1.")
    if share in (0, 1):
        return distillation(temperature) if share else cross_entropy(smoothing)
    return share * distillation(temperature) + (1 - share) * cross_entropy(smoothing)


def layer_matching() -> Loss:
    """The squared error of each decomposed layer's outputs, over the square of the teacher's.

    The mean over the layers of |y - t|^2 / |t|^2 (Romero et al., 2014, arXiv 1412.6550, with the
    layer's own outputs as hints). No label is needed.

    Example:
        >>> t = jnp.ones((2, 3))
        >>> float(layer_matching()(layers={"conv": (2 * t, t)}))
        1.0
    """

    def layers(layers: Mapping[Any, tuple[jax.Array, jax.Array]]) -> jax.Array:
        errors = [_relative_error(*pair) for pair in layers.values()]
        return jnp.stack(errors).mean()

    return Loss.of(layers)


def squared_error() -> Loss:
    """The mean of the squared difference of outputs and labels of one shape.

    Raises:
        ValueError: when called, for labels of another shape, of which each would meet each output.

    Example:
        >>> float(squared_error()(outputs=jnp.ones((2, 3)), labels=jnp.zeros((2, 3))))
        1.0
    """

    def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
        found, labels = _one_array(outputs), one_array(labels)
        if found.shape != labels.shape:
            raise ValueError(
                f"Labels of shape {labels.shape} are not allowed for outputs of shape "
                f"{found.shape}; give both in one shape."
            )
        return jnp.mean((found - labels) ** 2)

    return Loss.of(squared_error)


LOSSES: dict[str, Callable[[], Loss]] = {
    "cross_entropy": cross_entropy,
    "distillation": distillation,
    "layers": layer_matching,
    "squared_error": squared_error,
}
_ALLOWED = f"one of {get_args(Name)}, a Loss, or a function of some of {NEEDS}"


def _by_name(name: str) -> Loss:
    if name not in LOSSES:
        raise ValueError(f"loss={name!r} is not allowed; give {_ALLOWED}.")
    return LOSSES[name]()


def _settings(term: Term) -> str:
    """The numbers that a function has of the function around it, as in "(temperature=4)"."""
    known = inspect.getclosurevars(term).nonlocals if inspect.isfunction(term) else {}
    texts = [f"{name}={own:g}" for name, own in known.items() if isinstance(own, int | float)]
    return f"({', '.join(texts)})" if texts else ""


def _arguments(term: Term) -> tuple[str, ...]:
    """What a term takes; arguments of other names may keep the values that they have."""
    given = inspect.signature(term).parameters.values()
    return tuple(own.name for own in given if own.name in NEEDS or own.default is own.empty)


def _name_of(term: Term) -> str:
    while isinstance(term, functools.partial):
        term = term.func
    return getattr(term, "__name__", "loss")


def _one_array(outputs: Any) -> jax.Array:
    """The outputs of a network in float32, if they are one array."""
    if not hasattr(outputs, "astype"):
        many = f"{type(outputs).__name__} of {len(jax.tree.leaves(outputs))} arrays"
        raise ValueError(
            f"The network gives a {many}, and this loss takes one array. Give a loss of your own, "
            "such as lambda outputs, labels: optax.softmax_cross_entropy_with_integer_labels("
            "outputs[0], labels).mean()."
        )
    return outputs.astype(jnp.float32)


def _relative_error(y: jax.Array, t: jax.Array) -> jax.Array:
    y, t = y.astype(jnp.float32), t.astype(jnp.float32)
    return jnp.sum((y - t) ** 2) / (jnp.sum(t**2) + jnp.finfo(jnp.float32).tiny)
