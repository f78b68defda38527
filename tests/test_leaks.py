"""Some passes of each kind of tests/leaks.py, and that a leak is seen."""

import gc
import mmap
import threading
import weakref

import pytest
import torch

import vit_fast
from tests import leaks
from tests.conftest import INTERPRETING

PASSES = 40


def _pages() -> mmap.mmap:
    """Memory of the system's and not of malloc's, which in a process of many tests has some that is free."""
    pages = mmap.mmap(-1, 1 << 18)
    pages.write(b"1" * len(pages))
    return pages


@pytest.fixture(autouse=True)
def _alone():
    """No thread beside the passes: the monitor that tqdm leaves behind has a lock more while it waits."""
    for thread in threading.enumerate():
        if type(thread).__name__ == "TMonitor":
            thread.exit()  # tqdm starts another when it needs one


def _now_and_then(kept: list) -> None:
    kept[0] += 1
    if kept[0] % 20 == 0:
        kept.append([0])


KEPT = {
    "things": lambda kept: kept.append(torch.ones(1)),
    "objects": lambda kept: kept.append([0]),
    "blocks": lambda kept: kept.extend(str(len(kept) + number) for number in range(10**6, 10**6 + 20)),
    "bytes": lambda kept: kept.append(torch.ones(1 << 10).untyped_storage()),
    "resident": lambda kept: kept.append(_pages()),
}


def test_what_is_kept_now_and_then_is_seen():
    leaks.held(lambda: None, PASSES)  # what the first passes of a process let go would hide as much
    kept = [0]
    assert "2 objects" in leaks.leaks(*leaks.held(lambda: _now_and_then(kept), PASSES))


@pytest.mark.parametrize("what", KEPT)
def test_what_is_kept_is_seen(what):
    kept = []
    found = leaks.leaks(*leaks.held(lambda: KEPT[what](kept), PASSES))
    assert any(line.endswith(f" {what}") for line in found)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.interpret] * ("interpreter" in kind)) for kind in leaks.KINDS]
)
def test_nothing_stays(kind):
    for library in ("timm", "transformers"):
        if library in kind:
            pytest.importorskip(library, reason=f"needs {library}")
    assert not leaks.leaks(*leaks.held(leaks.KINDS[kind](), 4 if INTERPRETING else PASSES))


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_an_accelerated_model_goes_with_its_last_name(library):
    """Restored or not: nothing of ours holds it or a part of it."""
    pytest.importorskip(library, reason=f"needs {library}")
    for restored in (False, True):
        model = leaks.create(library)
        parts = [weakref.ref(part) for part in (*model.modules(), *model.parameters())]
        report = vit_fast.accelerate(model)
        if restored:
            vit_fast.restore(model)
        del model
        gc.collect()
        assert any(line.replaced for line in report)
        assert not any(part() is not None for part in parts)
