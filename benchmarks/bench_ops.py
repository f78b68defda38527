"""Each op against every peer: `pytest benchmarks/bench_ops.py -k "attention and bf16 and not compiled"`."""

import pytest

from benchmarks.conftest import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark, measured, case, direction, contender):
    found = measured(case)[contender]
    if found.left_out:
        pytest.skip(found.left_out)
    assert not found.wrong, found.wrong
    benchmark.group = f"{case}-{direction}"
    benchmark.extra_info["error"] = found.error
    CLOCK.replay(benchmark, [us / 1e6 for us in found.us[direction]])
