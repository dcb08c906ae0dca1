"""Statistics of a raw convolution output, and the BatchNorm that they fold into."""

import torch
from torch import Tensor

from effnet_kernels.reference.deferred import accumulation_dtype


def channel_statistics(y: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations (M2) of each channel of ``y`` [N, C, H, W]: [3, C].

    They are the statistics of the stored values: ``y`` has been rounded to its dtype already.
    """
    y = y.to(accumulation_dtype(y.dtype))
    mean = y.mean(dim=(0, 2, 3))
    m2 = (y - mean[:, None, None]).square().sum(dim=(0, 2, 3))
    count = torch.full_like(mean, y.shape[0] * y.shape[2] * y.shape[3])
    return torch.stack([count, mean, m2])


def fold_batch_norm(
    stats: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """BatchNorm (Ioffe and Szegedy 2015, algorithms 1 and 2) as a scale and a shift for each channel, [C] and [C].

    With ``stats`` [3, C] it normalises by the batch's statistics and moves the running ones, in place, by ``momentum``
    towards them (``running_var`` towards the unbiased variance, as torch does); without, by the running statistics.
    """
    if stats is None:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    else:
        count, mean, m2 = stats.unbind()
        var = m2 / count
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                for running, batch in ((running_mean, mean), (running_var, m2 / (count - 1))):
                    # As torch.nn.functional.batch_norm, an empty batch moves nothing.
                    moved = (1.0 - momentum) * running + momentum * batch.to(running.dtype)
                    running.copy_(torch.where(count > 0, moved, running))
    rstd = torch.rsqrt(var + eps)
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return scale, shift
