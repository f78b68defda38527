"""How everything here is timed: contenders in turn, by the device's own clock, each sample long enough for it.

On a GPU the device waits while the launches of a sample queue up, so that their cost on the host is not measured, as
far as the queue holds them; of whole models it is. What is called again and again rotates through inputs that no cache
holds. Without a GPU the host's clock does, and the figures are a rehearsal's.
"""

import gc
import itertools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 9 if DEVICE == "cuda" else 3
SHORTEST = 200.0  # microseconds of a sample: below that the events' own clock shows
# Of one of a whole model: a GPU at its power limit has the clock that the load of the last tens of milliseconds left
# it, and that shall be the contender's own.
SUSTAINED = 100_000.0 if DEVICE == "cuda" else SHORTEST
CLOCKS = 2_000  # of a device in a microsecond, as many as it may run at
CACHE = 128 << 20  # bytes, more than the L2 of any GPU that the kernels run on
torch.backends.cudnn.benchmark = True  # for peers' convolutions, as timm's own benchmark has it


class _HostEvent:
    """As torch.cuda.Event, by the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "_HostEvent") -> float:
        return 1e3 * (other.at - self.at)


def events() -> tuple:
    """Two events, around what is timed."""
    return tuple(torch.cuda.Event(enable_timing=True) if DEVICE == "cuda" else _HostEvent() for _ in range(2))


def hold_the_device(us: float) -> None:
    """Have the device wait so long, so that launches queue up."""
    if DEVICE == "cuda":
        torch.cuda._sleep(int(us * CLOCKS))


def empty_memory() -> None:
    """Give the allocator's memory back, and begin to look for its peak anew."""
    if DEVICE == "cuda":
        gc.collect()  # what holds itself, as a compiled model or a caught error does, keeps its tensors until then
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def held_gb() -> float:
    """The memory that is taken now; 0 without a GPU."""
    return torch.cuda.memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0


def peak_gb() -> float:
    """The most memory that was taken since `empty_memory`; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0


def quantiles(samples: Sequence[float]) -> list[float]:
    """The 20, 50 and 80 % quantiles."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return [round(cuts[i], 3) for i in (1, 4, 7)]


def copies(nbytes: int) -> int:
    """How many sets of inputs of so many bytes make a rotation that no cache holds."""
    return min(1024, math.ceil(CACHE / max(1, nbytes))) + 1 if DEVICE == "cuda" else 2


def rotated(call: Callable, inputs: Sequence[tuple]) -> Callable[[], object]:
    """A run that calls with the next of some sets of inputs."""
    turn = itertools.cycle(inputs)
    return lambda: call(*next(turn))


def _one(run: Callable, calls: int, hold_us: float) -> float:
    """Microseconds of one of so many calls."""
    start, stop = events()
    hold_the_device(hold_us)
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop) / calls


def time_in_turn(
    runs: dict[str, Callable[[], object]],
    rounds: int = ROUNDS,
    held: bool = True,
    apart: bool = False,
    shortest: float = SHORTEST,
) -> dict[str, list[float]]:
    """Microseconds of each run, `rounds` samples each; they take turns, in reverse order every second time.

    A sample takes `shortest` at least, or 100 calls.

    What else changes on the device, its clock and its temperature, changes for all. Where the device is not `held`
    while launches queue up, what the host takes for them shows too, as it does for who runs a small batch. `apart` is
    for runs whose memory may not fit side by side: what the allocator keeps of one is given back before the next, which
    then runs once before it is timed.
    """
    calls, hold = {}, {}
    for name, run in runs.items():
        for _ in range(2):  # what is compiled or chosen at the first call is
            run()
        calls[name] = max(1, min(100, math.ceil(shortest / _one(run, 1, 0))))
        began = time.perf_counter()
        run()
        hold[name] = held * (100 + 1.5e6 * (time.perf_counter() - began) * calls[name])
    samples = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 else reversed(runs):
            if apart:
                empty_memory()
                runs[name]()
            samples[name].append(_one(runs[name], calls[name], hold[name]))
    return samples


def state_under(run: Callable[[], object]) -> dict[str, float]:
    """`device_state` while a run is made again and again, after a quarter of a second of it; nothing without a GPU."""
    if DEVICE == "cpu":
        return {}
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        asked = None
        while asked is None or not asked.done():
            run()
            torch.cuda.synchronize()
            if asked is None and time.perf_counter() - began > 0.25:
                asked = pool.submit(device_state)
    return asked.result()


def ceilings() -> dict[str, float]:
    """What this device reaches now: a bf16 product of 8192³ on random data, a copy of 2 GiB, read and written.

    "sustained_tflops" is of the same product made again and again, where a power limit lowers the clock.
    """
    side = 8192 if DEVICE == "cuda" else 256
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(8 * side * side, device=DEVICE)
    target = torch.empty_like(source)
    times = time_in_turn({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 20)
    sustained = time_in_turn({"product": lambda: a @ b}, 5, shortest=SUSTAINED)["product"]
    return {
        "matrix_tflops": round(2 * side**3 / quantiles(times["product"])[1] / 1e6, 3),
        "sustained_tflops": round(2 * side**3 / quantiles(sustained)[1] / 1e6, 3),
        "copy_tbs": round(2 * source.nbytes / quantiles(times["copy"])[1] / 1e6, 3),
    }


def ask_the_driver(*names: str) -> list[str]:
    """What NVIDIA's driver says of the GPU under these names of its own; nothing where there is none to ask."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
    if DEVICE == "cpu" or torch.version.hip:
        return []
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in said.split(",")]


def device_state() -> dict[str, float]:
    """Clock, temperature and power of the GPU now; nothing where its driver does not say all of them."""
    names = {"clock_mhz": "clocks.sm", "temperature_c": "temperature.gpu", "power_w": "power.draw"}
    try:
        return dict(zip(names, map(float, ask_the_driver(*names.values()))))
    except ValueError:
        return {}
