import pytest
import torch

import benchmarks  # noqa: F401 - finds kernels/ in a clone that was not installed


def captured_in_a_graph(run):
    """The graph of a run, its results, which are zeros until it is replayed, and what the run gave before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for result in captured:
        result.zero_()
    return graph, captured, expected


def assert_the_same_bits_again(run, expected, times: int = 1):
    for _ in range(times):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(), expected))


def assert_every_element_is_written(run):
    """Memory that held other numbers before changes no bit."""
    expected = run()
    noise = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(16)]
    del noise
    assert_the_same_bits_again(run, expected)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device, and torch sees none")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(skip)
