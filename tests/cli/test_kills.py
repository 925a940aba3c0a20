"""The commands `demo`, `compress` and `cifar10`, killed while they write: never half a report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("killed_commands.py")
SECONDS = {"demo": 2, "cifar10": 2, "compress": 1}  # the longest before a kill: two runs, about


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
@pytest.mark.parametrize("command", SECONDS)
def test_kills_at_random_moments_leave_one_whole_report_and_the_next_run_works(command, tmp_path):
    given = [sys.executable, str(DRIVER), command, str(tmp_path), "17", str(SECONDS[command])]
    done = subprocess.run(given, stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found == [{"killed": True, "whole": True, "beside": []}] * 17
