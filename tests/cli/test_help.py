"""What the command says of itself: exit statuses, an example of each command, completion."""

import importlib.util
import logging
import shlex
import subprocess
import sys

import pytest

from lowrank_jax import __version__
from lowrank_jax.cli import journeys
from lowrank_jax.cli.main import build_parser, main
from lowrank_jax.cli.options import EXAMPLES

LOG = logging.getLogger("lowrank_jax")


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as info:
        main([*command, "--help"])
    assert info.value.code == 0
    return capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as info:
        main(["--version"])
    assert info.value.code == 0
    assert capsys.readouterr().out == f"lowrank-jax {__version__}\n"


def test_the_help_tells_the_exit_statuses(capsys):
    text = help_of(capsys)
    assert all(f"\n  {status} " in text for status in (0, 2, 130, 143))
    assert "lowrank-jax completion bash" in text


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_help_of_a_command_tells_the_defaults_that_there_are(command, capsys):
    text = " ".join(help_of(capsys, command).split())
    assert not any(f"(default: {none})" in text for none in (None, False, []))
    assert command in ("completion", "paper") or "(default: 0)" in text  # of --seed


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_help_of_a_command_ends_with_an_example_that_parses(command, capsys):
    example = help_of(capsys, command).strip().splitlines()[-1]
    name, *given = shlex.split(example.partition(">")[0])
    assert name == "lowrank-jax" and build_parser().parse_args(given).command == command


def test_every_command_has_an_example():
    [commands] = [own for own in build_parser()._actions if own.dest == "command"]
    assert set(commands.choices) == set(EXAMPLES)


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_leaves_errors_alone(quiet, monkeypatch, tmp_path):
    monkeypatch.setattr(journeys, "_run", lambda *_: None)
    old = LOG.level
    try:
        main(["demo", "--out", str(tmp_path / "out"), *["--quiet"] * quiet])
        assert LOG.isEnabledFor(logging.INFO) != quiet and LOG.isEnabledFor(logging.ERROR)
    finally:
        LOG.setLevel(old)


@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="needs shtab")
def test_the_script_for_bash_completes_commands_and_options(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    asked = (
        'COMP_WORDS=(lowrank-jax {}); COMP_CWORD=1; _shtab_lowrank_jax; echo "${{COMPREPLY[@]}}"'
    )
    found = subprocess.run(
        ["bash", "-c", f"{script}\n{asked.format('pl')}"], capture_output=True, text=True
    )
    assert found.stdout.split() == ["plan"]


def test_without_shtab_completion_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'lowrank-jax[completion]'" in capsys.readouterr().err
