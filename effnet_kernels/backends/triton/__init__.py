"""Triton kernels and their launchers. Nothing here knows autograd or modules."""

import functools
import sys
import warnings


class TritonWarning(UserWarning):
    """Triton is missing or broken, so GPU tensors run plain PyTorch."""


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot be launched in this environment, or None. It does not say whether there is a GPU."""
    try:
        import triton.language  # noqa: F401
        from triton.language.extra import libdevice  # noqa: F401
    except Exception as error:  # a broken installation fails in many ways
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def warn_if_unavailable() -> None:
    """Warns, once in a process, where the kernels cannot be launched."""
    reason = unavailable_reason()
    if reason is not None:
        warnings.warn(f"GPU tensors run plain PyTorch: {reason}", TritonWarning, stacklevel=2)


def off_device() -> bool:
    """Whether launches are captured or simulated at the moment, so that tensors need not be on a GPU."""
    if "triton" not in sys.modules or unavailable_reason() is not None:
        return False
    from effnet_kernels.backends.triton import launch

    return launch.is_capturing() or launch.simulated()
