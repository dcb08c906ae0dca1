"""The sizes of convolutions: their padding, and what is left of a map."""

from effnet_kernels.fusion.spec import Padding


def resolve_padding(padding: int | Padding | str, size: tuple[int, int], kernel: int, stride: int) -> Padding:
    """(left, right, top, bottom) of an integer, four integers, or ``"same"`` for a map of ``size`` (H, W)."""
    if padding == "same":
        return same_padding(size[0], size[1], kernel, stride)
    if isinstance(padding, int) and padding >= 0:
        return padding, padding, padding, padding
    if isinstance(padding, (tuple, list)) and len(padding) == 4 and all(isinstance(p, int) and p >= 0 for p in padding):
        return padding[0], padding[1], padding[2], padding[3]
    raise ValueError(
        f"padding: expected an integer >= 0, (left, right, top, bottom) of integers >= 0, or 'same', got {padding!r}"
    )


def same_padding(height: int, width: int, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's SAME padding, (left, right, top, bottom): ceil(size / stride) outputs in each direction.

    An odd zero goes to the right and to the bottom.
    """
    # (outputs - 1) * stride + kernel - size, written so that it stays short for a size that a tracer leaves open.
    rows, columns = -height % stride + kernel - stride, -width % stride + kernel - stride
    if kernel < stride:
        rows, columns = max(rows, 0), max(columns, 0)
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2


def output_size(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Rows or columns of a convolution's output; raises ValueError where the kernel does not fit."""
    padded = size + before + after
    if padded < kernel:
        raise ValueError(
            f"expected a padded size of at least the kernel's {kernel}, got {padded} ({size} before padding)"
        )
    return (padded - kernel) // stride + 1


def output_map(height: int, width: int, kernel: int, stride: int, padding: Padding | str) -> tuple[int, int]:
    """Rows and columns of a convolution's output; raises ValueError where the kernel does not fit."""
    if padding == "same":
        # By its definition, which stays short where a tracer leaves sizes open.
        return -(-height // stride), -(-width // stride)
    assert not isinstance(padding, str)
    left, right, top, bottom = padding
    return output_size(height, kernel, stride, top, bottom), output_size(width, kernel, stride, left, right)
