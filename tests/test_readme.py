import subprocess
import sys

import pytest


@pytest.mark.interpret
def test_the_page_is_what_the_tests_and_the_counts_give():
    """In a process of its own: the page is made by a collection of the tests, which this one is part of."""
    done = subprocess.run([sys.executable, "-m", "tests.readme", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
