import os
import subprocess
import sys

import pytest

from tests import readme
from tests.__main__ import PART
from vit_fast import ops


@pytest.mark.interpret
def test_every_op_has_its_line():
    page = readme.README.read_text()
    assert [op for op in ops.__all__ if f"| `{op}` | forward" not in page] == ["use_backend"]


@pytest.mark.interpret
def test_the_page_is_what_the_tests_and_the_counts_give():
    """In a process of its own, of all tests: the page is made by a collection, of which this process has a part."""
    environment = {name: value for name, value in os.environ.items() if name != PART}
    command = [sys.executable, "-m", "tests.readme", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
