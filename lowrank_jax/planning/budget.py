"""What a network may cost."""

import dataclasses
import math
import numbers
from typing import Any

from lowrank_jax.tree.kinds import is_int

MEASURES = ("parameters", "macs", "bytes", "latency")


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit on the cost of a whole network.

    Attributes:
        measure: "parameters"; "macs", multiply-accumulate operations; "bytes", moved by the
            convolutions and products, each array once; or "latency", seconds, of the layers that
            were measured.
        amount: a float above 0 and up to 1 is a share of the dense network's cost; an int is
            absolute.

    Raises:
        ValueError: the measure or the amount is not one of these.

    Example:
        >>> Budget("macs", 0.5).limit(1000)
        500
        >>> print(Budget("parameters", 300_000))
        at most 300,000 parameters
    """

    measure: str
    amount: int | float

    def __post_init__(self) -> None:
        check_measure(self.measure)
        amount: Any = self.amount
        if getattr(amount, "shape", None) == ():  # a number of NumPy or JAX
            amount = amount.item()
        if _is_share(amount):
            object.__setattr__(self, "amount", float(amount))
        elif _is_count(amount) and self.measure != "latency":
            object.__setattr__(self, "amount", int(amount))
        else:
            count = "" if self.measure == "latency" else ", or an int of 1 or more for a count"
            raise ValueError(
                f"Budget of {self.measure}: {amount!r} is not allowed; give a float above 0 and "
                f"up to 1 for a share of the dense network{count}."
            )

    def limit(self, dense: float) -> float:
        """The largest cost that is allowed to a network that costs this much dense."""
        if isinstance(self.amount, int):
            return self.amount
        limit = self.amount * dense * (1 + 1e-12)  # 0.29 of 100 is 29
        return limit if self.measure == "latency" else math.floor(limit)

    def __str__(self) -> str:
        if isinstance(self.amount, int):
            return f"at most {self.amount:,} {self.measure}"
        return f"at most {self.amount:.4g} of the dense {self.measure}"


def _is_share(amount: Any) -> bool:
    real = isinstance(amount, numbers.Real) and not isinstance(amount, numbers.Integral)
    return real and 0 < amount <= 1


def _is_count(amount: Any) -> bool:
    return is_int(amount) and amount >= 1


def number(cost: float) -> str:
    """A cost as text: counts in full, seconds to three digits.

    Example:
        >>> number(1234567), number(0.0123456)
        ('1,234,567', '0.0123')
    """
    return f"{cost:,}" if isinstance(cost, int) else f"{cost:.3g}"


def check_measure(measure: str) -> str:
    """The measure, or a ValueError that lists those there are.

    Example:
        >>> check_measure("macs")
        'macs'
    """
    if measure not in MEASURES:
        known = ", ".join(map(repr, MEASURES))
        raise ValueError(f"The measure {measure!r} is not known; give one of {known}.")
    return measure


def check_budget(budget: Budget) -> Budget:
    """The budget, or a ValueError if it is something else.

    Example:
        >>> check_budget(Budget("bytes", 0.5)).measure
        'bytes'
    """
    if not isinstance(budget, Budget):
        raise ValueError(
            f"The budget {budget!r} is not allowed; give one such as Budget('macs', 0.5)."
        )
    return budget
