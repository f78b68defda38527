"""Vision Transformers on fused Triton kernels, forward and backward."""

__version__ = "0.1.0"
