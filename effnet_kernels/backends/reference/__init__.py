"""The primitives in plain PyTorch: the one definition of correct, which the kernels are tested against.

``primitives.py`` has the whole of :class:`effnet_kernels.backends.base.Primitives`, forward and backward. The forward
primitives are differentiable, so that autograd says what the backward ones have to return. Where a kernel returns
several partial results, the reference returns one. Sums, statistics and vectors are float64 where maps are float64 and
float32 elsewhere; the operands of a convolution are rounded to the dtype of the maps, as a kernel's matrix unit and
torch's own convolution round them.
"""
