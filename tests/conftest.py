import os
import sys
import types

import pytest
import torch

from tests.guard import poisoned_empty

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # Beside a CPU build of torch, torchvision registers fake kernels for operators that it does not have. Its models,
    # and timm's use of it, need none of them.
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
except ImportError:
    pass

if INTERPRETING:
    from tests.mend_interpreter import mend

    mend()


def pytest_collection_modifyitems(items):
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
    """Kernels allocate through torch.empty: give them poisoned memory that ends at a page no one may touch."""
    monkeypatch.setattr(torch, "empty", poisoned_empty)
