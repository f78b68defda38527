"""mypy over the package and over a user's program, as `make types` runs it."""

import subprocess
import sys

import pytest

from tests import counts


def test_no_type_is_wrong(tmp_path):
    pytest.importorskip("mypy", reason="needs mypy")
    command = (sys.executable, "-m", "mypy", "--cache-dir", tmp_path)
    done = subprocess.run(command, cwd=counts.ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    assert "no issues found" in done.stdout
