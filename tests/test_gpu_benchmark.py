"""The steps of a GPU's day, rehearsed on a CPU at tiny shapes: that they run to the end, not what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the steps count its launches")
pytest.importorskip("timm", reason="what models are compared with")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: python -m benchmarks.gpu OUT")


def test_the_steps_run_to_the_end(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "kernels", "ops", "models"]
    command += ["--no-compile", "--batch-size", "2", "--workers", "1", "--minutes", "4"]
    environment = os.environ | {"VIT_FAST_BACKEND": "torch"}
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    for step in ("kernels", "ops", "models"):
        assert f"{step} ended with 0" in done.stdout, done.stdout + done.stderr
        written = json.loads((tmp_path / f"{step}.json").read_text())
        assert written["device"] == "rehearsal", "no figure of a rehearsal counts"
        assert written["results"]
        assert written["ceilings"].keys() == {"matrix_tflops", "copy_tbs"}
