"""Kernels, in Triton's language: compiled by Triton, never called as Python."""
