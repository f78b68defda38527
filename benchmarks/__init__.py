"""What vit_fast and its peers cost, side by side: `pytest benchmarks/`, and scripts, `python -m benchmarks.NAME`."""

import importlib.util
import pathlib

import vit_fast

if importlib.util.find_spec("vit_fast.kernels") is None:
    # A clone that was not installed, as on a GPU machine that one may not install on: kernels/ lies beside the package.
    vit_fast.__path__.append(str(pathlib.Path(__file__).parent.parent))
