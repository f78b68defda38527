"""Training that is killed, interrupted, out of disk or whose checkpoint is damaged, and goes on to the same bits.

python -m tests.faults [--kills 200] [--seed 0]

A run of 18 steps and three checkpoints is killed four times, each time at a moment of another kind, and then left to
end: its weights, its optimiser, its generators and its history must be those of a run that nothing happened to.

clock      SIGKILL after a random part of the run's duration
line       SIGKILL before a random line of training.py or of what writes checkpoints
save       SIGKILL before a random line of checkpoint.py or pathlib: between any two calls that open, write, flush, link
           or rename
write      SIGKILL a random moment after a checkpoint's writing began, inside the calls too

Then runs whose disk is full at a random byte, runs that Ctrl-C stops twice, and checkpoints damaged at random. Each
draws from a seed of its own, which a failure names; what the clock decides is as random as the machine. Processes are
forked from one that has imported everything. `make test` runs some of each: tests/test_faults.py.
"""

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests import counts
from tests.small_runs import equal_states, tiny_config, without_speed
from vit_fast import checkpoint, training

EPOCHS, STEPS = 3, 18
KINDS = ("clock", "line", "save", "write")
SAVE_FILES = (checkpoint.__file__, sys.modules[Path.write_text.__module__].__file__)
RUN_FILES = (training.__file__, *SAVE_FILES)
PATIENCE_S = 120  # of a run that takes half a second

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.forked"])


# ---- in the process that something happens to ----------------------------------------------------------------------


def at_line(files: tuple[str, ...], number: int, act) -> None:
    """Call `act` before line `number` of those that run in these files, counted from now."""
    left = number

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            if left == 0:
                sys.settrace(None)
                act()
            left -= 1
        return trace

    sys.settrace(trace)


def count_lines(files: tuple[str, ...]) -> list[int]:
    """A list whose one number counts the lines that run in these files from now on."""
    count = [0]

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        count[0] += event == "line"
        return trace

    sys.settrace(trace)
    return count


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def go_on(folder: Path, on_step=None) -> training.Result:
    """Train in this folder: from its checkpoint where it has one, else from the start."""
    torch.set_num_threads(1)
    held = any((folder / name).exists() for name in (checkpoint.TRAINING, checkpoint.PREVIOUS))
    return training.train(tiny_config(folder, epochs=EPOCHS), folder if held else None, on_step)


def _say_when_saving(saving) -> None:
    """`saving` is 1 while a checkpoint is written."""
    save = checkpoint.save

    def saves(*args, **kwargs):
        saving.value = 1
        save(*args, **kwargs)
        saving.value = 0

    checkpoint.save = saves


def _run(folder: Path, saving, files: tuple[str, ...] = (), line: int = 0) -> None:
    _say_when_saving(saving)
    if files:
        at_line(files, line, kill_oneself)
    go_on(folder)


def _measure(folder: Path, results) -> None:
    """An uninterrupted run: its seconds, those of a save, and its lines in each set of files."""
    seconds, saves = [], []
    save = checkpoint.save

    def timed(*args, **kwargs):
        started = time.monotonic()
        save(*args, **kwargs)
        saves.append(time.monotonic() - started)

    checkpoint.save = timed
    for index in range(2):
        started = time.monotonic()
        go_on(folder / str(index))
        seconds.append(time.monotonic() - started)
    checkpoint.save = save
    lines = {}
    for kind, files in (("line", RUN_FILES), ("save", SAVE_FILES)):
        count = count_lines(files)
        go_on(folder / kind)
        sys.settrace(None)
        lines[kind] = count[0]
    results.put({"run": min(seconds), "write": min(saves), **lines})


def _full(folder: Path, step: int, room: int, results) -> None:
    """From `step` on no file takes more than `room` bytes, as on a disk that has no more."""

    def on_step(report):
        if report.step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    try:
        go_on(folder, on_step)
        results.put("")
    except (OSError, ValueError) as error:
        results.put(str(error))


def _interrupted_twice(folder: Path, step: int, line: int, results) -> None:
    """Ctrl-C after `step`, and again before a line of the checkpoint's writing that follows."""

    pressed, replaced = 0, 0
    replace = os.replace

    def press() -> None:
        nonlocal pressed
        pressed += 1
        os.kill(os.getpid(), signal.SIGINT)

    def replaces(source, target) -> None:
        nonlocal replaced
        replaced += pressed == 2
        replace(source, target)

    def on_step(report):
        if report.step == step:
            at_line(SAVE_FILES, line, press)
            press()

    os.replace = replaces
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        go_on(folder, on_step)
    except KeyboardInterrupt:
        sys.settrace(None)
        results.put((pressed, replaced))


# ---- in the process that looks at it -------------------------------------------------------------------------------


def start(target, *arguments) -> multiprocessing.Process:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def ended(process: multiprocessing.Process, within: float = PATIENCE_S) -> int:
    """Its exit status, negative for a signal."""
    process.join(within)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"a process did not end within {within} s")
    return process.exitcode


def result_of(target, *arguments):
    """What the function puts into the queue that it is given last."""
    results = CONTEXT.SimpleQueue()
    process = start(target, *arguments, results)
    assert ended(process) == 0, f"{target.__name__}{arguments} ended with {process.exitcode}"
    return results.get()


def whole(folder: Path) -> None:
    """Raise where a file of this folder cannot be read."""
    if (folder / checkpoint.CONFIG).exists():
        checkpoint.load_config(folder)
    if (folder / checkpoint.WEIGHTS).exists():
        checkpoint.load(folder)
    for name in (checkpoint.TRAINING, checkpoint.PREVIOUS):
        if (folder / name).exists():
            checkpoint._read_training(folder / name)


class Expected:
    """A run that nothing happened to, and how long its parts are."""

    def __init__(self, folder: Path):
        self.of_a = result_of(_measure, folder)
        self.weights, self.tensors, self.state = checkpoint.load_training(folder / "0")
        self.bytes = (folder / "0" / checkpoint.TRAINING).stat().st_size

    def hold(self, folder: Path) -> None:
        """Let a run go on to its end: the same bits, and nothing left lying about."""
        process = start(go_on, folder)
        assert ended(process) == 0, "a run could not go on"
        weights, tensors, state = checkpoint.load_training(folder)
        assert equal_states(weights, self.weights), "other weights"
        assert equal_states(tensors, self.tensors), "another optimiser or generator"
        assert without_speed(state["history"]) == without_speed(self.state["history"]), "another history"
        assert equal_states(checkpoint.load(folder)[0].state_dict(), self.weights), (
            "model.safetensors is of another step"
        )
        assert not list(folder.glob(".*")), "a file was left behind"


def killed(folder: Path, kind: str, draw: random.Random, expected: Expected) -> tuple[bool, bool]:
    """(whether the run was killed before its end, whether that was while it wrote a checkpoint)"""
    of_a = expected.of_a
    saving = CONTEXT.RawValue("b", 0)
    if kind in ("line", "save"):
        files = RUN_FILES if kind == "line" else SAVE_FILES
        process = start(_run, folder, saving, files, draw.randrange(of_a[kind]))
    else:
        process = start(_run, folder, saving)
        if kind == "clock":
            process.join(draw.random() * 1.2 * of_a["run"])
        else:
            for _ in range(draw.randrange(1, EPOCHS + 1)):  # of which checkpoint
                while saving.value and process.is_alive():
                    pass
                while not saving.value and process.is_alive():
                    pass
            time.sleep(draw.random() * of_a["write"])
        process.kill()
    status = ended(process)
    assert status in (0, -signal.SIGKILL), f"a run ended with {status}"
    return status != 0, status != 0 and bool(saving.value)


def kill_and_go_on(seed: str, kills: int, expected: Expected) -> Counter:
    """One run, killed this many times and then left to end."""
    draw, found = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tries = 0
        while found["kills"] < kills:
            kind = KINDS[found["kills"] % len(KINDS)]
            fell, while_saving = killed(folder, kind, draw, expected)
            whole(folder)
            found["kills"] += fell
            found[f"kills of the kind {kind}"] += fell
            found["kills while a checkpoint was written"] += while_saving
            tries += 1
            finished = (folder / checkpoint.TRAINING).exists() and (
                checkpoint.load_training(folder)[2]["epoch"] == EPOCHS
            )
            if finished and found["kills"] < kills:  # nothing is left to be killed
                expected.hold(folder)
                shutil.rmtree(folder)
                folder.mkdir()
            assert tries < 50 * kills
        expected.hold(folder)
    found["runs that were killed and went on"] += 1
    return found


def full_disk(seed: str, expected: Expected) -> Counter:
    """One run whose disk is full at a byte: an error that names the file, and it goes on when there is room."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        step, room = draw.randrange(1, STEPS + 1), draw.randrange(expected.bytes)
        said = result_of(_full, Path(folder), step, room)
        assert folder in said, f"the error names no file: {said!r}"
        assert not list(Path(folder).glob(".*")), "half a file was left"
        whole(Path(folder))
        expected.hold(Path(folder))
    return Counter({"full disks": 1})


def two_interrupts(seed: str, expected: Expected) -> Counter:
    """One run that Ctrl-C stops, and a second Ctrl-C while it writes its checkpoint."""
    draw, pressed = random.Random(seed), 0
    step, line = draw.randrange(1, STEPS + 1), expected.of_a["save"] // EPOCHS
    while pressed < 2:  # until the line is one of this checkpoint's writing: the first one has fewer
        line = draw.randrange(line)
        with tempfile.TemporaryDirectory() as folder:
            pressed, replaced = result_of(_interrupted_twice, Path(folder), step, line)
            assert not replaced, "it went on writing"
            assert not list(Path(folder).glob(".*/*")), "half a file was left"
            whole(Path(folder))
            expected.hold(Path(folder))
    return Counter({"second Ctrl-C while a checkpoint was written": 1})


def damage(path: Path, draw: random.Random) -> str:
    """Change a file as a disk might: what was done."""
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    how = draw.choice(("bit", "cut", "zeros", "sector"))
    if how == "bit":
        data[place] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del data[place:]
    elif how == "zeros":
        data[place:] = bytes(len(data) - place)
    else:
        data[place : place + 512] = draw.randbytes(len(data[place : place + 512]))
    if bytes(data) == path.read_bytes():
        data[place] ^= 1
    path.write_bytes(data)
    return f"{how} at {place} of {len(data)}"


def damaged(seed: str, folder: Path) -> Counter:
    """The last checkpoint of a folder, damaged: what is read is the one before."""
    draw = random.Random(seed)
    path = folder / checkpoint.TRAINING
    intact = path.read_bytes()
    before = checkpoint._read_training(folder / checkpoint.PREVIOUS)
    what = damage(path, draw)
    weights, tensors, state = checkpoint.load_training(folder)
    path.write_bytes(intact)
    assert state == before[2], what
    assert equal_states(weights, before[0]), what
    assert equal_states(tensors, before[1]), what
    return Counter({"damaged checkpoints, read from the one before": 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint.log.setLevel("ERROR")  # each damaged checkpoint warns
    started, found = time.monotonic(), Counter()

    def case(function, name: str, *rest) -> None:
        seed = f"{arguments.seed} {name}"
        try:
            found.update(function(seed, *rest))
        except BaseException:
            print(f"failed: {function.__name__} with the seed {seed!r}", file=sys.stderr)
            raise
        if time.monotonic() - case.said > 30:
            case.said = time.monotonic()
            print(f"{case.said - started:.0f} s: {dict(found)}", flush=True)

    case.said = started
    with tempfile.TemporaryDirectory() as folder:
        expected = Expected(Path(folder))
        for index in range(-(-arguments.kills // len(KINDS))):
            kills = min(len(KINDS), arguments.kills - found["kills"])
            case(kill_and_go_on, f"kills {index}", kills, expected)
        for index in range(arguments.kills // 4):
            case(full_disk, f"full {index}", expected)
            case(two_interrupts, f"interrupts {index}", expected)
        for index in range(5 * arguments.kills):
            case(damaged, f"damaged {index}", Path(folder) / "0")
    seconds = time.monotonic() - started
    command = f"python -m tests.faults --kills {arguments.kills} --seed {arguments.seed}"
    what = (
        "training of 18 steps and three checkpoints, killed, interrupted or out of disk at random moments, went on "
        "each time to the weights, optimiser, generators and history of a run that nothing happened to, bit for bit"
    )
    print(counts.keep("faults", what, command, seconds, dict(found)))
    print(dict(found), f"{seconds:.0f} s")


if __name__ == "__main__":
    from tests import faults

    del __file__  # the forked processes would run it again to find what they are given: it is in tests.faults
    __spec__ = None
    faults.main()
