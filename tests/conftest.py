import os

import pytest
import torch

from tests import mend_torchvision
from tests.guard import poisoned_empty, poisoned_empty_like

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

mend_torchvision.mend()

if INTERPRETING:
    from tests.mend_interpreter import mend

    mend()


def pytest_collection_modifyitems(config, items):
    part = os.environ.get("VIT_FAST_TESTS")
    if part:
        here = [item for item in items if (item.path.parent.name == "ops") == (part == "ops")]
        config.hook.pytest_deselected(items=list(set(items) - set(here)))
        items[:] = here
    skip = pytest.mark.skip(reason="runs in Triton's interpreter: start pytest with TRITON_INTERPRET=1")
    for item in items:
        if item.get_closest_marker("interpret") and not INTERPRETING:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed(request):
    """Fresh numbers for every test, the same at every run of it: a failure can be run again."""
    torch.manual_seed(sum(map(ord, request.node.nodeid)))


@pytest.fixture
def guarded_memory(monkeypatch):
    """Kernels allocate through torch.empty and its like: give them poisoned memory up to a page no one may touch."""
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(torch, "empty_like", poisoned_empty_like)
