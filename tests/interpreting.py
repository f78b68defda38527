"""Programs of the tests that run kernels, in Triton's interpreter."""

import os
import sys


def started_interpreting(module: str) -> None:
    """Start the program again where TRITON_INTERPRET is not 1: Triton reads it when it is imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execvpe(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})


def mended_on_one_thread() -> None:
    """Mend the interpreter; one thread, for most tests are small."""
    import torch

    from tests.mend_interpreter import mend

    mend()
    torch.set_num_threads(1)
