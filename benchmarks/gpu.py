"""A GPU, checked and measured: what nine minutes with one can tell, in the order in which a cut leaves most.

python -m benchmarks.gpu OUT [STEP …] [--minutes 9] [--set main|full] [--workers N] [--batch-size 256]

entries    every entry of the tile table in force, held to fp64
ops        ceilings; each op at ViT-B, L and H, that of rotary positions at DINOv3's B and L, that of windows at two
           stages of Swins, against SDPA, cuBLAS and PyTorch, at ViT-B and Swin-T compiled PyTorch too
models     ViT-B and L, inference and training step, against timm eager, in a graph and compiled
tiles      tiles side by side in the block that launches them, to OUT/sweep.json (benchmarks/sweep.py)
rest       models again: S, H and so400m, small batches, fp16, autocast, checkpointing; more lines of OUT/models.json
kernels    each launch of a ViT-B, L and H's block, inference and training step
tests      tests/gpu
few        each op forward at batches of 1, 8 and 64, no compiled peers; more lines of OUT/ops.json
largest    the largest batch of a training step that fits (benchmarks/largest.py)
curves     training beside PyTorch from the same seeds (benchmarks/curves.py)

Each step is a process of its own, and writes OUT/STEP.json as it goes: what is cut or fails costs no other step. After
each OUT/page.txt is written anew: what is wrong, what is slow, what to do first. What ops, models, rest, kernels and
few will launch, and what torch.compile makes of models, is compiled before anything is timed, side by side; meanwhile
the entries are checked, where that step is chosen. --set full measures every shape and every contender of `pytest
benchmarks/`, and goes on where an earlier call with the same OUT stopped, on the same device and tree. --set main
begins anew: what the chosen steps left in OUT before is removed, but rest and few add what is not there yet.

Without a GPU all of it is rehearsed at tiny shapes, in PyTorch and by the host's clock: no figure of that counts.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import torch
from triton import knobs
from triton.runtime.jit import JITFunction
from vit_fast.kernels import tile_table

from benchmarks import contenders, predictions, timing, whole_models
from benchmarks.launches import kernel_name
from benchmarks.profile import step_of
from benchmarks.records import record
from benchmarks.report import best
from benchmarks.timing import DEVICE, quantiles
from vit_fast import verify
from vit_fast.checkpoint import replacing

REHEARSAL = DEVICE == "cpu"
STEPS = ("entries", "ops", "models", "tiles", "rest", "kernels", "tests", "few", "largest", "curves")
ADDS_TO = {"rest": "models", "few": "ops"}  # steps that write more lines of another's file
FILES = {**ADDS_TO, "tiles": "sweep"}  # of the steps whose file has another name
MODELS = ("tiny",) if REHEARSAL else ("B", "L", "H")
OURS_AND_TIMMS = ("vit_fast", "vit_fast graph", "timm", "timm graph")
COMPILED_OPS = ("flex", "compiled", "compiled max")
# Of those, of each model in the main set: compiling takes most of the time.
SHOWN = dict.fromkeys(("B", "Swin-T 1"), ("flex", "compiled"))
COMPILED = ("timm compiled", "vit_fast compiled")  # of the models of MODELS, at one batch: it takes longest


# ---- steps ---------------------------------------------------------------------------------------------------------

Write = Callable[[list], None]  # writes what is known so far


def check_entries(write: Write, workers: int) -> None:
    """The whole table on a GPU; without one each op in Triton's interpreter."""
    write(verify.report("cpu")[0] if REHEARSAL else verify.verify_entries(DEVICE, workers=workers))


def known(done: list[dict], names: Iterable[str], lines: int = 1) -> bool:
    """Whether so many lines of a case, from an earlier call, say of each of these contenders what became of it."""
    return len(done) >= lines and all(line["us"].keys() | line["aside"].keys() >= set(names) for line in done)


def end_where_lost(aside: dict[str, str]) -> None:
    """End a step whose device takes no more work: another call goes on behind this case."""
    for reason in aside.values():
        if contenders.lost(reason):
            raise SystemExit(reason)


def label(case: contenders.Case) -> str:
    if case.op == "window_attention":
        return case.model
    if case.op == "rope_attention":
        return f"DINOv3 {case.model}"
    side, _ = contenders.IMAGES[case.tokens]
    return case.model if side in (32, 224) else f"{case.model} at {side}"


def measure_ops(write: Write, batch: int, compiled: bool, which: str, done: Iterable[dict]) -> None:
    lines = list(done)
    for case in contenders.cases_of("small" if REHEARSAL else which):
        if which == "main" or REHEARSAL:
            case = case._replace(batch=1 if which == "few" else min(case.batch, batch))
        place = {"op": case.op, "model": label(case), "tokens": case.tokens, "batch": case.batch, "dtype": case.dtype}
        shown = COMPILED_OPS if which == "full" else SHOWN.get(case.model, ("flex",))
        names = [n for n in contenders.names(case.op) if n not in COMPILED_OPS or (compiled and n in shown)]
        before = [line for line in lines if place.items() <= line.items()]
        directions = ("forward",) if which == "few" else tuple(contenders.RUNS)
        if known(before, names, len(directions)):
            continue
        lines = [line for line in lines if line not in before]
        found = contenders.measure(case, names, directions=directions)
        for direction in directions:
            us = {name: quantiles(one.us[direction]) for name, one in found.items() if one.us}
            samples = {name: [round(x, 3) for x in one.us[direction]] for name, one in found.items() if one.us}
            line = {**place, "direction": direction, "us": us}
            aside = {name: one.left_out or one.wrong for name, one in found.items() if not one.us}
            lines.append({**line, "samples": samples, "aside": aside, "wrong": [n for n in found if found[n].wrong]})
            print(*place.values(), direction, {name: q[1] for name, q in us.items()}, flush=True)
        write(lines)
        end_where_lost(aside)
        timing.empty_memory()


def model_cases(batch: int, which: str) -> list[whole_models.ModelCase]:
    """Of a set: those of "main" count most, "rest" has the others too."""
    if REHEARSAL:
        small = whole_models.cases("small")
        return small[:2] if which == "main" else small
    if which == "full":
        return whole_models.cases("full")
    make = whole_models.ModelCase
    found = [make(name, 224, batch, "bf16", way) for name in "BL" for way in ("inference", "training")]
    if which == "main":
        return found
    found += [make("H", 224, batch, "bf16", "inference"), make("H", 224, batch // 4, "bf16", "training")]
    found += [make(name, 224, size, "bf16", "inference") for size in (1, 8, 64) for name in "BSLH"]
    found += [make("S", 224, batch, "bf16", "inference")]
    found += [make(name, 224, batch // 4, "bf16", "training") for name in "BL"]
    found += [make("so400m", 224, batch, "bf16", "inference"), make("B", 224, batch, "fp16", "inference")]
    found += [make("S", 224, batch, "bf16", "training"), make("B", 384, batch // 4, "bf16", "inference")]
    found += [make(name, 224, batch, "amp", "training") for name in "BL"]
    found += [make(name, 224, batch, "bf16", "checkpointed") for name in "BL"]
    found += [make("B", 224, batch // 4, "amp", "training"), make("B", 224, batch, "fp16", "training")]
    found += [make("L", 224, batch, "fp16", "inference")]
    return [*found, make("H", 224, batch, "bf16", "training")]  # which an 80 GB card may not hold


def measure_models(write: Write, batch: int, compiled: bool, which: str, done: Iterable[dict]) -> None:
    lines = list(done)
    for case in model_cases(batch, which):
        names = model_contenders(case, batch, compiled, which)
        before = [line for line in lines if line["case"] == list(case)]
        if known(before, names):
            continue
        lines = [line for line in lines if line not in before]
        found = whole_models.measure(case, names)
        line = {"case": list(case), "model": whole_models.NAMES[case.model], "batch": case.batch}
        line |= {"training": case.direction != "inference"}
        line["us"] = {name: quantiles(one.us) for name, one in found.items() if one.us}
        line["samples"] = {name: [round(x, 1) for x in one.us] for name, one in found.items() if one.us}
        line["facts"] = {name: one.facts for name, one in found.items() if one.us}
        line["aside"] = {name: one.left_out or one.wrong for name, one in found.items() if not one.us}
        line["wrong"] = [name for name in found if found[name].wrong]
        lines.append(line)
        print(case, {name: f"{case.batch / q[1] * 1e6:,.0f}/s" for name, q in line["us"].items()}, flush=True)
        write(lines)
        end_where_lost(line["aside"])
        timing.empty_memory()


def model_contenders(case: whole_models.ModelCase, batch: int, compiled: bool, which: str) -> list[str]:
    """Who takes part in a case of a set: of all but the full one ours and timm, compiled at the largest batch."""
    plain = case.dtype == "bf16" and case.direction != "checkpointed"
    other = case.model == "B" and (case.dtype == "amp" or case.direction == "checkpointed")
    at_this = case.model in MODELS and case[1:3] == (224, batch) and (plain or other)
    wanted = (*OURS_AND_TIMMS, *COMPILED * at_this)
    return [
        name
        for name in whole_models.names(case)
        if (compiled or "compiled" not in name) and (which == "full" or name in wanted)
    ]


@contextlib.contextmanager
def launch_clock():
    """A list that grows by (kernel, start, stop) of each Triton launch in the block, events of the device."""
    run, found = JITFunction.run, []

    def timed(self, *args, **kwargs):
        start, stop = timing.events()
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


def measure_kernels(write: Write, batch: int) -> None:
    """Microseconds of each launch of two blocks, in their order; the pool reads all tokens, so both are whole."""
    lines = []
    for name, training in itertools.product(MODELS, (False, True)):
        case = whole_models.ModelCase(name, 224, batch, "bf16", "training" if training else "inference")
        run = step_of(whole_models.built(case, "vit_fast", depth=2, global_pool="avg"), batch, training)
        for _ in range(2):
            run()
        passes = []
        for _ in range(timing.ROUNDS):
            timing.hold_the_device(20_000)
            with launch_clock() as found:
                run()
            for _, _, stop in found:
                stop.synchronize()
            passes.append([(kernel, 1e3 * start.elapsed_time(stop)) for kernel, start, stop in found])
        line = {"model": whole_models.NAMES[name], "training": training, "batch": batch}
        line["us"] = statistics.median(timing.time_in_turn({"all": run})["all"])
        line["launches"] = [[one[0][0], *quantiles([us for _, us in one])] for one in zip(*passes)]
        line["samples"] = [[round(us, 3) for _, us in one] for one in zip(*passes)]
        lines.append(line)
        write(lines)
        print(
            name, training, f"{line['us']:,.0f} us, in kernels {sum(x[2] for x in line['launches']):,.0f}", flush=True
        )


# ---- the page ------------------------------------------------------------------------------------------------------


MOST_LINES = 15  # of each list of the page


def page(found: dict[str, dict], goals: dict[str, float], endings: dict[str, object], tests: str) -> str:
    """What is wrong, what is slow and what to do first.

    Args:
        found: the files of the steps by name.
        endings: of each step that ran its exit status, "cut" where the time was over, or why it did not run.
        tests: what tests/gpu said.
    """
    wrong, slow = [], []
    models = found.get("models") or found.get("rest") or {}  # one file of two steps
    for step, ending in endings.items():
        if isinstance(ending, int) and ending:
            wrong.append(f"the step {step} ended with {ending}: what it has not written was not measured")
    for line in found.get("entries", {}).get("results", []):
        if not line["agrees"]:
            what = " ".join(str(line[name]) for name in ("kernel", "op", "shape", "dtype") if name in line)
            wrong.append(f"{what}: {line.get('why') or line['error']}")
    of_ops = found.get("ops") or found.get("few") or {}
    for line in [*of_ops.get("results", []), *models.get("results", [])]:
        place = _place(line)
        wrong += [f"{place}: {name}: {line['aside'][name]}" for name in line["wrong"]]
        if best(line["us"], True) and best(line["us"], False):
            (_, ours), (form, theirs) = best(line["us"], True), best(line["us"], False)
            slow.append((ours - theirs, f"{place}: {ours:,.1f} us, {form} {theirs:,.1f}"))
    short = []
    for line in models.get("results", []):
        ours, ceilings = best(line["us"], True), line.get("ceilings") or models.get("ceilings", {})
        if ours and ceilings and line["batch"] >= 64:
            pixels = _case(line).pixels
            flops = predictions.forward_flops(line["model"], pixels) * line["batch"] * (3 if line["training"] else 1)
            reached = 100 * flops / ours[1] / 1e6 / ceilings["matrix_tflops"]
            goal = goals.get(f"{line['model']} {'training' if line['training'] else 'inference'}")
            has_goal = (
                goal and pixels == 224 and _case(line).dtype == "bf16" and _case(line).direction != "checkpointed"
            )
            short.append(f"{_place(line)}: {reached:.0f} %" + (f" of {goal}" if has_goal else ", no goal"))
    slow = [text for lost, text in sorted(slow, reverse=True) if lost > 0]
    missing = [step for step in STEPS if step not in endings or isinstance(endings[step], str)]
    cut = [f"{step} (cut)" if endings.get(step) == "cut" else step for step in missing]
    first = f"mend {wrong[0]}" if wrong else slow[0] if slow else "go for the ceiling"
    tiles = [
        f"{kernel}, {shape}: {tile_table.numbers(entry)}"
        for kernel, dtypes in found.get("tiles", {}).get("tiles", {}).items()
        for classes in dtypes.values()
        for shape, entry in classes.items()
    ]
    parts = [
        f"WRONG ({len(wrong)})",
        *_at_most(wrong),
        f"SLOWER THAN THE BEST PEER ({len(slow)}), most time lost first",
        *_at_most(slow),
        "REACHED, IN PER CENT OF THE CEILING OF THE MODELS' OWN RUN, OF THE GOAL",
        *_at_most(short),
        f"TILES THAT WON ({len(tiles)}), for `python -m benchmarks.sweep OUT --split`",
        *_at_most(tiles),
        f"NOT DONE, OR NOT TO THE END: {', '.join(cut) or 'nothing'}",
        f"FIRST: {first}",
        "TESTS",
        tests.strip() or str(endings.get("tests", "not run")),
    ]
    return "\n".join(parts) + "\n"


def _case(line: dict) -> whole_models.ModelCase:
    return whole_models.ModelCase(*line["case"])


def _place(line: dict) -> str:
    """Which case a line is of, in words."""
    if "case" in line:
        case = _case(line)
        return f"{line['model']} {case.pixels} px, batch {case.batch}, {case.dtype}, {case.direction}"
    return " ".join(str(line[name]) for name in ("op", "model", "tokens", "batch", "dtype", "direction"))


def _at_most(lines: list[str]) -> list[str]:
    more = len(lines) - MOST_LINES
    return lines if more <= 0 else [*lines[:MOST_LINES], f"and {more} more"]


def goals() -> dict[str, float]:
    """Model and pass → per cent of the ceiling."""
    ways = ("inference", "training")
    return {f"{name} {way}": goal for name, _, *both in predictions.MODELS for way, goal in zip(ways, both)}


# ---- the day -------------------------------------------------------------------------------------------------------


Task = tuple[whole_models.ModelCase, str]  # a contender at a case


def prepare(task: Task) -> str:
    """Compile what a contender will launch: it runs once, ours with two blocks where it is not compiled whole.

    Returns:
        Why it failed, or "".
    """
    torch._dynamo.reset()  # its limits are for one piece of code, and all tasks of a process share theirs
    case, name = task
    whose, _, form = name.partition(" ")
    model = contender = None
    try:
        model = whole_models.built(case, whose, **({} if form else {"depth": 2}))
        contender = whole_models.started(model, form, case, *whole_models.drawn(case))
        contender.run()
        return ""
    except Exception as error:  # in words: not each can be sent to another process
        return verify.in_a_line(error)
    finally:
        model = contender = None
        timing.empty_memory()  # several such processes share the device


def tasks(steps: list[str], batch: int, compiled: bool) -> list[Task]:
    """What `prepare` is to do before these steps of the main set: what takes longest first."""
    found, make = [], whole_models.ModelCase
    for step in steps:
        if step in ("models", "rest"):
            cases = model_cases(batch, "main" if step == "models" else step)
            found += [(case, name) for case in cases for name in model_contenders(case, batch, compiled, step)]
        elif step in ("ops", "kernels"):
            ways = ("inference", "training")
            found += [(make(name, 224, batch, "bf16", way), "vit_fast") for name in MODELS for way in ways]
        elif step == "few":
            found += [
                (make(name, 224, size, "bf16", "inference"), "vit_fast") for name in MODELS for size in (1, 8, 64)
            ]
    theirs = [task for task in found if task[1] in COMPILED]
    ours = [task for task in found if task[1] == "vit_fast"]
    return list(dict.fromkeys([*theirs, *ours]))


def known_of(path: pathlib.Path) -> list[dict]:
    """The lines of a file that an earlier step or call left, each with its date, state and ceilings, or none.

    Raises:
        SystemExit: where they are of another device, tree or version: one file is one run.
    """
    if not path.is_file():
        return []
    before, now = json.loads(path.read_text()), record([], rehearsal=REHEARSAL)
    for name in ("device", "commit", "versions"):
        if before[name] != now[name]:
            raise SystemExit(f"{path}: its {name} is {before[name]}, here it is {now[name]}; choose another OUT")
    own = {name: before[name] for name in ("date", "state", "ceilings") if name in before}
    return [own | line for line in before["results"]]


def run_step(step: str, out: pathlib.Path, given: argparse.Namespace) -> None:
    """One step in this process."""
    path = out / f"{FILES.get(step, step)}.json"
    ceilings = {} if step in ("entries", "tiles") else {"ceilings": timing.ceilings()}
    before = timing.device_state()

    def write(results: list) -> None:
        state = [before, timing.device_state()]
        found = record(results, rehearsal=REHEARSAL, state=state, **ceilings)
        for line in results if ceilings else ():
            for name in ("date", "state", "ceilings"):  # of an earlier call each has its own
                line.setdefault(name, found[name])
        with replacing(path) as beside:
            beside.write_text(json.dumps(found))

    compiled = not given.no_compile
    if step == "entries":
        check_entries(write, given.workers)
    elif step == "kernels":
        measure_kernels(write, given.batch_size)
    elif step == "ops":
        measure_ops(write, given.batch_size, compiled, given.set, known_of(path))
    elif step == "few":
        measure_ops(write, given.batch_size, False, step, known_of(path))
    else:
        which = "rest" if step == "rest" and given.set == "main" else given.set
        measure_models(write, given.batch_size, compiled, which, known_of(path))


def command_of(step: str, given: argparse.Namespace) -> list[str]:
    if step == "tests":
        workers = ["-n", str(given.workers)] if contenders.is_installed("xdist") else []
        options = ["-q", "--maxfail=40", "-p", "no:cacheprovider", "--tb=short"]
        return [sys.executable, "-m", "pytest", "tests/gpu", *options, *workers]
    if step == "tiles":
        return [sys.executable, "-m", "benchmarks.sweep", str(given.out), "--workers", str(given.workers)]
    if step in ("largest", "curves"):
        return [sys.executable, "-m", f"benchmarks.{step}", str(given.out / f"{step}.json")]
    command = [sys.executable, "-m", "benchmarks.gpu", str(given.out), step, "--alone", "--set", given.set]
    command += ["--batch-size", str(given.batch_size), "--workers", str(given.workers)]
    return command + ["--no-compile"] * given.no_compile


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("steps", nargs="*", metavar="step", help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--set", choices=("main", "full"), default="main")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--alone", action="store_true", help="run one step here, in this process")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile's forms of peers")
    given = parser.parse_args(words)
    if unknown := set(given.steps) - set(STEPS):  # argparse would refuse the default, a list, by `choices`
        parser.error(f"steps: got {', '.join(sorted(unknown))}, takes {', '.join(STEPS)}")
    given.steps = given.steps or list(STEPS)
    return given


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.alone:
        run_step(given.steps[0], given.out, given)
        return
    if given.set == "main":
        for step in given.steps:
            if step not in ADDS_TO:
                (given.out / f"{FILES.get(step, step)}.json").unlink(missing_ok=True)
    start, tests, endings = time.monotonic(), "", {}

    def left() -> float:
        return max(1.0, 60 * given.minutes - (time.monotonic() - start))

    def said(*words) -> None:
        print(f"[{time.monotonic() - start:5.0f} s]", *words, flush=True)

    def half() -> float:
        """What is left of the half of the time in which nothing is timed yet."""
        return max(0.0, left() - 30 * given.minutes)

    # Where what is prepared is looked for: Inductor would have a process look elsewhere once it compiled something.
    os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/inductor_{os.getuid()}")
    todo = tasks(given.steps, given.batch_size, not given.no_compile)
    cores = given.workers // 2 if "entries" in given.steps else given.workers
    pool = multiprocessing.get_context("spawn").Pool(max(1, min(cores, len(todo))))

    def prepared(outcome) -> str:
        try:
            return outcome.get(half())
        except multiprocessing.TimeoutError:
            return "half of the time is over"

    waiting = [(task, pool.apply_async(prepare, (task,))) for task in todo]
    for step in given.steps:
        if step == "tiles" and REHEARSAL:
            endings[step] = "not run: tiles are chosen by timing them on a GPU"
            continue
        if step == "tests" and not contenders.is_installed("pytest"):
            endings[step] = "not run: pytest is not installed"
            continue
        if pool and step != "entries":  # nothing is timed while the cores compile
            failed = [task for task, outcome in waiting if prepared(outcome)]
            for task in failed:  # for want of memory beside the others, it may be
                if why := prepared(pool.apply_async(prepare, (task,))):
                    said("preparing", *task, "failed:", why[:200])
            # An idle worker would keep its context and its allocator's memory on the device while all else is measured.
            pool.terminate()
            pool.join()
            pool = None
            # What Inductor chose by timing it on a device that others used is chosen again.
            for choice in pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
                choice.unlink()
        try:
            output = subprocess.PIPE if step == "tests" else None
            limit = half() if step == "entries" != given.steps[-1] else left()
            done = subprocess.run(command_of(step, given), timeout=limit, stdout=output, text=True)
            tests = done.stdout if step == "tests" else tests
            endings[step] = done.returncode
        except subprocess.TimeoutExpired as cut:
            tests = (cut.stdout or b"").decode() if step == "tests" else tests
            endings[step] = "cut"
        said(step, "was cut" if endings[step] == "cut" else f"ended with {endings[step]}")
        paths = {one: given.out / f"{FILES.get(one, one)}.json" for one in endings}
        files = {one: json.loads(path.read_text()) for one, path in paths.items() if path.is_file()}
        text = page(files, goals(), endings, tests[-3000:])
        (given.out / "page.txt").write_text(text)
    if pool:  # entries was the only step
        pool.terminate()
    print(text)


if __name__ == "__main__":
    main()
