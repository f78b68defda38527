"""A user's program, for `make types`: what the package says of its types is enough for one that is checked.

It is read, and never run.
"""

from torch import Tensor, nn
from typing_extensions import assert_type

import vit_fast
from vit_fast.accelerate import Report
from vit_fast.explain import Line


def created() -> vit_fast.VisionTransformer:
    names: list[str] = vit_fast.list_models("vit_*")
    model = vit_fast.create_model(names[0], num_classes=10, img_size=224)
    assert_type(model, vit_fast.VisionTransformer)
    return model.eval()


def looked_at(images: Tensor) -> Tensor:
    model = vit_fast.load("folder", device="cpu")
    assert_type(model, vit_fast.VisionTransformer)
    assert_type(model.predict("cat.jpg"), Tensor)
    assert_type(model.attention_maps(images, layers=[-1]), Tensor)
    return model.forward_features(images)


def accelerated(model: nn.Module, images: Tensor) -> int:
    report = vit_fast.accelerate(model, example=images)
    assert_type(report, Report)
    with vit_fast.use_backend("torch"):
        model(images)
    lines = vit_fast.explain(created())
    assert_type(lines[0], Line)
    assert_type(report[0].error, float | None)
    vit_fast.warm(created(), [64, (8, 384, 384)])
    vit_fast.register_transformers()
    return vit_fast.restore(model)
