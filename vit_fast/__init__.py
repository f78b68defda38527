"""Vision Transformers on fused Triton kernels, forward and backward."""

from vit_fast.accelerate import accelerate, restore
from vit_fast.explain import explain
from vit_fast.model import VisionTransformer
from vit_fast.ops import use_backend
from vit_fast.pretrained import load
from vit_fast.transformers_attention import register_transformers
from vit_fast.warm import warm
from vit_fast.zoo import create_model, list_models

__version__ = "0.1.0"
__all__ = [
    "VisionTransformer",
    "accelerate",
    "create_model",
    "explain",
    "list_models",
    "load",
    "register_transformers",
    "restore",
    "use_backend",
    "warm",
]
