"""Kernels in Triton. Nothing here is imported before `attention_kernels` has found that Triton and a GPU are there."""
