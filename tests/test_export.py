"""torch.export, ONNX and AOTInductor: programs of standard operators, for every batch and resolution."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from native_cases import needs_compiler, needs_native
from test_compile import network, torchvision_network
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import effnet_kernels as ek

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "ours": network,
    "torchvision's, accelerated": torchvision_network,
    "frozen": pytest.param(lambda: ek.freeze(network()), marks=needs_native),
    "frozen feature maps": pytest.param(lambda: ek.freeze(network(), features_only=True), marks=needs_native),
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
# The sizes that a program is made with, and others.
IMAGES = [(2, 3, 96, 64), (3, 3, 65, 127), (1, 3, 64, 64)]
DYNAMIC = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)


def export(model: nn.Module, strict: bool = False) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (torch.randn(IMAGES[0]),), dynamic_shapes=DYNAMIC, strict=strict)


def assert_same(actual: list[Tensor], model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(x)
    for ours, right in zip(actual, [expected] if isinstance(expected, Tensor) else expected, strict=True):
        assert_close(ours, right)


def flat(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@each_model
@pytest.mark.parametrize("strict", [False, True])
def test_export(make: Callable[[], nn.Module], strict: bool) -> None:
    model = make().eval()
    program = export(model, strict)
    targets = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert {target.namespace for target in targets} == {"aten"}
    for shape in IMAGES:
        x = torch.randn(shape)
        assert_same(flat(program.module()(x)), model, x)


@each_model
def test_onnx(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the file")
    model = make().eval()
    image = torch.randn(IMAGES[0])
    program = torch.onnx.export(model, (image,), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in IMAGES:
        x = torch.randn(shape)
        outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_same([torch.from_numpy(y) for y in outputs], model, x)


@needs_compiler
@pytest.mark.parametrize("make", [network, MODELS["frozen"]], ids=["ours", "frozen"])
def test_aot_inductor(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make().eval()
    path = torch._inductor.aoti_compile_and_package(export(model), package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for shape in IMAGES[:2]:
        x = torch.randn(shape)
        assert_same(flat(loaded(x)), model, x)
