"""The fused chains as seen by autograd, torch.compile and torch's own checks, on the reference's primitives."""

import copy
from collections.abc import Iterator

import pytest
import torch
from conftest import TOLERANCES, assert_buffers_close, assert_close, assert_gradients_close, randomize, traces_operators
from operator_arguments import mbconv_chain, operator_calls
from torch import Tensor, library, nn

from effnet_kernels import EfficientNet
from effnet_kernels.backends import select
from effnet_kernels.modules import FusedMBConvConfig, MBConvConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    # What an earlier test has compiled was compiled for another backend.
    torch.compiler.reset()
    with select.use_backend("reference"):
        yield


def network() -> EfficientNet:
    settings = [
        FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        FusedMBConvConfig(2, 3, 2, 8, 16, 1),
        MBConvConfig(2, 3, 1, 16, 16, 1),
        MBConvConfig(2, 5, 2, 16, 24, 1, padding="same"),
        MBConvConfig(1, 3, 1, 24, 24, 1, squeeze_ratio=None),
    ]
    return randomize(EfficientNet(settings, 0.0, stochastic_depth_prob=0.0, num_classes=5))


def train(model: nn.Module, run, x: Tensor) -> Tensor:
    y = run(x)
    y.square().sum().backward()
    return y.detach()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_of_every_block(training: bool, compiled: bool) -> None:
    model = network().double().train(training)
    eager = copy.deepcopy(model)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x = torch.randn(3, 3, 33, 30, dtype=torch.float64)
    with select.use_backend("torch"):
        expected = train(eager, eager, x)
    assert_close(train(model, run, x), expected)
    assert_gradients_close(model, eager)
    assert_buffers_close(model, eager, TOLERANCES[torch.float64])


@traces_operators
def test_compiled_inference_is_one_operator_a_block() -> None:
    model = network().eval()
    names: list[str] = []

    def spy(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        names.extend(str(node.target) for node in graph.graph.nodes if "effnet_kernels" in str(node.target))
        return graph

    with torch.no_grad():
        torch.compile(model, backend=spy, fullgraph=True)(torch.randn(1, 3, 32, 32))
    assert names == ["effnet_kernels.chain_inference"] * 7


def test_an_exported_program_has_standard_operators_only() -> None:
    program = torch.export.export(network().eval(), (torch.randn(1, 3, 32, 32),))
    assert "effnet_kernels" not in str(program.graph)


@pytest.mark.parametrize("keep", [None, torch.tensor([0.0, 2.0])])
def test_operators_pass_torchs_own_checks(keep: Tensor | None) -> None:
    x = torch.randn(2, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    for operator, arguments in operator_calls(MBConvConfig(2, 3, 1, 16, 16, 1), x, keep):
        library.opcheck(operator, arguments)


def test_a_bare_operator_has_the_functions_gradients() -> None:
    from effnet_kernels.fusion import autograd, custom_ops

    chain = mbconv_chain(MBConvConfig(2, 3, 1, 16, 16, 1), training=True)
    x = torch.randn(2, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    results = []
    for run in (autograd.run, custom_ops.run):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        parameters = [t for t in chain.parameters() if t is not None]
        out = run("reference", chain, leaf, None)
        results.append(torch.autograd.grad(out.square().sum(), (leaf, *parameters)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
