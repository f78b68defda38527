"""Makes torchvision, and timm on it, import beside a CPU build of torch; benchmarks use it too."""

import importlib.util
import sys
import types


def mend() -> None:
    """Where torchvision registers fake kernels for operators that it does not have, import it without them.

    Its models, and timm's use of it, need none of them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
