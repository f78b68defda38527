import pytest
import torch

import benchmarks  # noqa: F401 - finds kernels/ in a clone that was not installed


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device, and torch sees none")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(skip)
