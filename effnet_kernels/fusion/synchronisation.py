"""BatchNorms whose batch is spread over processes: what they exchange, as vectors of channels.

Statistics are gathered and merged by Chan's formula, as those of tiles are, instead of summed: so shards may differ in
size, and nothing cancels. Nothing waits for the host.
"""

from typing import Any

from torch import Tensor
from torch import distributed as dist

from effnet_kernels.fusion.spec import BatchNorm, Layer


def group_of(norm: BatchNorm | None) -> "dist.ProcessGroup | None":
    """The processes that share the batch; None where there is one, or torch.distributed has not begun."""
    if norm is None or norm.process_group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    name: Any = norm.process_group
    group = dist.group.WORLD if name == "" else dist.distributed_c10d._resolve_process_group(name)
    return group if group is not None and group.size() > 1 else None


def is_synchronised(layer: Layer) -> bool:
    """Whether a layer normalises by the statistics of several processes."""
    return layer.batch_statistics and group_of(layer.norm) is not None


def gather_statistics(statistics: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Count, mean and M2 [3, C] of each process as partials [processes, 3, C]."""
    rows, channels = statistics.shape
    gathered = statistics.new_empty(group.size() * rows, channels)
    # The name since torch 2.14, which warns about the one before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, statistics.contiguous(), group=group)
    return gathered.view(-1, rows, channels)


def add_up(sums: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The sums of all processes; ``sums`` stays as it is."""
    total = sums.clone()
    dist.all_reduce(total, group=group)
    return total
