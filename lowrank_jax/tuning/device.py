"""The machine on which times are measured."""

import dataclasses
import functools
import platform
from pathlib import Path

import flax
import jax
import jaxlib

from lowrank_jax.factorization.parallel import available_cores


@dataclasses.dataclass(frozen=True)
class Device:
    """What measured times and the fastest algorithms depend on, besides the program.

    Attributes:
        kind: of the accelerator, as JAX names it; "cpu" without one.
        cpu: model of the processor.
        cores: that this process may run on.
        jaxlib, jax: versions.

    Example:
        >>> here = Device.here()
        >>> here.jax == jax.__version__ and here.differences(here) == []
        True
    """

    kind: str
    cpu: str
    cores: int
    jaxlib: str
    jax: str

    @classmethod
    def here(cls) -> "Device":
        """This machine, with JAX's default device."""
        kind = jax.devices()[0].device_kind
        return cls(kind, _cpu(), available_cores(), jaxlib.__version__, jax.__version__)

    def differences(self, other: "Device") -> list[str]:
        """What makes times of this device say little about another one, in words.

        The processor and its cores count only where the network runs on it.
        """
        names = [field.name for field in dataclasses.fields(self)]
        if self.kind == other.kind != "cpu":
            names = [name for name in names if name not in ("cpu", "cores")]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return [f"{name} {one}, not {two}" for name, (one, two) in pairs.items() if one != two]


def machine() -> str:
    """The device and the versions that figures depend on, in words."""
    device = jax.devices()[0]
    kind = _cpu() if device.platform == "cpu" else device.device_kind
    versions = f"jax {jax.__version__}, flax {flax.__version__}, Python {platform.python_version()}"
    return f"{device.platform} ({kind}, {available_cores()} CPU cores), {versions}"


@functools.cache
def _cpu() -> str:
    """Model of the processor; of Linux, which says so in a file, more exactly."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
