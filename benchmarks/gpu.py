"""A GPU, checked and measured: what one call on a machine with one can tell, a step at a time.

python -m benchmarks.gpu OUT [STEP …] [--minutes 9] [--workers N] [--batch-size 256]

tests      tests/gpu
kernels    each launch of a ViT-B, L and H's block, inference and training step
ops        each op against PyTorch's own, at the shapes of these models; products against cuBLAS, attention against SDPA
models     whole models against timm: eager, in a CUDA graph, compiled

Each step is a process of its own, and writes OUT/STEP.json when it ends: what is cut or fails costs no other step.
What they launch, and timm's compiled models, is compiled by half of the cores while the tests run. Times are of the
device's own clock, contenders in turn (training steps one after the other, for memory's sake), on random data;
quantiles are 20, 50 and 80 %.

Without a GPU all of it is rehearsed at tiny shapes, in PyTorch and by the host's clock: no figure of that counts.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.jit import JITFunction

import vit_fast
from benchmarks.header import commit
from benchmarks.launches import kernel_name
from vit_fast import ops

REHEARSAL = not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"
MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")
if REHEARSAL:
    MODELS = ("vit_tiny_patch16_224",)
STEPS = ("tests", "kernels", "ops", "models")
SLEEP = 40_000_000  # clocks for which the device waits while launches queue up: their cost on the host is not measured
ROUNDS = 2 if REHEARSAL else 9


# ---- clocks --------------------------------------------------------------------------------------------------------


class HostEvent:
    """As torch.cuda.Event, by the host's clock."""

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def events() -> tuple:
    return tuple(HostEvent() if REHEARSAL else torch.cuda.Event(enable_timing=True) for _ in range(2))


def hold_the_device(clocks: int) -> None:
    """Have the device wait, so that launches queue up: their cost on the host is not measured."""
    if not REHEARSAL:
        torch.cuda._sleep(clocks)


def empty_memory() -> None:
    if not REHEARSAL:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def quantiles(samples: list[float]) -> list[float]:
    """The 20, 50 and 80 % quantiles."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return [round(cuts[i], 3) for i in (1, 4, 7)]


def time_in_turn(runs: dict[str, Callable], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Microseconds of each run, `rounds` samples each, the runs in turn."""
    for run in runs.values():
        for _ in range(2):
            run()
    samples = {name: [] for name in runs}
    for number in range(rounds):
        order = list(runs) if number % 2 else list(reversed(runs))
        for name in order:
            start, stop = events()
            hold_the_device(SLEEP // 10)
            start.record()
            runs[name]()
            stop.record()
            stop.synchronize()
            samples[name].append(1e3 * start.elapsed_time(stop))
    return samples


@contextlib.contextmanager
def launch_clock():
    """A list that grows by (kernel, start, stop) of each Triton launch in the block, events of the device."""
    run, found = JITFunction.run, []

    def timed(self, *args, **kwargs):
        start, stop = events()
        start.record()
        result = run(self, *args, **kwargs)
        stop.record()
        found.append((kernel_name(self), start, stop))
        return result

    JITFunction.run = timed
    try:
        yield found
    finally:
        JITFunction.run = run


# ---- steps ---------------------------------------------------------------------------------------------------------


def new_model(name: str, training: bool = False, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return vit_fast.create_model(name, num_classes=1000, **options).to(torch.bfloat16).train(training)


def pass_of(model: torch.nn.Module, batch: int, training: bool) -> Callable:
    """A run of inference, or of a training step without its optimiser."""
    images = torch.randn(batch, 3, 224, 224, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.randint(1000, (batch,), device=DEVICE)

    def infer():
        with torch.inference_mode():
            return model(images)

    def step():
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images).float(), labels).backward()

    return step if training else infer


def kernels(batch: int, rounds: int = ROUNDS) -> list[dict]:
    """Microseconds of each launch of models of depth 2, in their order."""
    lines = []
    for name, training in itertools.product(MODELS, (False, True)):
        run = pass_of(new_model(name, training, depth=2), batch, training)
        for _ in range(2):
            run()
        passes = []
        for _ in range(rounds):
            hold_the_device(SLEEP)
            with launch_clock() as found:
                run()
            for _, _, stop in found:
                stop.synchronize()
            passes.append([(kernel, 1e3 * start.elapsed_time(stop)) for kernel, start, stop in found])
        whole = time_in_turn({"all": run}, rounds)["all"]
        lines.append(
            {
                "model": name,
                "training": training,
                "batch": batch,
                "us": statistics.median(whole),
                "launches": [[one[0][0], *quantiles([us for _, us in one])] for one in zip(*passes)],
            }
        )
        print(name, training, round(lines[-1]["us"]), "us, in kernels", round(sum(x[2] for x in lines[-1]["launches"])))
    return lines


def _op_cases(B: int, T: int, D: int, H: int, hidden: int, patch: int) -> dict[str, tuple]:
    """op → (ours and its peers by name, tensors): each contender takes the tensors."""

    def draw(*shape):
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    def weight(n, k):
        return draw(n, k) / k**0.5

    def sdpa(qkv, backend):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)

    def norm(x, g, b):
        return F.layer_norm(x, (D,), g, b, 1e-6)

    backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
    backends["sdpa efficient"] = SDPBackend.EFFICIENT_ATTENTION
    x, o, vectors = draw(B, T, D), draw(B, T, D), [draw(D) for _ in range(3)]
    w, b = weight(3 * D, D), draw(3 * D)
    w1, b1, w2, b2 = weight(hidden, D), draw(hidden), weight(D, hidden), draw(D)
    wp, side = weight(D, 3 * patch * patch).view(D, 3, patch, patch), 224 // patch
    images = draw(B, 3, 224, 224)
    tables = draw(D), draw(side * side + 1, D), draw(1, D)
    a = draw(B, T, hidden)
    return {
        "ln_linear": (
            {
                "vit_fast": ops.ln_linear,
                "eager": lambda x, g, c, w, b: F.linear(norm(x, g, c), w, b),
                "cublas": lambda x, g, c, w, b: F.linear(x, w, b),
            },
            (x, *vectors[:2], w, b),
        ),
        "attention": (
            {
                "vit_fast": ops.attention_qkv,
                **{name: functools.partial(sdpa, backend=backend) for name, backend in backends.items()},
            },
            (draw(B, T, 3, H, D // H),),
        ),
        "projection": (
            {
                "vit_fast": ops.linear_residual,
                "eager": lambda o, w, b, x: x + F.linear(o, w, b),
                "cublas": lambda o, w, b, x: F.linear(o, w, b),
            },
            (o, weight(D, D), draw(D), x),
        ),
        "fc2": (
            {
                "vit_fast": ops.linear_residual,
                "eager": lambda a, w, b, x: x + F.linear(a, w, b),
                "cublas": lambda a, w, b, x: F.linear(a, w, b),
            },
            (a, w2, b2, x),
        ),
        "mlp": (
            {
                "vit_fast": ops.mlp,
                "eager": lambda x, g, c, w1, b1, w2, b2: x + F.linear(F.gelu(F.linear(norm(x, g, c), w1, b1)), w2, b2),
                "cublas": lambda x, g, c, w1, b1, w2, b2: F.linear(F.linear(x, w1, b1), w2, b2),
            },
            (x, *vectors[:2], w1, b1, w2, b2),
        ),
        "patch_embed": (
            {
                "vit_fast": ops.patch_embed,
                "conv2d": lambda i, w, b, p, t: (
                    torch.cat([t.expand(B, 1, D), F.conv2d(i, w, b, stride=patch).flatten(2).transpose(1, 2)], 1) + p
                ),
            },
            (images, wp, *tables),
        ),
    }


SHAPES = (
    {"B": (17, 64, 2, 256, 56)}
    if REHEARSAL
    else {
        "B": (197, 768, 12, 3072, 16),
        "L": (197, 1024, 16, 4096, 16),
        "H": (257, 1280, 16, 5120, 14),
        "B at 384": (577, 768, 12, 3072, 16),
    }
)


def _passes(contenders: dict, tensors: tuple, spared: int) -> tuple[dict, dict]:
    """Runs forward, and forward and backward, of those contenders that run at all."""
    wanted = [t.requires_grad_() for t in tensors[spared:]]
    upstream = torch.randn_like(contenders["vit_fast"](*tensors))

    def forward(contender):
        with torch.no_grad():
            return contender(*tensors)

    def both(contender):
        return torch.autograd.grad(contender(*tensors), wanted, upstream, allow_unused=True)

    found = {}, {}
    for name, contender in contenders.items():
        try:
            forward(contender)
            both(contender)
        except RuntimeError as error:
            print(name, "left out:", str(error).splitlines()[0])
        else:
            for runs, run in zip(found, (forward, both)):
                runs[name] = functools.partial(run, contender)
    return found


def measure_ops(batch: int, rounds: int = ROUNDS, only: str = "") -> list[dict]:
    """Each op and its peers: microseconds forward, and forward and backward."""
    lines = []
    for model, shape in SHAPES.items():
        B = batch if shape[0] < 300 else max(1, batch // 4)
        for op, (contenders, tensors) in _op_cases(B, *shape).items():
            if only and (op, model) != ("attention", only):
                continue
            if shape[0] > 300 and op != "attention":
                continue
            forward, both = _passes(contenders, tensors, spared=op == "patch_embed")
            for direction, runs in (("forward", forward), ("both", both)):
                times = time_in_turn(runs, rounds)
                line = {"op": op, "model": model, "batch": B, "direction": direction}
                line["us"] = {name: quantiles(samples) for name, samples in times.items()}
                lines.append(line)
                print(op, model, direction, {name: q[1] for name, q in line["us"].items()})
            del tensors, forward, both, runs
            empty_memory()
    return lines


def ceilings() -> dict:
    """What this device reaches: a bf16 product of 8192³ on random data, and a copy of 2 GiB, bytes read and written."""
    side = 64 if REHEARSAL else 8192
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(8 * side * side, device=DEVICE)
    target = torch.empty_like(source)
    times = time_in_turn({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 20)
    return {
        "matrix_tflops": round(2 * side**3 / quantiles(times["product"])[1] / 1e6, 1),
        "copy_tbs": round(2 * source.nbytes / quantiles(times["copy"])[1] / 1e6, 3),
    }


def graphed(run: Callable) -> Callable:
    if REHEARSAL:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def their_model(name: str, training: bool = False) -> torch.nn.Module:
    """timm's."""
    from tests import mend_torchvision

    mend_torchvision.mend()
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, num_classes=1000).to(DEVICE, torch.bfloat16).train(training)


def models(batch: int, rounds: int = ROUNDS, compiled: bool = True) -> list[dict]:
    """Microseconds a batch: ours eager and in a graph, timm's eager, in a graph and compiled; training steps with fused
    AdamW, and the most memory that they take, weights and AdamW's state included."""
    lines = []

    def note(name: str, size: int, training: bool, runs: dict) -> None:
        times = {run: quantiles(samples) for run, samples in time_in_turn(runs, rounds).items()}
        lines.append({"model": name, "batch": size, "training": training, "us": times})
        print(json.dumps(lines[-1]), {run: round(size / q[1] * 1e6) for run, q in times.items()}, flush=True)

    for name in ("vit_small_patch16_224", *MODELS)[REHEARSAL:]:
        ours, theirs = new_model(name), their_model(name)
        for size in (1, batch) if REHEARSAL else (1, 8, 64, batch):
            images = torch.randn(size, 3, 224, 224, device=DEVICE, dtype=torch.bfloat16)
            with torch.inference_mode():
                runs = {"vit_fast": functools.partial(ours, images), "timm": functools.partial(theirs, images)}
                for whose in tuple(runs):
                    runs[f"{whose} graph"] = graphed(runs[whose])
                if compiled and size == batch and "small" not in name:
                    runs["timm compiled"] = functools.partial(torch.compile(theirs), images)
                note(name, size, False, runs)
        del ours, theirs, runs
        empty_memory()
    for name in MODELS:
        size = batch if "huge" not in name else batch // 4
        for whose in ("vit_fast", "timm") + ("timm compiled",) * (compiled and "huge" not in name):
            model = new_model(name, True) if whose == "vit_fast" else their_model(name, True)
            backward = pass_of(torch.compile(model) if "compiled" in whose else model, size, True)
            optimiser = torch.optim.AdamW(model.parameters(), fused=True)

            def step(backward=backward, optimiser=optimiser):
                backward()
                optimiser.step()

            note(name, size, True, {whose: step})
            if not REHEARSAL:
                lines[-1]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                print(f"{lines[-1]['peak_gb']:.1f} GB at most")
            del model, backward, optimiser, step
            empty_memory()
    return lines


# ---- the day -------------------------------------------------------------------------------------------------------


def record(results) -> dict:
    """A file of results: the device, the versions, the date, the commit and the ceilings of the same run."""
    return {
        "device": "rehearsal" if REHEARSAL else torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "vit_fast": vit_fast.__version__},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": os.environ.get("VIT_FAST_COMMIT") or commit(),
        "command": " ".join(sys.argv),
        "ceilings": ceilings(),
        "results": results,
    }


def prepare(task: tuple) -> None:
    """Compile what a step will launch: it is run once, small."""
    step, which, batch = task
    if step == "ops":
        measure_ops(batch, 2, only=which)
    else:
        model = torch.compile(their_model(*which)) if step == "timm" else new_model(*which, depth=1)
        pass_of(model, batch, training=which[1])()


def tasks(batch: int, compiled: bool) -> list[tuple]:
    """What `prepare` is to do: (step, what of it, batch)."""
    names, small = ("vit_small_patch16_224", *MODELS)[REHEARSAL:], min(batch, 16)
    ours = [("kernels", (name, False), size) for name in names for size in (small, 1)]
    ours += [("kernels", (name, True), small) for name in names]
    theirs = [("timm", (name, training), batch) for name in MODELS if "huge" not in name for training in (False, True)]
    return theirs * compiled + ours + [("ops", "B at 384", small)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], default=list(STEPS))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--alone", action="store_true", help="run one step here, in this process")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile's forms of peers")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.alone:
        run = {"kernels": kernels, "ops": measure_ops, "models": models}[given.steps[0]]
        options = {"compiled": not given.no_compile} if run is models else {}
        (given.out / f"{given.steps[0]}.json").write_text(json.dumps(record(run(given.batch_size, **options))))
        return
    start = time.monotonic()

    def left() -> float:
        return max(1.0, 60 * given.minutes - (time.monotonic() - start))

    def said(*words) -> None:
        print(f"[{time.monotonic() - start:5.0f} s]", *words, flush=True)

    children = []
    if "tests" in given.steps:
        quiet = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "--maxfail=40", "-n", str(given.workers)]
        command += ["-p", "no:cacheprovider", "--tb=short", "--durations=8"]
        log = (given.out / "tests.txt").open("w")
        children.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=quiet))
    if set(given.steps) - {"tests"}:
        with multiprocessing.get_context("spawn").Pool(max(1, given.workers // 2)) as pool:
            todo = tasks(given.batch_size, not given.no_compile)
            for task, outcome in [(task, pool.apply_async(prepare, (task,))) for task in todo]:
                try:
                    outcome.get(left())
                except Exception as error:  # a step that fails says so itself
                    said("preparing", *task, "failed:", type(error).__name__, str(error)[:200])
        said("compiled")
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(left())
        child.kill()
        said("tests:", (given.out / "tests.txt").read_text()[-3000:])
    for step in given.steps:
        if step == "tests":
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", str(given.out), step, "--alone"]
        command += ["--batch-size", str(given.batch_size)] + ["--no-compile"] * given.no_compile
        try:
            code = subprocess.run(command, timeout=left()).returncode
            said(step, "ended with", code)
        except subprocess.TimeoutExpired:
            said(step, "was cut")


if __name__ == "__main__":
    main()
