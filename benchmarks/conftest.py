"""`pytest benchmarks/`: pytest-benchmark's selection, groups, tables and JSON; the measuring is ours.

pytest-benchmark times one test after another, and a device changes its clock meanwhile. So a case is measured once,
all of its chosen contenders in turn, and each contender's test replays its own samples under a clock that stands still
between them.

--set small   tiny shapes (without a GPU)    main   ViT-B, L and H at batch 256 (on a GPU)    full   all of them
"""

import collections
import functools

import pytest
import torch

import vit_fast
from benchmarks import contenders, records, timing, whole_models

SETS = ("small", "main", "full")


def pytest_addoption(parser):
    parser.addoption("--set", choices=SETS, default="main" if timing.DEVICE == "cuda" else "small")


def pytest_generate_tests(metafunc):
    which = metafunc.config.getoption("--set")
    if metafunc.function.__name__ == "test_op":
        found = [
            pytest.param(case, direction, name, id=f"{case}-{direction}-{name.replace(' ', '-')}")
            for case in contenders.cases_of(which)
            for direction in ("forward", "both")
            for name in contenders.names(case.op)
        ]
    elif metafunc.function.__name__ == "test_model":
        found = [
            pytest.param(case, name, id=f"{case}-{name.replace(' ', '-')}")
            for case in whole_models.cases(which)
            for name in whole_models.names(case)
        ]
    else:
        return
    metafunc.parametrize([name for name in ("case", "direction", "contender") if name in metafunc.fixturenames], found)


@pytest.fixture(scope="session")
def measured(request):
    """case → what became of its contenders, those that this session chose; measured when it is first asked for."""
    chosen = collections.defaultdict(dict)
    for item in request.session.items:
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if parameters and "contender" in parameters:
            chosen[parameters["case"]][parameters["contender"]] = None

    @functools.cache
    def of(case):
        measure = contenders.measure if isinstance(case, contenders.Case) else whole_models.measure
        found = measure(case, list(chosen[case]))
        timing.empty_memory()
        return found

    return of


class VirtualClock:
    """A clock for pytest-benchmark that advances by the next sample when a round runs, and by nothing else."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark, seconds: list[float]) -> None:
        samples = iter(seconds)

        def advance():
            self.now += next(samples)

        self.now = 0.0  # a small number is added without loss
        benchmark.pedantic(advance, rounds=len(seconds), iterations=1)


CLOCK = VirtualClock()


def pytest_benchmark_update_machine_info(config, machine_info):
    if timing.DEVICE == "cuda":
        machine_info["device"] = torch.cuda.get_device_name()
        machine_info["device_state"] = timing.device_state()
        machine_info["ceilings"] = timing.ceilings()
    else:
        machine_info["device"] = f"{records.cpu_name()}: a rehearsal"
    machine_info["versions"] = {
        **{name: version for name in records.PACKAGES if (version := records.version(name))},
        "vit-fast": vit_fast.__version__,  # also in a clone that was not installed
    }
