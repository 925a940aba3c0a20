"""Long work says how far it is: a bar on a screen, lines of the log elsewhere, or nothing."""

import logging

import pytest

from lowrank_jax.io import progress
from lowrank_jax.io.progress import Progress

LOG = logging.getLogger("lowrank_jax")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass with each look at the clock."""
    now = [0.0]

    def passed():
        now[0] += 6
        return now[0]

    monkeypatch.setattr(progress.time, "monotonic", passed)


@pytest.fixture
def level():
    """Sets the level of the logger, and sets it back."""
    old = LOG.level
    yield LOG.setLevel
    LOG.setLevel(old)


def test_without_a_screen_there_is_a_line_every_few_seconds(clock, level, caplog):
    level(logging.INFO)
    with Progress("fitting", total=4) as own:
        list(own.over(range(4)))
    assert caplog.messages == [
        "fitting: 2 of 4 in 00:12, about 00:12 left",
        "fitting: 4 of 4 in 00:24, about 00:00 left",
    ]


def test_steps_that_were_done_before_do_not_shorten_the_rest(clock, level, caplog):
    level(logging.INFO)
    with Progress("training", total=14, done=10) as own:
        own.note("loss 3")
        list(own.over(range(3)))
    assert caplog.messages == [  # the first step, with its compilation, tells nothing of the rest
        "training: 11 of 14 in 00:12, loss 3",
        "training: 13 of 14 in 00:24, about 00:06 left, loss 3",
    ]


def test_steps_that_are_not_known_are_counted(clock, level, caplog):
    level(logging.INFO)
    list(Progress("calibrating").over(range(2)))
    assert caplog.messages == ["calibrating: 2 in 00:12"]


@pytest.mark.parametrize("shown", [logging.WARNING, logging.ERROR])
def test_on_a_terminal_there_is_a_bar_unless_all_is_silent(shown, level, monkeypatch, capsys):
    level(shown)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "DELAY", 0)
    with Progress("fitting", total=2) as own:
        own.update()
        own.extend(3)
        own.note("best so far")
    error = capsys.readouterr().err
    assert ("fitting" in error and "best so far" in error) == (shown == logging.WARNING)


def test_short_work_shows_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("fitting", total=2) as own:
        own.update()
        own.note("best so far")
    assert not capsys.readouterr().err


def test_without_a_screen_and_a_level_nothing_is_said(clock, caplog, capsys):
    caplog.set_level(logging.WARNING, "lowrank_jax")  # a command in this process leaves its own
    list(Progress("fitting", total=4).over(range(4)))
    assert not caplog.messages and not capsys.readouterr().err
