"""Some passes of each kind of tests/leaks.py, and that a leak is seen."""

import pytest
import torch

from tests import leaks
from tests.conftest import INTERPRETING

PASSES = 40


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.interpret] * ("interpreter" in kind)) for kind in leaks.KINDS]
)
def test_nothing_stays(kind):
    if "transformers" in kind:
        pytest.importorskip("transformers", reason="needs transformers")
    things, memory = leaks.grown(leaks.KINDS[kind](), 4 if INTERPRETING else PASSES)
    assert things <= 0
    assert memory <= leaks.MAY_GROW


def test_a_tensor_that_is_kept_is_seen():
    kept = []
    things, memory = leaks.grown(lambda: kept.append(torch.ones(1 << 16)), PASSES)
    assert things == PASSES
    assert memory > PASSES / 4 - 1
