"""Triton kernels of fusedlora: the forward and the backward of a LoRA linear, each in one launch."""
