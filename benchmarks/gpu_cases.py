"""The cases that are timed on a GPU, each a computation and the contenders that compute it.

``toy`` sizes are for machines without a GPU, where the same code runs so that it is tested; such times mean nothing.
A simulator of launches knows no CUDA graphs and no torch.compile, which are left out there.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from launch_trace import tensor_bytes
from torch import Tensor, nn

import effnet_kernels as ek
from effnet_kernels import ops
from effnet_kernels.backends import select
from effnet_kernels.backends.triton.launch import capture_launches, simulated
from effnet_kernels.modules import MBConvConfig
from effnet_kernels.tools.timing import graphed

Call = Callable[[], object]
Contenders = dict[str, Callable[[], Call]]
"""By name, a function that builds the call that is timed."""

# Depthwise layers of B0: channels, map, kernel, stride.
LAYERS = [(32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 5, 2), (480, 14, 5, 1), (1152, 7, 5, 1)]
# Blocks of B0: expand ratio, kernel, channels, map.
BLOCKS = [(6, 3, 24, 56), (6, 5, 40, 28), (6, 5, 112, 14), (6, 5, 192, 7)]
# What the names of compiled contenders begin with, which take minutes to build.
COMPILED = "torch.compile "
# What freeze() makes of our network, the second with its own CUDA graphs.
FROZEN = ("ours, frozen", "ours, frozen, CUDA graph")
BASELINES: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": lambda name: getattr(torchvision.models, name)().cuda(),
    "torchvision channels-last": lambda name: _channels_last(getattr(torchvision.models, name)()),
    "timm channels-last": lambda name: _channels_last(timm.create_model(name)),
}


class Case(NamedTuple):
    """A computation on ``images`` images; ``build`` makes its inputs and its contenders."""

    name: str
    images: int
    names: list[str]
    build: Callable[[], Contenders]


def cases(toy: bool) -> list[Case]:
    """B0's training and inference, the cases that matter most first, then operators and blocks of B0, then B4."""
    b0, b4 = ("efficientnet_b0", 32 if toy else 224), ("efficientnet_b4", 380)
    found = []
    # Hosts compute slowly in float16.
    for dtype in (torch.bfloat16,) if toy else (torch.float16, torch.bfloat16):
        for batch in (2,) if toy else (256, 64, 1):
            found += [training(*b0, batch, dtype, toy), inference(*b0, batch, dtype, toy)]
    batch = 1 if toy else 64
    for channels, size, kernel, stride in [(16, 9, 3, 1)] if toy else LAYERS:
        found.append(depthwise(batch, channels, size, kernel, stride, toy))
        found.append(squeeze_excite(batch, channels, size, toy))
    found += [block(batch, *row, toy) for row in ([(2, 3, 8, 9)] if toy else BLOCKS)]
    if not toy:
        found += [training(*b4, 64, dtype, toy) for dtype in (torch.float16, torch.bfloat16)]
        found += [inference(*b4, batch, torch.float16, toy) for batch in (1, 64, 256)]
    return found


def training(name: str, size: int, batch: int, dtype: torch.dtype, toy: bool) -> Case:
    """Forward and backward under autocast, without the optimizer, whose time is the same for all."""

    def build() -> Contenders:
        x, labels = image(batch, 3, size), torch.randint(0, 10, (batch,), device="cuda")

        def prepare(model: nn.Module, x: Tensor) -> Call:
            model.train()

            def step() -> None:
                model.zero_grad(set_to_none=True)
                with autocast(dtype):
                    loss = F.cross_entropy(model(x), labels)
                loss.backward()

            return step

        def ours() -> Call:
            model = network(name, toy)
            compile_ahead(model, x, True, dtype)
            return prepare(model, x)

        return _networks(name, x, ours, prepare, {})

    title = f"{name} training {str(dtype).removeprefix('torch.')} batch {batch}"
    return Case(title, batch, network_contenders([]), build)


def inference(name: str, size: int, batch: int, dtype: torch.dtype, toy: bool) -> Case:
    def build() -> Contenders:
        x = image(batch, 3, size, dtype)

        def prepare(model: nn.Module, x: Tensor) -> Call:
            model = model.eval().to(dtype)
            return torch.no_grad()(lambda: model(x))

        def ours() -> Call:
            model = network(name, toy).to(dtype)
            compile_ahead(model, x, False)
            return prepare(model, x)

        def frozen(cuda_graph: bool) -> Call:
            # Unseen: that an engine computes what its model does is for the tests to say.
            engine = ek.freeze(network(name, toy).eval(), dtype=dtype, cuda_graph=cuda_graph, verify=False)
            compile_ahead(engine, x, False)
            return torch.no_grad()(lambda: engine(x))

        engines: Contenders = dict(zip(FROZEN, (lambda: frozen(False), lambda: frozen(True)), strict=True))
        return _networks(name, x, ours, prepare, engines)

    title = f"{name} inference {str(dtype).removeprefix('torch.')} batch {batch}"
    return Case(title, batch, network_contenders(FROZEN), build)


def network_contenders(frozen: Sequence[str]) -> list[str]:
    names = ["ours", *frozen, *BASELINES, "ours, CUDA graph", "torchvision channels-last, CUDA graph"]
    names += [f"{COMPILED}{mode}" for mode in ("default", "reduce-overhead", "max-autotune")]
    return [which for which in names if not (simulated() and ("graph" in which or which.startswith(COMPILED)))]


def _networks(
    name: str, x: Tensor, ours: Callable[[], Call], prepare: Callable[[nn.Module, Tensor], Call], frozen: Contenders
) -> Contenders:
    def baseline(which: str) -> Call:
        return prepare(BASELINES[which](name), x if "channels-last" in which else x.contiguous())

    def compiled(mode: str) -> Call:
        return prepare(torch.compile(BASELINES["torchvision channels-last"](name), mode=mode), x)

    contenders: Contenders = {"ours": ours} | {which: lambda which=which: baseline(which) for which in BASELINES}
    contenders |= {f"{base}, CUDA graph": lambda build=build: graphed(build()) for base, build in contenders.items()}
    for mode in ("default", "reduce-overhead", "max-autotune"):
        contenders[f"{COMPILED}{mode}"] = lambda mode=mode: compiled(mode)
    contenders |= frozen
    return {which: contenders[which] for which in network_contenders(list(frozen))}


def compile_ahead(model: nn.Module, x: Tensor, train: bool, autocast: torch.dtype | None = None) -> None:
    """All kernels of a step at once in parallel, which would take minutes one by one; a simulator has none."""
    if not simulated():
        ek.warmup(model.train(train), x.shape, train, autocast, smaller_batches=False)


def network(name: str, toy: bool) -> nn.Module:
    """Ours. A toy has two of its blocks, because a simulated kernel takes seconds."""
    if not toy:
        return ek.create_model(name).cuda()
    settings = [MBConvConfig(1, 3, 2, 8, 8, 1), MBConvConfig(2, 5, 1, 8, 16, 1)]
    return ek.EfficientNet(settings, 0.0, num_classes=10).cuda()


def depthwise(batch: int, channels: int, size: int, kernel: int, stride: int, toy: bool) -> Case:
    """The public function, beside conv2d, batch_norm and silu."""

    def build() -> Contenders:
        x = image(batch, channels, size, torch.float16).requires_grad_()
        weight = torch.randn(channels, 1, kernel, kernel, device="cuda", dtype=x.dtype).requires_grad_()
        gamma = torch.ones(channels, device="cuda").requires_grad_()
        beta = torch.zeros(channels, device="cuda").requires_grad_()

        def ours() -> Tensor:
            return ops.depthwise_conv_bn_silu(x, weight, gamma, beta, None, None, stride, kernel // 2, training=True)

        def eager() -> Tensor:
            y = F.conv2d(x, weight, None, stride, kernel // 2, groups=channels)
            return F.silu(F.batch_norm(y, None, None, gamma, beta, training=True))

        return _operator(ours, eager, (x, weight, gamma, beta))

    return Case(f"depthwise_conv_bn_silu c{channels} {size} k{kernel} s{stride}", batch, operator_contenders(), build)


def squeeze_excite(batch: int, channels: int, size: int, toy: bool) -> Case:
    def build() -> Contenders:
        x = image(batch, channels, size, torch.float16).requires_grad_()
        squeezed = max(4, channels // 24)
        w1 = torch.randn(squeezed, channels, device="cuda").requires_grad_()
        w2 = torch.randn(channels, squeezed, device="cuda").requires_grad_()

        def ours() -> Tensor:
            return ops.squeeze_excite(x, w1, None, w2, None)

        def eager() -> Tensor:
            gate = torch.sigmoid(F.silu(x.mean(dim=(2, 3)) @ w1.T.to(x.dtype)) @ w2.T.to(x.dtype))
            return x * gate[:, :, None, None]

        return _operator(ours, eager, (x, w1, w2))

    return Case(f"squeeze_excite c{channels} {size}", batch, operator_contenders(), build)


def block(batch: int, ratio: int, kernel: int, channels: int, size: int, toy: bool) -> Case:
    def build() -> Contenders:
        config = MBConvConfig(ratio, kernel, 1, channels, channels, 1)
        module = config.block(config, 0.0, nn.BatchNorm2d).cuda().to(memory_format=torch.channels_last)
        x = image(batch, channels, size, torch.float16).requires_grad_()

        def run(backend: select.Backend) -> Tensor:
            with select.use_backend(backend), autocast(torch.float16):
                return module(x)

        return _operator(lambda: run("triton"), lambda: run("torch"), (x, *module.parameters()))

    return Case(f"MBConv{ratio} k{kernel} c{channels} {size}", batch, operator_contenders(), build)


def operator_contenders() -> list[str]:
    graphs = [f"{base}, CUDA graph" for base in ("ours", "eager channels-last")]
    return ["ours", "eager channels-last", *([] if simulated() else [COMPILED.strip(), *graphs])]


def _operator(ours: Callable[[], Tensor], eager: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Contenders:
    """Forward and backward in the inputs."""

    grad = torch.randn_like(eager().detach())

    def both(function: Callable[[], Tensor]) -> Call:
        return lambda: torch.autograd.grad(function(), inputs, grad)

    contenders: Contenders = {"ours": lambda: both(ours), "eager channels-last": lambda: both(eager)}
    contenders |= {f"{base}, CUDA graph": lambda base=base: graphed(contenders[base]()) for base in list(contenders)}
    contenders[COMPILED.strip()] = lambda: both(torch.compile(eager))
    return {name: contenders[name] for name in operator_contenders()}


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast without its cache, which a CUDA graph cannot capture. Simulated tensors are on the CPU."""
    on_host = torch.autocast("cpu", dtype) if simulated() else contextlib.nullcontext()
    with torch.autocast("cuda", dtype, cache_enabled=False), on_host:
        yield


def image(batch: int, channels: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(batch, channels, size, size, device="cuda", dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def _channels_last(model: nn.Module) -> nn.Module:
    return model.cuda().to(memory_format=torch.channels_last)


def bytes_of(call: Call) -> int:
    """The bytes of the tensors that a call's launches read and write, each once a launch; the launches do not run."""
    with capture_launches() as launches:
        call()
    return sum(map(tensor_bytes, launches))


def release() -> None:
    """Frees the memory of a case, which the next one would otherwise find taken."""
    gc.collect()
    torch._dynamo.reset()
    if not simulated():
        torch.cuda.empty_cache()
