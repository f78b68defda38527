"""`python -m tests [--slow] [pytest's arguments]`: the pytest processes of `make test`, two at a time.

Triton reads TRITON_INTERPRET when it is imported, so what runs in its interpreter needs processes of its own: tests/ops
in one beside everything that needs no interpreter, the others in one behind that, which makes two cores about equally
busy. What the first has printed follows when the second is done.
"""

import os
import subprocess
import sys
import tempfile
import time

PART = "VIT_FAST_TESTS"  # "ops" or "others": which of the interpreted tests tests/conftest.py leaves
NO_TESTS = 5  # pytest's exit status where nothing was selected


def command(marker: str, arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", marker, *arguments]


def main(arguments: list[str]) -> int:
    speed = "" if "--slow" in arguments else " and not slow"
    arguments = [argument for argument in arguments if argument != "--slow"]
    # One thread each: two processes share what may be two cores, and most tests are small.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    interpreting = {**environment, "TRITON_INTERPRET": "1"}
    environment.pop("TRITON_INTERPRET", None)

    def interpreted(part: str) -> dict:
        cache = ["-o", f"cache_dir=.pytest_cache/{part}"]
        return {"args": command(f"interpret{speed}", [*arguments, *cache]), "env": {**interpreting, PART: part}}

    with tempfile.TemporaryFile() as output:
        kernels = subprocess.Popen(**interpreted("ops"), stdout=output, stderr=subprocess.STDOUT)
        try:
            print("everything but the interpreted kernels, of which a second process runs tests/ops:", flush=True)
            plain = subprocess.run(command(f"not interpret{speed}", arguments), env=environment).returncode
            print("\nwhat else runs in Triton's interpreter:", flush=True)
            others = subprocess.run(**interpreted("others")).returncode
            print("\ntests/ops in Triton's interpreter:", flush=True)
            output_read = 0
            while True:
                done = kernels.poll() is not None
                text = os.pread(output.fileno(), 1 << 20, output_read)
                output_read += len(text)
                sys.stdout.buffer.write(text)
                sys.stdout.flush()
                if done and not text:
                    break
                time.sleep(0 if text else 0.2)
        finally:
            kernels.terminate()
            kernels.wait()
    codes = {plain, others, kernels.returncode}
    if arguments and NO_TESTS in codes:  # a chosen file may have tests of one kind only
        codes.discard(NO_TESTS)
        codes = codes or {NO_TESTS}
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
