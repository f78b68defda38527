"""Somebody else's models before and after `vit_fast.accelerate`, and beside torch.compile of what they were.

python -m benchmarks.accelerated OUT.json [--batch-size 64] [--model NAME …] [--no-compile]

timm's ViT-B and L and Swin-T, transformers' DINOv2-L, DINOv3-L and CLIP-L, torchvision's vit_b_16, in bf16: inference
eager, in a CUDA graph and compiled; training steps with fused AdamW eager and compiled. Every parameter is drawn anew,
and what a form returns is held to fp64 before it is timed, all forms of a model in turn. Without a GPU three small
models run, as a rehearsal: no figure of that counts.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

import vit_fast
from benchmarks import timing, whole_models
from benchmarks.contenders import LeftOut
from benchmarks.records import record
from benchmarks.timing import DEVICE, quantiles
from tests import mend_torchvision
from vit_fast.checkpoint import replacing
from vit_fast.verify import in_a_line

FORMS = {"inference": ("", "graph", "compiled"), "training": ("", "compiled")}


class _Field(nn.Module):
    """One tensor of what a model of transformers returns."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[self.name]


def _timm(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return _Field(Dinov2Model(Dinov2Config(**LARGE, image_size=224)), "pooler_output")


def _dinov3(**sizes) -> nn.Module:
    """Without the scale that training draws for its positions: what a step returns is held to fp64."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(**sizes, num_register_tokens=4, pos_embed_rescale=None)
    return _Field(DINOv3ViTModel(config), "pooler_output")


def _clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return _Field(CLIPVisionModel(CLIPVisionConfig(**LARGE, intermediate_size=4096, patch_size=14)), "pooler_output")


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(224, 16, 12, 12, 768, 3072)


def _swin(**options) -> nn.Module:
    """Without the drop path that it has unless told: what a training step returns is held to fp64."""
    return _timm("swin_tiny_patch4_window7_224", drop_path_rate=0.0, **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm ViT-B/16": lambda: _timm("vit_base_patch16_224"),
    "timm ViT-L/16": lambda: _timm("vit_large_patch16_224"),
    "timm Swin-T": _swin,
    "transformers DINOv2-L/14": _dinov2,
    "transformers DINOv3-L/16": lambda: _dinov3(**LARGE, intermediate_size=4096),
    "transformers CLIP-L/14": _clip,
    "torchvision vit_b_16": _torchvision,
}
if DEVICE == "cpu":
    MODELS = {
        "timm ViT-Ti/16, one block": lambda: _timm("vit_tiny_patch16_224", depth=1),
        "timm Swin, one stage": lambda: _swin(embed_dim=32, depths=(2,), num_heads=(1,)),
        # As wide as there are classes of labels, which its features stand for.
        "transformers DINOv3, one block": lambda: _dinov3(**LARGE | {"num_hidden_layers": 1, "intermediate_size": 64}),
    }


def measure(name: str, training: bool, batch: int, compiling: bool = True) -> dict:
    """One line of results: microseconds a batch of each form, "before" and "after".

    What an accelerated form returns may be four times as far from fp64 as the original's, or it is wrong.
    """
    case = whole_models.ModelCase(name, 224, batch, "bf16", "training" if training else "inference")
    images, labels = whole_models.drawn(case)
    runs, errors, aside, wrong = {}, {}, {}, []
    forms = [form for form in FORMS[case.direction] if compiling or form != "compiled"]
    for when, form in itertools.product(("before", "after"), forms):
        torch._dynamo.reset()
        key = f"{when} {form}".strip()
        try:
            with torch.device(DEVICE):
                model = whole_models.draw_anew(MODELS[name]()).to(images.dtype).train(training)
            truth = whole_models.truth_of(model, images)
            if when == "after":
                vit_fast.accelerate(model, verify=False)  # what it returns is held to fp64 below
            contender = whole_models.started(model, form, case, images, labels)
            errors[key] = whole_models.error_of(contender.logits(), truth)
            if "before" not in errors:
                raise LeftOut("the original did not run, and nothing says how far from fp64 it may be")
            if not errors[key] <= 4 * errors["before"]:
                raise ValueError(f"its error is {errors[key]:.1e}, the original's {errors['before']:.1e}")
            contender.run()
            runs[key] = contender.run
        except LeftOut as reason:
            aside[key] = str(reason)
        except Exception as error:  # too little memory, or what a compiler says; a failure of ours is a fault
            aside[key] = in_a_line(error)
            wrong += [key] * (when == "after")
    samples = timing.time_in_turn(runs, timing.ROUNDS, held=False)
    return {
        **{"model": name, "batch": batch, "dtype": "bf16", "training": training},
        "us": {form: quantiles(one) for form, one in samples.items()},
        "samples": {form: [round(x, 1) for x in one] for form, one in samples.items()},
        **{"errors": errors, "aside": aside, "wrong": wrong},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--batch-size", "-b", type=int, default=1 if DEVICE == "cpu" else 64)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of both")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this one; may be repeated")
    given = parser.parse_args()
    mend_torchvision.mend()
    lines, before, ceilings = [], timing.device_state(), timing.ceilings()
    for name, training in itertools.product(given.model or MODELS, (False, True)):
        line = measure(name, training, given.batch_size, not given.no_compile)
        lines.append(line)
        rates = {form: f"{given.batch_size / q[1] * 1e6:,.0f}/s" for form, q in line["us"].items()}
        print(name, "training" if training else "inference", rates, line["wrong"], flush=True)
        state = [before, timing.device_state()]
        with replacing(given.out) as beside:
            found = record(lines, rehearsal=DEVICE == "cpu", state=state, ceilings=ceilings)
            beside.write_text(json.dumps(found))
        timing.empty_memory()


if __name__ == "__main__":
    main()
