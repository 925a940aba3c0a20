"""Metrics: lines that outlive a kill, and TensorBoard where a writer is installed."""

import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.training.metrics import FILE, Metrics, read_metrics


def test_what_a_stopped_run_wrote_after_its_checkpoint_is_written_anew(tmp_path):
    first = Metrics(tmp_path)
    for step in (10, 20, 30):
        first.write(step, {"loss": 1 / step})
    again = Metrics(tmp_path, step=20)
    again.write(30, {"loss": 0.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (10, 0.1),
        (20, 0.05),
        (30, 0.0),
    ]


@given(st.integers(0, 200))
def test_a_line_that_was_cut_short_is_left_out(tmp_path_factory, end):
    folder = tmp_path_factory.mktemp("run")
    metrics = Metrics(folder)
    for step in range(1, 6):
        metrics.write(step, {"loss": step / 8})
    text = (folder / FILE).read_text()
    (folder / FILE).write_text(text[:end])
    whole = text[:end].count("\n") + (end < len(text) and text[end] == "\n")
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, min(whole, 5) + 1))


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b'{"step": "x"}', b'{"step": null}', b"[1]", b'{"loss": 1}', b"\x00{"]
)
def test_a_damaged_line_is_left_out_and_the_run_goes_on(tmp_path, line):
    whole = b'{"step": 1, "loss": 0.5}\n'
    (tmp_path / FILE).write_bytes(whole + line + b"\n" + whole)
    Metrics(tmp_path, step=1)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}] * 2


def fake(monkeypatch, name, writer):
    """A module of a writer that is not installed here."""
    for part in (name.split(".")[0], name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].SummaryWriter = writer  # type: ignore[attr-defined]


class Writer:
    """Takes what both writers take."""

    written: list = []  # noqa: RUF012

    def __init__(self, folder):
        self.written.clear()

    def add_scalar(self, name, value, step):
        self.written.append((step, name, value))

    def write_scalars(self, step, values):
        self.written.extend((step, name, value) for name, value in values.items())

    def flush(self):
        pass


def test_tensorboard_gets_what_the_file_gets(tmp_path, monkeypatch):
    for name, other in (("tensorboardX", "clu"), ("clu.metric_writers", "tensorboardX")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, other, None)
            fake(patch, name, Writer)
            Metrics(tmp_path).write(5, {"loss": 0.5})
        assert Writer.written == [(5, "loss", 0.5)]
