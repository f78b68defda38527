"""The command line as a person types it."""

import contextlib
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from PIL import Image
from typer.testing import CliRunner

import vit_fast
from tests.small_runs import TINY_FLAGS, bomb, colour_folder, picture
from vit_fast import checkpoint, cli, inference, training, weights

ZOO_MODEL = "test_vit"  # the smallest there is


def run(*arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command, the texts without line breaks."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


def in_a_shell(line: str, folder, **environment) -> subprocess.CompletedProcess:
    """The installed command, typed in a folder."""
    command = [sys.executable, "-m", "vit_fast.cli", *shlex.split(line)]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a person has trained a small model on a folder of pictures."""
    folder = tmp_path_factory.mktemp("work")
    colour_folder(folder / "pictures")
    done = in_a_shell(
        "train pictures --epochs 8 --output run --img-size 16 --model-kwargs patch_size=8 -b 8 --lr 0.01 -j 0"
        " --warmup-epochs 1 --model-kwargs embed_dim=16 --model-kwargs depth=2 --model-kwargs num_heads=2",
        folder,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


@pytest.fixture(scope="module")
def zoo_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "weights.safetensors"
    model = vit_fast.create_model(ZOO_MODEL, num_classes=7)
    safetensors.torch.save_file(model.state_dict(), path)
    return path, model


def test_train_says_what_it_does(trained):
    folder, output = trained
    lines = output.splitlines()
    assert len(lines) == 10
    assert re.fullmatch(r"epoch 8/8   loss \d\.\d{3}   held out 100\.0 %   [\d,]+ images/s", lines[7])
    assert lines[8:] == ["held-out accuracy: 100.0 %", "checkpoint: run"]
    assert len((folder / "run" / training.HISTORY).read_text().splitlines()) == 8


def test_classify_prints_a_table(trained):
    folder, _ = trained
    code, output, errors = run("classify", folder / "run", folder / "pictures" / "red" / "1.png")
    assert (code, errors) == (0, "")
    assert re.search(r"1\.png red \d+\.\d % █+ green \d+\.\d %", output)


def test_classify_for_machines(trained):
    folder, _ = trained
    done = in_a_shell("classify run pictures/green pictures/red/0.png --json", folder)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert [one["image"] for one in answer] == [f"pictures/green/{i}.png" for i in range(10)] + ["pictures/red/0.png"]
    assert [one["top"][0]["class"] for one in answer] == ["green"] * 10 + ["red"]
    model, config = checkpoint.load(folder / "run")
    for one in answer:
        probabilities = model.predict(folder / one["image"])[0]
        for rank in one["top"]:
            expected = probabilities[config.classes.index(rank["class"])].item()
            assert rank["probability"] == pytest.approx(expected, abs=1e-6)
        assert sum(rank["probability"] for rank in one["top"]) == pytest.approx(1, abs=1e-6)


def test_a_picture_named_twice_is_answered_twice(trained):
    folder, _ = trained
    image = folder / "pictures" / "red" / "0.png"
    code, output, _ = run("classify", folder / "run", image, image, "--json")
    assert code == 0
    first, second = json.loads(output)
    assert first == second


def test_no_name_commands_the_terminal(trained, tmp_path):
    """A file of a model says what its classes are called, and an archive what its pictures are."""
    folder, _ = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["classes"] = ["\x1b[2Jred", "\x9b2Jgreen\x07"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    image = tmp_path / "\x1b]0;title\x07.png"
    shutil.copy(folder / "pictures" / "red" / "0.png", image)
    code, output, _ = run("classify", tmp_path / "run", image)
    assert code == 0
    assert all(text in output for text in ("?[2Jred", "?2Jgreen?", "?]0;title?.png"))
    image.write_text("")
    _, output, errors = run("classify", tmp_path / "run", image)
    assert "?]0;title?.png: no picture" in errors
    assert (output + errors).isprintable()


def test_attend_takes_any_name_of_a_class(trained, tmp_path):
    """A dollar sign would be mathematics to matplotlib."""
    folder, _ = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["classes"] = [r"$\x$", "a $ b $ c"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    image = folder / "pictures" / "red" / "0.png"
    code, _, errors = run("attend", tmp_path / "run", image, "-o", tmp_path / "looked.png")
    assert code == 0, errors
    assert (tmp_path / "looked.png").stat().st_size


def test_classify_with_a_name_and_weights(zoo_weights, tmp_path):
    weights, model = zoo_weights
    image = picture(tmp_path / "a.png", size=(50, 40))
    code, output, _ = run("classify", ZOO_MODEL, image, "--checkpoint", weights, "--json")
    top = json.loads(output)[0]["top"]
    expected = model.eval().predict(image)[0]
    assert (code, len(top)) == (0, 5)
    assert [int(one["class"]) for one in top] == expected.topk(5).indices.tolist()


def test_one_broken_picture_harms_no_other(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "broken.png").write_text("")
    code, output, errors = run("classify", folder / "run", tmp_path, folder / "pictures" / "red" / "0.png", "--json")
    assert code == 1
    assert [one["top"][0]["class"] for one in json.loads(output)] == ["red"]
    assert re.fullmatch(r"error: \S+broken\.png: no picture that can be read, takes JPEG.*", errors)


def test_a_picture_without_memory_for_it_harms_no_other(trained, tmp_path, monkeypatch):
    folder, _ = trained
    opened = inference.open_image

    def no_memory(path, *args):
        if path.name == "1.png":
            raise MemoryError(f"{path}: no memory for the picture")
        return opened(path, *args)

    monkeypatch.setattr(inference, "open_image", no_memory)
    pictures = [folder / "pictures" / "red" / name for name in ("1.png", "0.png")]
    code, output, errors = run("classify", folder / "run", *pictures, "--json")
    assert code == 1
    assert [one["top"][0]["class"] for one in json.loads(output)] == ["red"]
    assert re.fullmatch(r"error: \S+1\.png: no memory for the picture", errors)


@pytest.mark.parametrize("how", [[], ["--json"]], ids=["table", "json"])
def test_an_answer_that_is_not_finite_harms_no_other(trained, monkeypatch, how):
    folder, _ = trained
    answer = torch.tensor([[math.nan, math.nan], [0.25, 0.75]])
    monkeypatch.setattr(vit_fast.VisionTransformer, "predict", lambda model, images: answer)
    pictures = [folder / "pictures" / "red" / name for name in ("1.png", "0.png")]
    code, output, errors = run("classify", folder / "run", *pictures, *how)
    assert code == 1
    assert "0.png" in output
    assert "1.png" not in output
    assert re.fullmatch(r"error: \S+1\.png: the model's answer is not finite: its weights hold NaN, or .*", errors)


def test_a_map_of_an_answer_that_is_not_finite(trained, tmp_path):
    folder, _ = trained
    model, config = checkpoint.load(folder / "run")
    torch.nn.init.constant_(model.norm.bias, math.nan)
    checkpoint.save(tmp_path, model, config, {}, {})
    code, _, errors = run("attend", tmp_path, folder / "pictures" / "red" / "1.png", "-o", tmp_path / "a.png")
    assert (code, (tmp_path / "a.png").exists()) == (1, False)
    assert "1.png: the model's answer is not finite" in errors


def test_attend(trained, zoo_weights, tmp_path):
    folder, _ = trained
    images = [folder / "pictures" / "red" / f"{index}.png" for index in range(2)]
    code, output, errors = run("attend", folder / "run", *images, "-o", tmp_path / "a.png")
    assert (code, errors) == (0, "")
    assert output == str(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as figure:
        assert figure.width > figure.height > 300  # two rows of picture, rollout and two heads
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 100
    code, _, _ = run("attend", ZOO_MODEL, images[0], "-o", tmp_path / "b.svg", "--checkpoint", zoo_weights[0])
    assert code == 0
    assert "<svg" in (tmp_path / "b.svg").read_text()


def test_the_maps_that_are_drawn_are_the_models(trained):
    from vit_fast import maps

    folder, _ = trained
    model, _ = checkpoint.load(folder / "run")
    path = folder / "pictures" / "red" / "0.png"
    looked = maps.look(model, path)
    assert looked.picture.shape == (16, 16, 3)
    assert looked.heads.shape == (2, 2, 2)
    assert torch.allclose(looked.probabilities, model.predict(path)[0])
    images = looked.picture.permute(2, 0, 1)[None] / 127.5 - 1  # mean and std of the model are 0.5
    expected = model.attention_maps(images, layers=[-1])[0, 0, :, 0, 1:].reshape(2, 2, 2)
    assert torch.allclose(looked.heads, expected, atol=1e-5)
    assert torch.allclose(looked.rollout, model.rollout_map(images)[0], atol=1e-5)


def test_resume(tmp_path):
    code, _, _ = run("train", "digits", "--epochs", 1, "--output", tmp_path / "one", *TINY_FLAGS.split(), "--seed", 3)
    assert code == 0
    code, output, _ = run("train", "digits", "--resume", tmp_path / "one", "--output", tmp_path / "two")
    assert code == 0
    assert output.startswith("held-out accuracy")  # nothing was left to do: the settings are those of the first run
    assert (tmp_path / "two" / checkpoint.WEIGHTS).read_bytes() == (tmp_path / "one" / checkpoint.WEIGHTS).read_bytes()
    code, _, errors = run("train", "digits", "--resume", tmp_path / "one", "--seed", 4)
    assert (code, errors) == (1, "error: resume: a run goes on with its own settings: seed was 3, got 4")


def test_no_limit_of_the_gradient(tmp_path):
    code, _, errors = run("train", "digits", *TINY_FLAGS.split(), "--epochs", 1, "--clip-grad", 0, "--output", tmp_path)
    assert (code, errors) == (0, "")
    assert training.read_settings(tmp_path)["clip_grad"] is None


def test_convert_takes_the_number_of_heads(zoo_weights, tmp_path):
    path, model = zoo_weights
    code, _, errors = run("convert", path, tmp_path / "a.npz", "--to", "jax", "--num-heads", 4)
    assert (code, errors) == (0, "")
    query = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    assert weights.read(tmp_path / "a.npz")[query].shape == (model.embed_dim, 4, model.embed_dim // 4)


def test_models():
    code, output, _ = run("models", "deit3_s*")
    assert (code, output.split()) == (0, ["deit3_small_patch16_224", "deit3_small_patch16_384"])
    assert run("models")[1].split() == vit_fast.list_models()
    code, _, errors = run("models", "vit_bse_patch16_224")
    assert code == 1
    assert "the nearest are vit_base_patch16_224" in errors


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="a terminal to write to is a Unix one")
def test_models_counts_timms_weights_in_a_terminal():
    reader, writer = os.openpty()
    command = [sys.executable, "-m", "vit_fast.cli", "models"]
    with open(reader, errors="replace") as terminal:
        child = subprocess.Popen(command, stdout=writer, env={**os.environ, "COLUMNS": "200"})
        os.close(writer)
        lines = []
        with contextlib.suppress(OSError):  # what a terminal says at its end
            for line in terminal:
                lines.append(line)
        assert child.wait() == 0
    assert "156 architectures, which have 312 of the 333 pretrained weights of timm's" in lines[-1]


def test_env_runs_every_kernel():
    code, output, errors = run("env", "--device", "cpu")
    assert (code, errors) == (0, "")
    assert f"torch {importlib.metadata.version('torch')}" in output  # torch.__version__ may add the build
    assert "backend PyTorch (a tensor on cpu" in output
    for name in vit_fast.ops.__all__:
        if name != "use_backend":
            assert re.search(rf"\b{name} float32 \d\.\de-\d+ ok", output), name


@pytest.mark.parametrize(("chosen", "said"), [("torch", "PyTorch"), ("triton", "Triton")])
def test_env_says_what_was_chosen(monkeypatch, chosen, said):
    from vit_fast import verify

    monkeypatch.setattr(verify, "report", lambda device: ([], "in a test"))
    with vit_fast.use_backend(chosen):
        assert f"backend {said} (VIT_FAST_BACKEND)" in run("env", "--device", "cpu")[1]


def test_who_reads_no_further_gets_no_error():
    command = [sys.executable, "-m", "vit_fast.cli", "models"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_another_broken_pipe_is_an_error(monkeypatch):
    def broken(device):
        raise BrokenPipeError("a worker is gone")

    from vit_fast import verify

    monkeypatch.setattr(verify, "report", broken)
    monkeypatch.setattr(cli, "_reader_is_gone", lambda: False)  # stdout is none here
    code, _, errors = run("env", "--device", "cpu")
    assert code == 1
    assert errors.startswith("error: a worker is gone")


def test_env_tells_a_wrong_kernel(monkeypatch):
    from vit_fast import verify

    wrong = [{"op": "mlp", "dtype": "float32", "error": 0.1, "agrees": False}]
    monkeypatch.setattr(verify, "report", lambda device: (wrong, "in a test"))
    code, output, errors = run("env", "--device", "cpu")
    assert code == 1
    assert "mlp float32 1.0e-01 NOT" in output
    assert errors.startswith("error: a kernel does not agree with PyTorch")


def test_help_names_the_flags_of_timm():
    result = CliRunner().invoke(cli.app, ["train", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    flags = "--batch-size -b --lr --weight-decay --warmup-epochs --smoothing --clip-grad --drop-path --img-size"
    flags += " --num-classes --seed --amp --resume --workers -j --model --model-kwargs --epochs --output --hflip"
    assert not [flag for flag in flags.split() if flag not in result.stdout]


def _pickle(folder):
    torch.save({"w": torch.ones(1)}, folder / "weights.pt")
    return f"classify {ZOO_MODEL} pictures/red/0.png --checkpoint weights.pt"


def _cut_off(folder):
    path = folder / "run" / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    return "classify run pictures/red/0.png"


def _no_picture(folder):
    (folder / "a.png").write_text("text")
    return "attend run a.png -o b.png"


def _bomb(folder):
    bomb(folder / "a.png")
    return "classify run a.png"


def _one_class(folder):
    picture(folder / "data" / "cats" / "a.png")
    return "train data --epochs 1 --output new"


def _no_class(folder):
    (folder / "data").mkdir()
    return "train data --epochs 1 --output new"


def _broken(workers):
    def make(folder):
        for path in (folder / "pictures" / "red").iterdir():
            path.write_bytes(path.read_bytes()[:60])
        return f"train pictures --epochs 1 --output new --img-size 16 {TINY_FLAGS} -j {workers}"

    return make


def _line(line):
    return lambda folder: line


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_pickle, "weights.pt: refused, a pickle can run any code"),
        (_cut_off, "model.safetensors: cut off, or no safetensors file"),
        (_no_picture, "a.png: no picture that can be read"),
        (_bomb, "a.png: refused, it has"),
        (_one_class, "data: takes two subfolders or more, one a class, found one class, 'cats'"),
        (_no_class, "data: takes two subfolders or more, one a class, found none"),
        (_broken(0), ".png: the picture is damaged or cut off"),
        (_broken(1), ".png: the picture is damaged or cut off"),
        (_line("train gone --epochs 1 --output new"), "gone: there is no such folder"),
        (_line("train digits --epochs 1"), "--output: a folder for the checkpoint is needed"),
        (_line("train digits --epochs 1 --output pictures/red/0.png/new"), "output: cannot write to"),
        (_line("train digits --epochs 1 --output run"), "run holds a checkpoint already"),
        (_line("train digits --epochs 1 --output new --model vit_tny_patch16_224"), "the nearest are vit_tiny_patch16"),
        (_line("train digits --epochs 1 --output new --model-kwargs depth"), "got 'depth', takes NAME=VALUE"),
        (_line("train digits --epochs 1 --output new --model-kwargs num_heads=3"), "num_heads: got 3, takes a divisor"),
        (_line("train digits --epochs 0 --output new"), "epochs: got 0, takes 1 or more"),
        (_line("train digits --resume pictures"), "training.safetensors: no such file"),
        (_line("classify vit_tny pictures"), "got 'vit_tny', no architecture of that name"),
        (_line(f"classify {ZOO_MODEL} pictures"), "its weights are not here; give them with --checkpoint"),
        (_line("classify run/gone pictures"), "run/gone: no such file or folder"),
        (_line("classify pictures pictures"), "pictures: no checkpoint"),
        (_line("classify run gone.png"), "gone.png: no such file or folder"),
        (_line(f"classify {ZOO_MODEL} pictures --checkpoint run/model.safetensors"), "says what it is of"),
        (_line("attend run pictures -o a.txt"), "a.txt: got the suffix '.txt', takes one of ."),
        (_line("attend run pictures -o gone/a.png"), "output: cannot write gone/a.png: No such file"),
        (_line("attend run pictures -o run/../pictures/red/0.png"), "--output: got run/../pictures/red/0.png"),
        (_line("env --device gpu"), "gpu"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_1(trained, tmp_path, monkeypatch, make, says):
    source, _ = trained
    for name in ("run", "pictures"):
        subprocess.run(["cp", "-r", str(source / name), str(tmp_path / name)], check=True)
    monkeypatch.chdir(tmp_path)
    line = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(cli.app, shlex.split(line))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert not result.stdout
    new = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert new in ([], [tmp_path / "new"])  # at most an empty folder for the output


def test_version():
    assert run("--version") == (0, f"vit-fast {importlib.metadata.version('vit-fast')}", "")


def test_convert_names_the_folder_that_is_not_there(trained, tmp_path):
    folder, _ = trained
    for name in ("a.safetensors", "a.npz"):
        code, _, errors = run("convert", folder / "run", tmp_path / "gone" / name, "--to", "timm")
        assert (code, errors) == (1, f"error: [Errno 2] No such file or directory: '{tmp_path / 'gone'}'")


def test_without_the_extra_it_says_what_to_install(tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError('No module named typer')")
    done = in_a_shell("models", tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "vit-fast: No module named typer; the command line needs more: pip install 'vit-fast[cli]'"
    )


def test_the_package_alone_imports_nothing_of_the_command_line():
    code = (
        "import sys, vit_fast, vit_fast.inference, vit_fast.data, vit_fast.training;"
        "print([n for n in ('PIL', 'typer', 'rich', 'sklearn', 'kornia', 'matplotlib', 'triton') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_kernels_that_do_not_run_are_an_error(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "own.json").write_text("{")
    done = in_a_shell("env --device cpu", tmp_path, VIT_FAST_TILES=str(tmp_path / "own.json"), TRITON_INTERPRET="0")
    assert done.returncode == 1
    assert "error: the kernels did not run in Triton's interpreter: ValueError" in done.stderr
    assert "own.json: got no tile table" in done.stderr
