"""Whole models against every peer, inference and training steps: `pytest benchmarks/bench_models.py -k training`."""

import statistics

import pytest

from benchmarks import whole_models
from benchmarks.conftest import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_model(benchmark, measured, case, contender):
    found = measured(case)[contender]
    if found.left_out:
        pytest.skip(found.left_out)
    assert not found.wrong, found.wrong
    benchmark.group = str(case)
    rates = whole_models.rates(case, statistics.median(found.us))
    benchmark.extra_info |= {"error": found.error, **found.facts, **rates}
    CLOCK.replay(benchmark, [us / 1e6 for us in found.us])
