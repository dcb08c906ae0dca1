"""Functions that the simulator of Triton kernels (ttsem 0.1) lacks."""


def teach() -> None:
    """Adds the two functions of libdevice that our kernels call."""
    import numpy as np
    from ttsem import ops

    ops._EXTERN.setdefault("__nv_fast_fdividef", (2, np.divide))
    ops._EXTERN.setdefault("__nv_exp2f", (1, np.exp2))
