"""`efficientnet_pytorch`'s EfficientNets, and the copy of them in `segmentation_models_pytorch`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effnet_kernels.fusion.lowering import ChainSpec
from effnet_kernels.interop.adapters import (
    FLATTEN,
    Adapter,
    BlockReader,
    NetworkAdapter,
    NetworkParts,
    Pair,
    chain_of,
    read_activation,
    read_excitation,
    read_layer,
)


def _read_block(block: nn.Module) -> ChainSpec:
    act = read_activation(block, "_swish")
    arguments = getattr(block, "_block_args", None)
    if arguments is not None:
        expands, excites = arguments.expand_ratio != 1, block.has_se
        residual = block.id_skip and arguments.stride == 1 and arguments.input_filters == arguments.output_filters
    else:
        expands, excites, residual = block._has_expansion, block._has_se, block._has_drop_connect
    layers = [read_layer(block, "_expand_conv", "_bn0", act)] if expands else []
    layers += [read_layer(block, "_depthwise_conv", "_bn1", act), read_layer(block, "_project_conv", "_bn2", "none")]
    excitation = read_excitation(block, "", "_se_reduce", "_swish", "_se_expand", None) if excites else None
    return chain_of(layers, excitation, residual, partial(_drop_connect, block.training))


def _drop_connect(training: bool, x: Tensor, drop_connect_rate: float | None = None) -> Tensor | None:
    # The draws of that package's own function.
    if not training or not drop_connect_rate:
        return None
    survival = 1 - drop_connect_rate
    drawn = torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
    return ((survival + drawn).floor() / survival).flatten()


def _read_network(model: Any, read: BlockReader) -> NetworkParts:
    stem = "_conv_stem", read("_conv_stem", Pair(model._conv_stem, model._bn0, model._swish))
    stages = [[(f"_blocks.{i}", read(f"_blocks.{i}", block))] for i, block in enumerate(model._blocks)]
    head = "_conv_head", read("_conv_head", Pair(model._conv_head, model._bn1, model._swish))
    tail = {"_avg_pooling": model._avg_pooling}
    if model._global_params.include_top:
        tail |= {"flatten": FLATTEN, "_dropout": model._dropout, "_fc": model._fc}
    return NetworkParts(stem, stages, head, tail, None)


def _read_encoder(model: Any, read: BlockReader) -> NetworkParts:
    """The encoder of segmentation_models_pytorch: lukemelas's network, which returns the image and a map a stage."""
    stem = "_conv_stem", read("_conv_stem", Pair(model._conv_stem, model._bn0, model._swish))
    stages, begin = [], 0
    for last in model._out_indexes[: model._depth - 1]:
        numbers = range(begin, last + 1)
        stages.append([(f"_blocks.{i}", read(f"_blocks.{i}", model._blocks[i])) for i in numbers])
        begin = last + 1
    return NetworkParts(stem, stages, None, None, list(range(len(stages) + 1)), image_first=True)


BLOCKS: dict[str, Adapter] = {
    "efficientnet_pytorch.model.MBConvBlock": _read_block,
    "segmentation_models_pytorch.encoders._efficientnet.MBConvBlock": _read_block,
}
NETWORKS: dict[str, NetworkAdapter] = {
    "efficientnet_pytorch.model.EfficientNet": NetworkAdapter(_read_network, ("forward", "extract_features")),
    "segmentation_models_pytorch.encoders.efficientnet.EfficientNetEncoder": NetworkAdapter(
        _read_encoder, ("forward",)
    ),
}
