"""Faults: killed, interrupted, without room or rights, damaged, two at once, a peer that dies: and going on."""

import errno
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import vit_fast
from tests import faults
from tests.small_runs import colour_folder, equal_states, tiny_config
from vit_fast import checkpoint, training

SEED = 1  # of what is drawn here; python -m tests.faults draws more


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return faults.Expected(tmp_path_factory.mktemp("whole"))


def test_a_run_that_is_killed_goes_on_to_the_same_bits(expected):
    found = faults.kill_and_go_on(f"{SEED} kills", 6, expected)
    assert found["kills"] == 6
    assert found["kills while a checkpoint was written"] >= 1


@pytest.mark.parametrize("index", range(2))
def test_a_full_disk(expected, index):
    """The kernel refuses what is written past a byte, as it does on a full disk: SIGXFSZ is ignored by Python."""
    faults.full_disk(f"{SEED} full {index}", expected)


def test_a_disk_that_is_full_from_the_first_byte(tmp_path):
    said = faults.result_of(faults._full, tmp_path, 1, 0)
    assert "config.json" in said, "the first file that is written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", range(2))
def test_ctrl_c_twice(expected, index):
    """The second one stops at once, in the middle of the checkpoint: the one before stays, and no part of the new."""
    faults.two_interrupts(f"{SEED} interrupts {index}", expected)


def _no_links(*_):
    raise OSError("not here")


CALLS = ((os, "fsync"), (os, "link"), (os, "replace"), (Path, "mkdir"), (Path, "write_text"), (shutil, "copyfile"))


@pytest.mark.parametrize(("owner", "call"), CALLS, ids=[call for _, call in CALLS])
def test_a_disk_that_is_full_at_any_call(stopped, tmp_path, monkeypatch, owner, call):
    """What each does that takes room: an error that names a file of the folder, which is left to go on from."""
    source = _copy(tmp_path / "source", stopped)
    run = training._Run(tiny_config(source, epochs=faults.EPOCHS))
    run.restore(source)
    real, calls, fails_at, refused = getattr(owner, call), 0, 0, 0

    def full(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == fails_at + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    if call == "copyfile":
        monkeypatch.setattr(os, "link", _no_links)
    while True:
        folder = _copy(tmp_path / str(fails_at), source)
        calls = 0
        monkeypatch.setattr(owner, call, full)
        said = ""
        try:
            run.save(folder)
        except (OSError, ValueError) as error:
            said = str(error)
        monkeypatch.setattr(owner, call, real)
        refused += bool(said)
        assert not said or str(folder) in said
        faults.whole(folder)
        assert not list(folder.glob(".*")), "a part of a file was left"
        assert checkpoint.load_training(folder)[2]["batch"] == 3
        if calls <= fails_at:
            break
        fails_at += 1
    assert fails_at >= 1
    assert refused == fails_at or call == "link"  # where a link cannot be, the file is copied


# ---- a folder that cannot be written to ----------------------------------------------------------------------------


def _without_rights(folder: Path, then, results) -> None:
    """As a user who may not write everywhere, which root may."""
    try:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
    except OSError as error:
        results.put(f"skip: {error}")
        return

    def on_epoch(record):
        folder.chmod(0o555)

    try:
        training.train(tiny_config(folder, epochs=2), None, None, on_epoch if then == "later" else None)
        results.put("it ended")
    except (OSError, ValueError) as error:
        results.put(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_folder_that_may_only_be_read(when):
    import tempfile

    with tempfile.TemporaryDirectory() as outer:  # pytest's own folders are closed to other users
        os.chmod(outer, 0o755)
        folder = Path(outer) / "run"
        folder.mkdir(mode=0o755)
        if os.getuid() == 0:
            os.chown(folder, 65534, 65534)
        folder.chmod(0o555 if when == "at once" else 0o755)
        said = faults.result_of(_without_rights, folder, when)
        folder.chmod(0o755)
        if said.startswith("skip"):
            pytest.skip(said)
        if when == "at once":
            assert said == f"ValueError: output: cannot write to {folder}: Permission denied"
            assert list(folder.iterdir()) == []
        else:
            assert said.startswith("PermissionError"), said
            assert str(folder) in said
            assert checkpoint.load_training(folder)[2]["epoch"] == 1
            faults.whole(folder)
            training.train(tiny_config(folder, epochs=2), folder)


# ---- two processes, one folder -------------------------------------------------------------------------------------


def _wait_in_a_step(config: training.Config, reached) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of what decodes pictures: it inherits what is open

    def on_step(report):
        reached.set()
        time.sleep(faults.PATIENCE_S)

    training.train(config, None, on_step)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_process_in_the_same_folder(tmp_path, workers):
    data = "digits" if not workers else str(colour_folder(tmp_path / "data"))
    settings = {"img_size": 16, "batch_size": 4, "workers": workers} if workers else {}
    kwargs = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}
    config = training.Config(data, str(tmp_path / "run"), model_kwargs=kwargs if workers else {}, epochs=1, **settings)
    reached = faults.CONTEXT.Event()
    first = faults.start(_wait_in_a_step, config, reached)
    try:
        assert reached.wait(faults.PATIENCE_S)
        with pytest.raises(ValueError, match=r"output: another process is training into .*run"):
            training.train(config)
        assert not (tmp_path / "run" / checkpoint.TRAINING).exists()
    finally:
        first.kill()
    faults.ended(first)
    training.train(config)  # at once: what a killed process leaves alive, its decoders, holds no folder
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        training.train(config)


# ---- a damaged checkpoint ------------------------------------------------------------------------------------------


def _copy(folder: Path, source: Path) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def stopped(expected, tmp_path_factory):
    """A run that was stopped in its third epoch: its last checkpoint is of step 15, the one before of step 12."""
    folder = tmp_path_factory.mktemp("stopped")

    def on_step(report):
        if report.step == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(tiny_config(folder, epochs=faults.EPOCHS), None, on_step)
    return folder


def test_a_damaged_checkpoint_is_left_for_the_one_before(expected, stopped, tmp_path, caplog):
    folder = _copy(tmp_path / "run", stopped)
    assert checkpoint.load_training(folder)[2]["batch"] == 3
    assert not caplog.records
    faults.damage(folder / checkpoint.TRAINING, random.Random(SEED))
    with caplog.at_level(logging.WARNING):
        assert (checkpoint.load_training(folder)[2]["epoch"], checkpoint.load_training(folder)[2]["batch"]) == (2, 0)
    assert str(folder / checkpoint.TRAINING) in caplog.text
    assert "going on from the checkpoint before" in caplog.text
    expected.hold(folder)


@pytest.mark.parametrize("index", range(10))
def test_no_damage_goes_unseen(stopped, tmp_path, index):
    """One bit of one weight is enough."""
    faults.damaged(f"{SEED} damaged {index}", _copy(tmp_path / "run", stopped))


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(stopped, tmp_path, monkeypatch):
    """Going on writes at once: a process that is killed then must leave one that can be read."""
    folder = _copy(tmp_path / "run", stopped)
    faults.damage(folder / checkpoint.TRAINING, random.Random(SEED))
    before = checkpoint._read_training(folder / checkpoint.PREVIOUS)[2]

    def stop(source, target):
        if os.path.basename(target) == checkpoint.TRAINING:
            raise OSError("killed here")
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="killed here"):
        training.train(tiny_config(folder, epochs=faults.EPOCHS), folder)
    assert checkpoint.load_training(folder)[2] == before


def test_both_are_damaged(stopped, tmp_path):
    folder = _copy(tmp_path / "run", stopped)
    (folder / checkpoint.PREVIOUS).write_bytes(b"")
    (folder / checkpoint.TRAINING).write_bytes((folder / checkpoint.TRAINING).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"training\.safetensors.*nor can the checkpoint before be read.*previous"):
        training.train(tiny_config(folder, epochs=faults.EPOCHS), folder)


def test_the_checkpoint_before_is_kept_where_there_are_no_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _no_links)
    training.train(tiny_config(tmp_path, epochs=2))
    assert checkpoint._read_training(tmp_path / checkpoint.PREVIOUS)[2]["epoch"] == 1
    assert checkpoint._read_training(tmp_path / checkpoint.TRAINING)[2]["epoch"] == 2


# ---- two processes, one model --------------------------------------------------------------------------------------

MODEL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONFIG = checkpoint.Config("vit_tiny_patch16_224", MODEL, tuple("abcde"), {"mean": [0.5] * 3, "std": [0.5] * 3})


def _batch(step: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 16, 16, generator=draw).to(dtype), torch.randint(5, (8,), generator=draw)


def _step(model, optimiser, step: int, rank: int = 0, of: int = 1, dtype=torch.float32) -> float:
    images, labels = (tensor.chunk(of)[rank] for tensor in _batch(step, dtype))
    optimiser.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimiser.step()
    return loss.item()


def _join(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)


def _leave(rank: int, said: str, results) -> None:
    """The end of a process that has done its part, or says why it could not."""
    results.put((rank, said))
    if not said:
        torch.distributed.destroy_process_group()
    # Past the destructors of what was wrapped: at times one waits without end for gloo's threads (torch 2.13), which is
    # nothing that these tests are about.
    os._exit(0)


def _data_parallel(rank: int, meeting: str, folder: Path, steps: int, dies_at: int, results) -> None:
    """A training loop under DDP with the parts that `train` is made of; the second process dies in a step."""
    _join(rank, meeting)
    torch.manual_seed(0)
    model = CONFIG.build()
    optimiser = torch.optim.AdamW(training.parameter_groups(model, 0.05), lr=1e-3)
    first = 0
    if (folder / checkpoint.TRAINING).exists():
        weights, tensors, state = checkpoint.load_training(folder)
        checkpoint.load_weights(model, weights)
        for name, parameter in model.named_parameters():
            found = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            optimiser.state[parameter] = found
        first = state["step"]
    wrapped, said = torch.nn.parallel.DistributedDataParallel(model), ""
    try:
        for step in range(first, steps):
            if (rank, step) == (1, dies_at):
                model.head.weight.register_hook(lambda gradient: faults.kill_oneself())  # in the backward pass
            _step(wrapped, optimiser, step, rank, 2)
            if rank == 0:
                tensors = {
                    f"{key}.{name}": value
                    for name, parameter in model.named_parameters()
                    for key, value in optimiser.state[parameter].items()
                }
                checkpoint.save(folder, model, CONFIG, tensors, {"step": step + 1})
    except RuntimeError as error:
        said = str(error)
    _leave(rank, said, results)


def _run_both(target, folder: Path, *arguments) -> tuple[dict[int, object], list, float]:
    """(what each process said, their exit statuses, seconds)"""
    meeting, results = str(folder.with_suffix(f".{time.monotonic_ns()}")), faults.CONTEXT.SimpleQueue()
    started = time.monotonic()
    processes = [faults.start(target, rank, meeting, folder, *arguments, results) for rank in range(2)]
    statuses = [faults.ended(process) for process in processes]
    said = {}
    while not results.empty():
        rank, word = results.get()
        said[rank] = word
    return said, statuses, time.monotonic() - started


def test_data_parallel_when_a_process_is_killed(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    said, statuses, _ = _run_both(_data_parallel, whole, 6, -1)
    assert (said, statuses) == ({0: "", 1: ""}, [0, 0])
    said, statuses, seconds = _run_both(_data_parallel, broken, 6, 3)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] == 0
    assert "peer" in said[0], f"it does not say that the other process is gone: {said[0]}"
    assert seconds < 60
    assert checkpoint.load_training(broken)[2] == {"step": 3}
    said, statuses, _ = _run_both(_data_parallel, broken, 6, -1)
    assert (said, statuses) == ({0: "", 1: ""}, [0, 0])
    for one, other in zip(checkpoint.load_training(broken)[:2], checkpoint.load_training(whole)[:2]):
        assert equal_states(one, other)


def _sharded(rank: int, meeting: str, folder: Path, results) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    _join(rank, meeting)
    model = _drawn()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    half = model.blocks[0].mlp.fc1.weight.to_local()
    assert 2 * half.numel() == model.blocks[0].mlp.fc1.weight.numel()
    losses = torch.tensor([_step(model, _sgd(model), step, rank, 2) for step in range(10)])
    torch.distributed.all_reduce(losses)
    state = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    if rank == 0:
        checkpoint.write_weights(folder / checkpoint.WEIGHTS, state | {"losses": losses / 2})
    _leave(rank, "", results)


def _drawn(dtype=torch.float32):
    torch.manual_seed(0)
    return vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **MODEL, init_values=0.1).to(dtype)


def _sgd(model):
    # AdamW divides by the gradient's own size: where that is nothing but rounding (keys' biases) so is the step.
    return torch.optim.SGD(model.parameters(), lr=1.0)


def test_sharded_per_block_trains_to_the_numbers_of_one_process(tmp_path):
    said, statuses, _ = _run_both(_sharded, tmp_path)
    assert (said, statuses) == ({0: "", 1: ""}, [0, 0])
    sharded = checkpoint.read_tensors(tmp_path / checkpoint.WEIGHTS)[0]

    def alone(dtype) -> dict[str, torch.Tensor]:
        model = _drawn(dtype)
        losses = [_step(model, _sgd(model), step, dtype=dtype) for step in range(10)]
        return {**model.state_dict(), "losses": torch.tensor(losses, dtype=dtype)}

    truth, single = alone(torch.float64), alone(torch.float32)
    start, moved = _drawn(torch.float64).state_dict(), 0.0
    for name, true in truth.items():
        unit = true.abs().max() * 2.0**-23
        allowed = 4 * (single[name].double() - true).norm() + unit * true.numel() ** 0.5
        assert (sharded[name].double() - true).norm() <= allowed, name
        moved += (true - start[name]).norm().item() if name in start else 0.0
    assert moved > 1, "nothing was learned that could differ"


def _killed_while_safetensors_writes(folder: Path) -> None:
    import safetensors.torch

    def half(tensors, path, header):
        (path.parent / ".tmpAbCdEf").write_bytes(b"half")  # as it does itself
        faults.kill_oneself()

    safetensors.torch.save_file = half
    faults.go_on(folder)


def test_what_a_kill_leaves_of_safetensors_own_is_cleared_away(expected, tmp_path):
    """As large as a checkpoint, under a name that no later write takes again."""
    assert faults.ended(faults.start(_killed_while_safetensors_writes, tmp_path)) == -signal.SIGKILL
    assert list(tmp_path.rglob(".tmpAbCdEf"))
    expected.hold(tmp_path)
    assert not list(tmp_path.rglob(".tmpAbCdEf"))
