"""`python -m tests [--slow] [pytest's arguments]`: the two pytest processes of `make test`, side by side.

Triton reads TRITON_INTERPRET when it is imported, so what runs in its interpreter needs a process of its own. The
first process prints as it goes; what the second has printed follows when the first is done.
"""

import os
import subprocess
import sys
import tempfile
import time

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
    with tempfile.TemporaryFile() as output:
        kernels = subprocess.Popen(
            command(f"interpret{speed}", [*arguments, "-o", "cache_dir=.pytest_cache/interpret"]),
            env=interpreting,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            print("everything but the interpreted kernels, which run in a second process meanwhile:", flush=True)
            plain = subprocess.run(command(f"not interpret{speed}", arguments), env=environment).returncode
            print("\nthe kernels in Triton's interpreter:", flush=True)
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
    codes = {plain, kernels.returncode}
    if arguments and NO_TESTS in codes:  # a chosen file may have tests of one kind only
        codes.discard(NO_TESTS)
        codes = codes or {NO_TESTS}
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
