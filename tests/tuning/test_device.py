"""The machine on which times were measured."""

import dataclasses

import jax
import jaxlib
import pytest

from lowrank_jax.tuning import device
from lowrank_jax.tuning.device import Device

GPU = Device("NVIDIA H100 80GB HBM3", "a processor", 16, "0.10.2", "0.10.2")
CPU = dataclasses.replace(GPU, kind="cpu")


def test_this_machine_is_described():
    here = Device.here()
    assert here.kind == jax.devices()[0].device_kind and here.cpu and here.cores >= 1
    assert (here.jax, here.jaxlib) == (jax.__version__, jaxlib.__version__)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Device)])
def test_every_difference_of_a_cpu_is_named(field):
    other = dataclasses.replace(CPU, **{field: 3 if field == "cores" else "other"})
    (text,) = CPU.differences(other)
    assert text == f"{field} {getattr(CPU, field)}, not {getattr(other, field)}"


def test_the_processor_beside_an_accelerator_makes_no_difference():
    assert GPU.differences(dataclasses.replace(GPU, cpu="other", cores=2)) == []
    assert len(GPU.differences(CPU)) == 1


def test_without_a_file_of_the_system_python_names_the_processor(monkeypatch):
    class Missing:
        def __init__(self, path):
            pass

        def read_text(self):
            raise OSError

    monkeypatch.setattr(device, "Path", Missing)
    monkeypatch.setattr(device.platform, "processor", lambda: "arm")
    assert device._cpu.__wrapped__() == "arm"
    monkeypatch.setattr(device.platform, "processor", lambda: "")
    assert device._cpu.__wrapped__() == device.platform.machine()
