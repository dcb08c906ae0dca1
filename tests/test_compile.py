"""torch.compile and torch.func on the CPU: the native kernels as registered operators."""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import assert_buffers_close, assert_close, assert_gradients_close, randomize, traces_operators
from native_cases import needs_compiler, needs_native
from operator_arguments import operator_calls
from torch import Tensor, library, nn

import effnet_kernels as ek
from effnet_kernels import EfficientNet, ops
from effnet_kernels.fusion.spec import Prologue
from effnet_kernels.modules import FusedMBConvConfig, MBConvConfig

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]
open_numbers = pytest.mark.skipif(
    torch.__version__ < (2, 14), reason="before torch 2.14 the eager path is compiled with dynamic=True"
)
# Height and width differ, or torch takes them for one number. Odd ones change what SAME padding adds.
SHAPES = [(2, 3, 40, 64), (5, 3, 33, 47), (3, 3, 96, 35)]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def network(**options: object) -> nn.Module:
    settings = [
        FusedMBConvConfig(2, 3, 2, 8, 8, 1),
        MBConvConfig(2, 3, 1, 8, 8, 1),
        MBConvConfig(2, 5, 2, 8, 16, 1, padding="same"),
        MBConvConfig(1, 3, 2, 16, 16, 1, squeeze_ratio=None),
    ]
    torch.manual_seed(0)
    return randomize(EfficientNet(settings, 0.0, stochastic_depth_prob=0.0, num_classes=5, **options))


def torchvision_network() -> nn.Module:
    reason = "accelerates its networks, the extra 'third-party'"
    third_party = pytest.importorskip("torchvision.models.efficientnet", reason=reason)
    torch.manual_seed(0)
    settings = [third_party.MBConvConfig(1, 3, 1, 8, 8, 1), third_party.MBConvConfig(4, 5, 2, 8, 16, 2)]
    return ek.accelerate(
        randomize(third_party.EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.0, num_classes=5))
    )


MODELS = {"ours": network, "torchvision's, accelerated": torchvision_network}


class Graphs:
    """A backend that counts the graphs it gets and the operators of this package in them."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.backend = backend
        self.count = 0
        self.operators: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.count += 1
        targets = [str(node.target) for node in graph.graph.nodes]
        self.operators += [target for target in targets if target.startswith("effnet_kernels.")]
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


def step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    model.zero_grad()
    y = run(x)
    y.square().mean().backward()
    return y.detach()


@open_numbers
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_every_batch_and_resolution(name: str, training: bool) -> None:
    model = MODELS[name]().train(training)
    eager = copy.deepcopy(model)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    compilations = []
    for shape in SHAPES:
        x = torch.randn(shape)
        torch.testing.assert_close(step(model, compiled, x), step(eager, eager, x))
        assert_gradients_close(model, eager)
        assert_buffers_close(model, eager)
        compilations.append(graphs.count)
    assert compilations == compilations[:1] * len(SHAPES)
    assert set(graphs.operators) == {"effnet_kernels.chain_forward"}


@traces_operators
def test_inference_is_one_operator_a_block() -> None:
    model, graphs = network().eval(), Graphs()
    x = torch.randn(2, 3, 40, 64)
    with torch.no_grad():
        y = torch.compile(model, backend=graphs, fullgraph=True)(x)
        torch.testing.assert_close(y, model(x))
    assert graphs.operators == ["effnet_kernels.chain_inference"] * 6


@needs_compiler
@pytest.mark.parametrize("training", [True, False])
def test_inductor(training: bool) -> None:
    """Inductor asserts what fake tensors promised: sizes, strides, dtypes."""
    model = network().train(training)
    eager = copy.deepcopy(model)
    x = torch.randn(2, 3, 40, 64)
    actual = step(model, torch.compile(model, fullgraph=True), x)
    assert_close(actual, step(eager, eager, x))
    assert_gradients_close(model, eager)
    assert_buffers_close(model, eager)


def test_layouts_have_the_same_numbers() -> None:
    model = network().eval()
    x = torch.randn(2, 3, 33, 47)
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        y = run(x)
        torch.testing.assert_close(run(x.contiguous(memory_format=torch.channels_last)), y)
        assert y.is_contiguous()


@traces_operators
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    model = network().train()
    eager, x = copy.deepcopy(model), torch.randn(2, 3, 40, 64)
    graphs = Graphs(backend)
    outputs = []
    for called, run in ((model, torch.compile(model, backend=graphs, fullgraph=True)), (eager, eager)):
        with torch.autocast("cpu", dtype):
            y = run(x)
            # Inside of autocast, where a backward pass need not be, but may.
            y.float().square().mean().backward()
        outputs.append(y)
        assert {p.grad.dtype for p in called.parameters()} == {torch.float32}
    assert outputs[0].dtype == dtype
    assert set(graphs.operators) == {"effnet_kernels.chain_forward"}
    torch.testing.assert_close(*outputs)
    assert_gradients_close(model, eager)
    assert_buffers_close(model, eager)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        torch.testing.assert_close(torch.compile(model.eval(), backend=backend)(x), model(x))


@needs_compiler
def test_autocast_with_inductor() -> None:
    model, x = network().eval(), torch.randn(2, 3, 40, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = torch.compile(model, fullgraph=True)(x), model(x)
    assert actual.dtype == torch.bfloat16
    # The classifier is torch's, which Inductor sums in another order.
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@traces_operators
def test_models_in_bfloat16() -> None:
    """Traced as torch's own functions, in channels-last strides as when called."""
    model, x, graphs = network().bfloat16().eval(), torch.randn(2, 3, 40, 64).bfloat16(), Graphs()
    with torch.no_grad():
        y = torch.compile(model, backend=graphs, fullgraph=True)(x)
        torch.testing.assert_close(y, model(x))
    assert graphs.operators == []


def test_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = network(), torch.randn(2, 3, 40, 64)
    eager = copy.deepcopy(model)

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    step(model, torch.compile(run, backend="aot_eager", fullgraph=True), x)
    step(eager, eager, x)
    assert_gradients_close(model, eager)


X, VECTOR = torch.randn(2, 8, 7, 9), torch.rand(8)
OPERATORS = {
    "depthwise_conv": lambda x: ops.depthwise_conv(x, torch.ones(8, 1, 3, 3), 1, 1)[0],
    "pointwise_conv": lambda x: ops.pointwise_conv(x, torch.ones(4, 8, 1, 1))[0],
    "squeeze": ops.squeeze,
    "squeeze_excite": lambda x: ops.squeeze_excite(x, torch.ones(2, 8), None, torch.ones(8, 2), None),
    "bn_act_add": lambda x: ops.bn_act_add(x, Prologue(VECTOR, VECTOR, "silu"), x, None),
    "channel_statistics": ops.channel_statistics,
    "finalize_batch_norm": lambda x: ops.finalize_batch_norm(
        ops.channel_statistics(x), VECTOR, None, torch.zeros(8), torch.ones(8)
    )[0],
    "depthwise_conv_bn_silu": lambda x: ops.depthwise_conv_bn_silu(
        x, torch.ones(8, 1, 3, 3), VECTOR, VECTOR, torch.zeros(8), torch.ones(8), 1, 1, training=True
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_single_operators_are_traced_as_the_reference(name: str) -> None:
    actual = torch.compile(OPERATORS[name], backend="aot_eager", fullgraph=True)(X)
    torch.testing.assert_close(actual, OPERATORS[name](X))


# torch.func


def compiled(function: Callable) -> Callable:
    return torch.compile(function, backend="aot_eager")


@pytest.mark.parametrize("wrap", [lambda function: function, compiled], ids=["eager", "compiled"])
def test_vmap_and_gradients_of_each_sample(wrap: Callable) -> None:
    model, x = network().eval(), torch.randn(3, 2, 3, 33, 47)
    each = torch.stack([model(images) for images in x])
    assert_close(wrap(torch.vmap(model))(x), each)

    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (images,)).square().mean()

    actual = wrap(torch.vmap(torch.func.grad(loss), in_dims=(None, 0)))(parameters, x)
    for index, images in enumerate(x):
        model.zero_grad()
        model(images).square().mean().backward()
        for name, parameter in parameters.items():
            expected = parameter.grad
            assert_close(actual[name][index], expected)


@pytest.mark.parametrize("wrap", [lambda function: function, compiled], ids=["eager", "compiled"])
def test_what_cannot_be_is_a_clear_error(wrap: Callable) -> None:
    model, x = network().train(), torch.randn(2, 2, 3, 33, 47)
    with pytest.raises(RuntimeError, match="running_mean or running_var, which will be updated in place"):
        wrap(torch.vmap(model))(x)


def test_a_second_derivative_of_a_compiled_model_is_torchs_error() -> None:
    image = torch.randn(2, 3, 33, 47, requires_grad=True)
    loss = compiled(network().train())(image).square().sum()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(torch.autograd.grad(loss, image, create_graph=True)[0].square().sum(), image)


# The operators


@pytest.mark.parametrize("drop_path_scale", [None, torch.tensor([0.0, 2.0])], ids=["", "stochastic depth"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, "symmetric"), (5, 2, "same")])
def test_operators_pass_torchs_own_checks(
    drop_path_scale: Tensor | None, kernel: int, stride: int, padding: str
) -> None:
    config = MBConvConfig(2, kernel, stride, 16, 16, 1, padding=padding)
    x = torch.randn(2, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    for operator, arguments in operator_calls(config, x, drop_path_scale):
        library.opcheck(operator, arguments)
