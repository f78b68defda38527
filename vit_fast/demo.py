"""`python -m vit_fast.demo`: train on real scanned digits, classify scans never seen, see what the model looked at.

Every step is a command of `vit-fast` that is printed before it runs. What it makes stays in demo-output/.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from vit_fast.ops.backend import triton_is_missing

# Three seeds reach 98.6 to 99.4 %, and how a processor rounds its sums moves a run as far as a seed does.
LEAST_ACCURACY = 0.95
LARGEST_DIFFERENCE = 1e-4  # of a probability, between PyTorch and the kernels, both in fp32
SHOWN = (3, 5, 8)  # digits of the attention picture
TRAIN = ("--epochs", "80", "--lr", "0.002", "--drop-path", "0.2", "--seed", "42")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vit_fast.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for all that the demo makes")
    parser.add_argument("--picture", type=Path, help="also write the attention picture here")
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)  # so small a model gains little from a second, and waits long for one that is kept busy
    output = arguments.output
    model, digits = output / "model", output / "digits"
    for folder in (model, digits):
        remove_earlier(folder)

    print("1. Train on four fifths of scikit-learn's 1,797 scanned digits; a fifth of each digit is held out.\n")
    vit_fast("train", "digits", *TRAIN, "--output", model)
    history = [json.loads(line) for line in (model / "history.jsonl").read_text().splitlines()]
    accuracy = history[-1]["held_out_accuracy"]
    if accuracy < LEAST_ACCURACY:
        sys.exit(f"the held-out accuracy is below {100 * LEAST_ACCURACY:.0f} %")

    print("\n2. Classify held-out scans from picture files.\n")
    files = write_digits(digits)
    vit_fast("classify", model, digits, "--topk", 2)

    print("3. Classify one of them with the Triton kernels, interpreted on the CPU by a process of its own.\n")
    compare(model, files[SHOWN[0]])

    print("\n4. See what the model looked at.\n")
    picture, curve = output / "attention.png", output / "training.png"
    vit_fast("attend", model, *(files[digit] for digit in SHOWN), "-o", picture)
    from vit_fast import maps

    maps.draw_history(history, curve)
    print(curve)
    if arguments.picture:
        shutil.copyfile(picture, arguments.picture)
        print(arguments.picture)
    print(f"\nThe model is in {model}, the scans are in {digits}. All of it took {time.monotonic() - started:.0f} s.")


def remove_earlier(folder: Path) -> None:
    """Remove a folder of an earlier demo; refuse one that holds anything else."""
    if not folder.exists():
        return
    checkpoint = r"\.?(config\.json|(model|training(\.previous)?)\.safetensors|history\.jsonl)(\.tmp)?"
    ours = re.compile(rf"{checkpoint}|\d-scan-\d+\.png")
    foreign = [path.name for path in folder.iterdir() if not ours.fullmatch(path.name)]
    if foreign:
        sys.exit(f"{folder} holds {foreign[0]}, which no demo made; name another folder with --output")
    shutil.rmtree(folder)


def vit_fast(*arguments) -> None:
    """Show a command of the command line, and run it here."""
    from vit_fast import cli

    words = [str(argument) for argument in arguments]
    print("$ vit-fast", *words, flush=True)
    code = cli.app(words, standalone_mode=False)
    if code:
        sys.exit(code)


def write_digits(folder: Path) -> list[Path]:
    """One held-out scan of each digit, as a PNG of 8 x 8 pixels; the name says which digit it is."""
    from PIL import Image

    from vit_fast.data import load_digits, split

    images, labels = load_digits()
    _, held_out = split([str(index) for index in range(len(labels))], labels.tolist())
    folder.mkdir(parents=True)
    files = []
    for digit in range(10):
        index = next(index for index in held_out if labels[index] == digit)
        files.append(folder / f"{digit}-scan-{index}.png")
        Image.fromarray(images[index].numpy()).save(files[-1])
    return files


def compare(model: Path, picture: Path) -> None:
    """Classify a picture in PyTorch and in the interpreted kernels, and print how far the probabilities are apart."""
    if triton_is_missing():
        print("skipped: triton is not installed here")
        return
    command = [sys.executable, "-m", "vit_fast.cli", "classify", str(model), str(picture), "--topk", "10", "--json"]
    answers = []
    for settings in ({"VIT_FAST_BACKEND": "torch"}, {"VIT_FAST_BACKEND": "triton", "TRITON_INTERPRET": "1"}):
        variables = " ".join(f"{name}={value}" for name, value in settings.items())
        print("$", variables, "vit-fast", *command[3:], flush=True)
        # NumPy, by which the interpreter computes, warns of what masked keys make of infinities; a GPU is silent.
        silent = {"PYTHONWARNINGS": "ignore::RuntimeWarning"}
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **silent, **settings}
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if child.returncode:
            sys.exit(child.returncode)
        top = json.loads(child.stdout)[0]["top"]
        print(f"  a {top[0]['class']} with {100 * top[0]['probability']:.4f} %")
        answers.append({one["class"]: one["probability"] for one in top})
    difference = max(abs(answers[0][name] - answers[1][name]) for name in answers[0])
    print(f"PyTorch and the kernels agree: no probability differs by more than {difference:.1e}")
    if not difference <= LARGEST_DIFFERENCE:
        sys.exit(f"they do not agree: more than {LARGEST_DIFFERENCE:.0e}")


if __name__ == "__main__":
    main()
