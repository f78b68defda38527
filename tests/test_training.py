"""Training: it learns, it is what the settings say, and it goes on from any step to the same bits."""

import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import types

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import vit_fast
from tests.small_runs import TINY_FLAGS, colour_folder, equal_states, tiny_config, without_speed
from vit_fast import checkpoint, training

STEPS = 6  # of a tiny epoch on digits


def stop_after(step: int):
    def on_step(report):
        if report.step == step:
            raise KeyboardInterrupt

    return on_step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    result = training.train(tiny_config(folder, epochs=2))
    return result, checkpoint.load_training(folder)


@pytest.mark.parametrize("stops", [(1,), (4,), (STEPS,), (STEPS + 3,), (2, 5, STEPS + 1)], ids=str)
def test_a_run_goes_on_to_the_same_bits(tmp_path, uninterrupted, stops):
    whole, (weights, tensors, state) = uninterrupted
    config, resume = tiny_config(tmp_path, epochs=2), None
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            training.train(config, resume, on_step=stop_after(stop))
        resume = tmp_path
        stopped = checkpoint.load_training(tmp_path)
        assert stopped[2]["epoch"] * STEPS + stopped[2]["batch"] == stop
        assert not equal_states(stopped[0], weights)
    torch.manual_seed(99)  # what the generator did in between does not matter
    result = training.train(config, resume)
    assert equal_states(result.model.state_dict(), whole.model.state_dict())
    again = checkpoint.load_training(tmp_path)
    assert equal_states(again[0], weights)
    assert equal_states(again[1], tensors)  # the optimiser and the generators
    assert without_speed(again[2].pop("history")) == without_speed(whole.history)
    assert again[2] == {key: value for key, value in state.items() if key != "history"}
    assert equal_states(checkpoint.load(tmp_path)[0].state_dict(), weights)
    lines = (tmp_path / training.HISTORY).read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history


def test_the_seed_is_what_makes_a_run(tmp_path, uninterrupted):
    same = training.train(tiny_config(tmp_path / "same", epochs=2))
    assert equal_states(same.model.state_dict(), uninterrupted[0].model.state_dict())
    other = training.train(tiny_config(tmp_path / "other", epochs=2, seed=1))
    assert not equal_states(other.model.state_dict(), uninterrupted[0].model.state_dict())


def test_ctrl_c_leaves_a_good_checkpoint(tmp_path):
    command = [sys.executable, "-u", "-m", "vit_fast.cli", "train", "digits", "--epochs", "1000", *TINY_FLAGS.split()]
    child = subprocess.Popen(
        [*command, "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout.readline().startswith("epoch    1/1000")
    os.kill(child.pid, signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert errors == "error: stopped\n"
    assert f"go on with vit-fast train digits --resume {tmp_path}" in " ".join(output.split())
    model, _ = checkpoint.load(tmp_path)
    weights, _, state = checkpoint.load_training(tmp_path)
    assert equal_states(model.state_dict(), weights)
    assert state["epoch"] >= 1
    # It is of the very step at which the run stopped, and a run goes on from it.
    settings = training.read_settings(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        training.train(
            training.Config(output=str(tmp_path), **settings),
            tmp_path,
            on_step=stop_after(state["epoch"] * STEPS + state["batch"] + 1),
        )


def test_ctrl_c_while_held_out_pictures_are_measured(tmp_path, monkeypatch):
    """The epoch does not count: of the pictures a part was measured."""
    evaluate = training.evaluate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    monkeypatch.setattr(training, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny_config(tmp_path))
    state = checkpoint.load_training(tmp_path)[2]
    assert (state["epoch"], state["batch"], state["history"]) == (0, STEPS, [])


def test_a_folder_is_learned(tmp_path):
    data = colour_folder(tmp_path / "data")
    config = training.Config(
        str(data),
        str(tmp_path / "run"),
        model_kwargs={"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1},
        img_size=16,
        num_classes=3,
        epochs=12,
        batch_size=8,
        lr=0.01,
        warmup_epochs=1,
        workers=1,
    )
    result = training.train(config)
    assert result.accuracy == 1.0
    model, saved = checkpoint.load(tmp_path / "run")
    assert saved.classes == ("green", "red", "class 2")
    answer = model.predict([data / "red" / "0.png", data / "green" / "0.png"])
    assert answer.argmax(dim=1).tolist() == [1, 0]
    loss, accuracy = training.evaluate(model, [], torch.device("cpu"))
    assert (loss, accuracy) == (0.0, 0.0)


def test_the_record_of_an_epoch_is_what_the_model_does(tmp_path):
    """The held-out accuracy that training reports is that of `predict` on the same pictures."""
    from vit_fast.data import load_data

    result = training.train(tiny_config(tmp_path, epochs=3, lr=0.005))
    model, config = checkpoint.load(tmp_path)
    held_out = load_data("digits", config.preprocessing).held_out
    pixels = held_out.pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    probabilities = model.predict(pixels)
    right = (probabilities.argmax(dim=1) == held_out.labels).float().mean().item()
    loss = -probabilities[torch.arange(len(held_out)), held_out.labels].log().mean().item()
    assert result.accuracy == pytest.approx(right, abs=1e-6)
    assert result.history[-1]["held_out_loss"] == pytest.approx(loss, rel=1e-4)
    assert [record["step"] for record in result.history] == [6, 12, 18]


def test_the_mean_loss_is_over_pictures_and_not_over_batches(tmp_path):
    """The last batch of an epoch is smaller: 1,438 digits are 5 batches of 256 and one of 158."""
    steps = []
    result = training.train(tiny_config(tmp_path), on_step=steps.append)
    mean = sum(step.loss * step.images for step in steps) / sum(step.images for step in steps)
    assert result.history[0]["train_loss"] == pytest.approx(mean)


def test_the_model_of_a_result_is_in_evaluation_mode(uninterrupted):
    assert not any(module.training for module in uninterrupted[0].model.modules())


def test_a_step_is_what_the_settings_say(tmp_path, monkeypatch):
    """Smoothed labels, a clipped gradient, AdamW with its decay at the rate of the schedule."""
    config = tiny_config(tmp_path, epochs=2, drop_path=0.0, smoothing=0.2, clip_grad=0.3, lr=0.01, weight_decay=0.3)
    run = training._Run(config)
    monkeypatch.setattr(run.data.augment, "forward", lambda images: images)
    twin = copy.deepcopy(run.model)
    optimiser = torch.optim.AdamW(training.parameter_groups(twin, 0.3), fused=True)
    for step, (images, labels) in enumerate(run.batches()):
        for group in optimiser.param_groups:
            group["lr"] = training.learning_rate(config, step, STEPS)
        twin.zero_grad()
        F.cross_entropy(twin(run._normalise(images.float() / 255)), labels, label_smoothing=0.2).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
        optimiser.step()
        run.train_step(images, labels)
    for ours, expected in zip(run.model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_a_run_has_the_drop_path_and_the_mirrors_of_its_settings(tmp_path):
    run = training._Run(tiny_config(tmp_path, drop_path=0.3, hflip=0.25))
    assert run.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert run.data.augment[-1].p == 0.25


def test_pictures_are_augmented_before_they_are_normalised(tmp_path, monkeypatch):
    """What an affine map brings in from outside is black, which is 0 before and the mean behind."""
    run, seen = training._Run(tiny_config(tmp_path)), []
    monkeypatch.setattr(run.data.augment, "forward", lambda images: seen.append(images) or images)
    run.train_step(*next(iter(run.batches())))
    assert seen[0].dtype == torch.float32
    assert (seen[0].min(), seen[0].max()) == (0, 1)


def test_the_schedule_of_the_learning_rate():
    config = training.Config("digits", "", epochs=10, lr=1.0, min_lr=0.1, warmup_lr=0.01, warmup_epochs=2)
    rates = [training.learning_rate(config, step, 5) for step in range(51)]
    assert rates[0] == 0.01
    assert rates[5] == pytest.approx((1.0 + 0.01) / 2)  # half of the way up
    assert rates[10] == 1.0
    assert rates[30] == pytest.approx((1.0 + 0.1) / 2)  # half of the cosine
    assert rates[50] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert training.learning_rate(dataclasses.replace(config, warmup_epochs=0), 0, 5) == 1.0


def test_no_decay_on_norms_biases_positions_and_tokens():
    model = vit_fast.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1, reg_tokens=1, init_values=0.1, num_classes=2
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = (
        {names[id(parameter)] for parameter in group["params"]} for group in training.parameter_groups(model, 0.05)
    )
    assert decayed == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
    }
    assert decayed | spared == set(names.values())
    frozen = vit_fast.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1, pos_embed="sincos2d", num_classes=2
    )
    groups = training.parameter_groups(frozen, 0.05)
    assert not any(frozen.pos_embed is parameter for group in groups for parameter in group["params"])


def test_mixed_precision(tmp_path):
    """Of the model, where it is trained and where it is measured; its weights and its losses are in fp32."""
    run, seen = training._Run(tiny_config(tmp_path, amp=True)), []
    run.model.head.register_forward_hook(lambda module, args, logits: seen.append(logits.dtype))
    run.train_step(*next(run.batches()))
    held_out = next(run.held_out(types.SimpleNamespace(wanted=False)))
    training.evaluate(run.model, [held_out], run.device, run.amp)
    assert seen == [torch.bfloat16] * 2
    result = training.train(tiny_config(tmp_path, amp=True))
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    assert math.isfinite(result.history[0]["train_loss"])


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    config = tiny_config(tmp_path, lr=1e38, warmup_epochs=0, clip_grad=None)
    with pytest.raises(FloatingPointError, match="try a lower lr"):
        training.train(config)


@pytest.mark.parametrize("damage", ["cut off", "gone"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_picture_that_cannot_be_read_loses_no_step(tmp_path, split, damage):
    data = tmp_path / "data"
    for part in ("train", "val"):
        colour_folder(data / part)
    config = dataclasses.replace(tiny_config(tmp_path / "run", batch_size=2, workers=0), data=str(data))
    good = training.train(dataclasses.replace(config, output=str(tmp_path / "good")))
    broken = data / split / "green" / "7.png"
    content = broken.read_bytes()

    def break_it(step):
        broken.write_bytes(content[:20]) if damage == "cut off" else broken.unlink(missing_ok=True)

    with pytest.raises(ValueError, match=r"7\.png.*steps before it are saved: put a readable picture"):
        training.train(config, on_step=break_it)
    broken.write_bytes(content)
    went_on = training.train(config, tmp_path / "run")
    assert equal_states(went_on.model.state_dict(), good.model.state_dict())


def test_what_a_run_refuses(tmp_path, uninterrupted):
    whole = uninterrupted[0]
    config = tiny_config(whole.output, epochs=2)
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        training.train(config)
    with pytest.raises(ValueError, match=r"lr was 0\.001, got 0\.5; seed was 42, got 7; amp was None, got True"):
        training.train(dataclasses.replace(config, lr=0.5, seed=7, amp=True), whole.output)
    other = dataclasses.replace(config, data=str(colour_folder(tmp_path / "data")))
    with pytest.raises(ValueError, match="not the data that"):
        training.train(dataclasses.replace(other, output=str(tmp_path / "new")), whole.output)
    with pytest.raises(ValueError, match="no such file"):
        training.train(tiny_config(tmp_path / "run"), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output: cannot write to"):
        training.train(tiny_config(tmp_path / "file" / "run"))
    with pytest.raises(ValueError, match="num_classes: got 9, the data has 10"):
        training.train(tiny_config(tmp_path / "nine", num_classes=9))
    with pytest.raises(ValueError, match="the setting drop_path"):
        training.train(tiny_config(tmp_path / "kwargs", model_kwargs={"drop_path_rate": 0.1}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors, state: state.pop("images"), "it lacks images"),
        (lambda tensors, state: tensors.pop("generator.cpu"), "it lacks generator.cpu"),
        (lambda tensors, state: tensors.pop("optimiser.head.weight.exp_avg"), "exp_avg of head.weight is nothing"),
        (
            lambda tensors, state: tensors.update({"optimiser.head.bias.exp_avg_sq": torch.zeros(3)}),
            r"exp_avg_sq of head.bias is torch.float32 of shape \[3\]",
        ),
        (
            lambda tensors, state: tensors.update({"optimiser.head.bias.step": torch.tensor(3)}),
            "step of head.bias is torch.int64",
        ),
        *(
            (
                lambda tensors, state, dtype=dtype: tensors.update(
                    {"optimiser.head.bias.exp_avg": tensors["optimiser.head.bias.exp_avg"].to(dtype)}
                ),
                f"exp_avg of head.bias is {dtype}",
            )
            for dtype in (torch.float64, torch.bfloat16)
        ),
        (lambda tensors, state: tensors.update({"generator.cpu": torch.zeros(9)}), "a generator's state is none"),
        (
            lambda tensors, state: tensors.update({"generator.cpu": torch.zeros(9, dtype=torch.uint8)}),
            "a generator's state is none",
        ),
        *(
            (lambda tensors, state, key=key, value=value: state.update({key: value}), f"its {key} is")
            for key, value in [
                *(("settings", None), ("settings", "x"), ("data", 3), ("epoch", "x"), ("epoch", None), ("epoch", -5)),
                *(("epoch", True), ("batch", "x"), ("batch", 1.5), ("batch", -5), ("images", -5), ("images", [])),
                *(
                    ("loss_sum", "x"),
                    ("loss_sum", float("nan")),
                    ("loss_sum", 10**400),
                    ("history", "x"),
                    ("history", None),
                ),
                *(("history", [1, 2]), ("history", [{}, {}])),
            ]
        ),
        (lambda tensors, state: state["settings"].pop("smoothing"), r"smoothing was None, got 0\.1"),
        (lambda tensors, state: state.update(epoch=3), "no place in this run"),
        (lambda tensors, state: state.update(epoch=1), "no place in this run with 2 epochs behind it"),
        (lambda tensors, state: state.update(epoch=1, history=state["history"][:1], batch=5), "no place in this run"),
        (lambda tensors, state: state.update(batch=10**9, images=1), "no place in this run"),
        (lambda tensors, state: state.update(batch=1, images=10**9), "no place in this run"),
    ],
)
def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path, uninterrupted, change, says):
    """Whoever writes the file writes its digest too. Least of all with an optimiser that has forgotten."""
    folder = uninterrupted[0].output
    weights, tensors, state = checkpoint.load_training(folder)
    change(tensors, state)
    model, config = checkpoint.load(folder)
    model.load_state_dict(weights)
    (tmp_path / "damaged").mkdir()
    checkpoint.save(tmp_path / "damaged", model, config, tensors, state)
    with pytest.raises(ValueError, match=says):
        training.train(tiny_config(tmp_path / "on", epochs=2), tmp_path / "damaged")


def test_a_sum_of_losses_that_is_an_integer_past_64_bits(tmp_path, uninterrupted):
    folder = uninterrupted[0].output
    _, tensors, state = checkpoint.load_training(folder)
    checkpoint.save(tmp_path, *checkpoint.load(folder), tensors, state | {"loss_sum": 10**25})
    run = training._Run(tiny_config(tmp_path / "on", epochs=2))
    run.restore(tmp_path)
    assert run.loss_sum.item() == pytest.approx(1e25)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epochs": "2"}, "its epochs is '2'"),
        ({"batch_size": True}, "its batch_size is 'True'"),
        ({"lr": 10**400}, "its lr is '1000"),
        ({"hflip": []}, "its hflip is"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"warmup_epochs": 1e308}, r"warmup_epochs: got 1e\+308, takes 0 or more, below 2\^31"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"workers": 10**6}, r"settings that no run has: \['workers'\]"),
        ({"output": "elsewhere"}, "settings that no run has"),
        ({"model": "resnet50"}, "no architecture of that name"),
        ({"model_kwargs": {"depth": 10**9}}, "depth: the config says 1000000000, the weights are"),
        ({"model_kwargs": {"depth": 3}}, "its settings: the weights are of another architecture"),
        ({"model_kwargs": {"depth": 2, "device": "cuda"}}, "device: the config says 'cuda'"),
        ({"model_kwargs": {"num_classes": 3}}, "model_kwargs: got num_classes"),
        ({"num_classes": 10**9}, "num_classes: the config says 1000000000"),
        ({"img_size": 10**6}, "img_size: the config says"),
    ],
    ids=str,
)
def test_settings_of_a_checkpoint_are_those_of_its_weights(tmp_path, uninterrupted, change, says):
    """`vit-fast train --resume` trains with them: nothing of another size or type gets that far."""
    folder = uninterrupted[0].output
    weights, tensors, state = checkpoint.load_training(folder)
    assert training.read_settings(folder) == state["settings"]
    state["settings"] |= change
    model, config = checkpoint.load(folder)
    model.load_state_dict(weights)
    checkpoint.save(tmp_path, model, config, tensors, state)
    with pytest.raises(ValueError, match=says):
        training.read_settings(tmp_path)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    run = training._Run(tiny_config(tmp_path))
    with torch.no_grad():
        run.model.head.weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="a weight is no number"):
        run.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_first_save_that_fails_leaves_the_folder_free(tmp_path, monkeypatch):
    """A full disk: the error names the output, nothing half-written stays, and the next run may use the folder."""

    def full(tensors, path, header):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ValueError, match=r"output: cannot write .*No space left"):
        training.train(tiny_config(tmp_path))
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    training.train(tiny_config(tmp_path))


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match="device: got"):
        training.device_named(name)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"smoothing": 1.0},
        {"clip_grad": 0.0},
        {"drop_path": 1.0},
        {"hflip": 1.5},
        {"seed": -1},
        {"workers": -1},
    ],
    ids=str,
)
def test_settings_out_of_range(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name}: got {value}, takes"):
        training.Config("digits", "", **settings)
