"""The Triton kernels, one file a fused op. They know triton and torch, and nothing of vit_fast."""
