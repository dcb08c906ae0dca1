"""The command ``effnet``: one function per subcommand, which returns the exit status."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from effnet_kernels.tools import training_commands
from effnet_kernels.tools.arguments import EXIT_OK, EXIT_SOME_FAILED, EXIT_USAGE, UsageError, minutes, positive
from effnet_kernels.tools.arguments import device as device_of
from effnet_kernels.tools.console import printable, say, to_json

# From so many photographs on, processes read them.
_MANY_PHOTOS = 2000

# Imports of torch and of the package's parts are inside the functions: ``effnet --help`` has nothing to wait for.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (the process's by default) and returns its exit status."""
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        # _run reports all others: the reader of stdout has gone, or its disk is full.
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                say(f"effnet: error: {printable(str(error))}", sys.stderr)
        # Buffered output must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SOME_FAILED


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) or not isinstance(error, _reported_errors()):
            raise
        message = str(error) or type(error).__name__
        say("effnet: error: " + "\n".join(map(printable, message.split("\n"))), sys.stderr)
        return EXIT_USAGE


def _reported_errors() -> tuple[type[Exception], ...]:
    """The errors that are reported in a line; any other is a fault of the program, with its traceback."""
    import torch

    from effnet_kernels import BackendError

    memory = (MemoryError, torch.OutOfMemoryError)
    return UsageError, ValueError, OSError, ModuleNotFoundError, BackendError, *memory


def run_predict(arguments: argparse.Namespace) -> int:
    """Classifies photographs. Status 0; 1 where one could not be read; 2 where nothing could be done."""
    from effnet_kernels.tools import predict as p

    photos: Iterable[p.Photo]
    if arguments.paths:
        # Counted, and then found once more: so many need not be kept.
        total, files = 0, 0
        for photo in p.find_photos(arguments.paths):
            total, files = total + 1, files + os.path.isfile(photo.name)
        if files == 0:
            raise UsageError(f"found no photograph in {', '.join(map(printable, arguments.paths))}")
        photos = p.find_photos(arguments.paths)
    else:
        photos = p.demo_photos()
        total = len(photos)
    workers = arguments.workers
    if workers is None:
        # Processes take seconds to begin.
        workers = os.cpu_count() or 1 if total >= _MANY_PHOTOS else 0
    device = device_of(arguments.device)
    model, preprocess, class_names = _model(arguments.model, arguments.weights)
    predictions = p.predict(
        model,
        photos,
        preprocess,
        class_names,
        topk=arguments.topk or min(5, model.num_classes),
        batch_size=arguments.batch_size,
        device=device,
        workers=workers,
    )
    failed = False
    for prediction in p.progress_bar(predictions, total):
        if prediction.error is not None:
            failed = True
            say(f"effnet: skipped {printable(prediction.error)}", sys.stderr)
        else:
            say(_as_json(prediction) if arguments.json else _as_text(prediction), sys.stdout)
    return EXIT_SOME_FAILED if failed else EXIT_OK


def run_scale(arguments: argparse.Namespace) -> int:
    """Prints the cost of networks. Status 0; 2 for an unknown name or a phi that is no number."""
    from effnet_kernels.models.factory import measure
    from effnet_kernels.models.scaling import scaled_variant
    from effnet_kernels.models.variants import VARIANTS, find_variant

    chosen = [find_variant(name) for name in arguments.variants] + [scaled_variant(phi) for phi in arguments.phi]
    # The tf_ networks cost what their siblings do.
    chosen = chosen or [variant for variant in VARIANTS.values() if not variant.name.startswith("tf_")]
    if not arguments.json:
        print(f"{'network':<28}{'width':>7}{'depth':>7}{'resolution':>12}{'parameters':>14}{'GMACs':>10}")
    for variant in chosen:
        size = measure(variant)
        if arguments.json:
            print(to_json({"network": variant.name, **size._asdict()}))
        else:
            print(
                f"{variant.name:<28}{variant.width:>7.3g}{variant.depth:>7.3g}{size.resolution:>12}"
                f"{size.parameters:>14,}{size.macs / 1e9:>10.3f}"
            )
    return EXIT_OK


def run_info(arguments: argparse.Namespace) -> int:
    """Prints versions, devices, and what each backend can do here; or the kernels of a network's step. Status 0."""
    from effnet_kernels.tools import info

    shape = (arguments.batch, 3, arguments.resolution, arguments.resolution)
    found: dict[str, Any] = info.kernels(arguments.model, shape) if arguments.kernels else info.facts()
    if arguments.json:
        print(to_json(found, indent=2))
        return EXIT_OK
    if arguments.kernels:
        for name, binaries in found.items():
            size = "x".join(map(str, shape))
            print(f"{name} of {arguments.model} in float16, {size}: {len(binaries)} kernels to compile")
            for binary in binaries:
                print(f"  {binary}")
        return EXIT_OK
    for section, values in found.items():
        print(section)
        width = max(len(name) for name in values)
        for name, value in values.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            print(f"  {name:<{width}}  {shown}".replace("\n", "\n" + " " * (width + 4)))
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="effnet", description="EfficientNet, trained or not, fast.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_predict(commands)
    training_commands.add_to(commands)
    _add_scale(commands)
    _add_info(commands)
    _add_selftest(commands)
    _add_bench(commands)
    _add_tune(commands)
    return parser


def _add_predict(commands: Any) -> None:
    command = commands.add_parser(
        "predict",
        help="say what photographs show",
        description="Says what photographs show. Without --model, with the Lite0 weights of the extra "
        "effnet-kernels[demo], which need no download; without PHOTO, of three photographs from scikit-image.",
        epilog="Exit status: 0; 1 where a photograph could not be read or classified (it is named on stderr and "
        "skipped); 2 where nothing could be done.",
    )
    command.add_argument(
        "paths",
        nargs="*",
        metavar="PHOTO",
        help="a file, or a folder, in which JPEG, PNG, WebP, BMP, GIF and TIFF files are found at any depth",
    )
    command.add_argument("--model", help="such as efficientnet_b0, efficientnet_v2_s or tf_efficientnet_lite0")
    command.add_argument(
        "--weights",
        help="a name such as IMAGENET1K_V1, an http(s) URL, a path to .pth or .safetensors; or, without --model, the "
        "folder of a run of effnet train, or hf-hub:USER/REPOSITORY; DEFAULT",
    )
    command.add_argument(
        "--topk", type=positive, metavar="K", help="classes per photograph; 5, or all if there are fewer"
    )
    command.add_argument("--batch-size", type=positive, default=16, metavar="N", help="photographs at a time; 16")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1; cpu")
    command.add_argument(
        "--workers",
        type=int,
        choices=range(65),
        metavar="N",
        help=f"processes that read photographs, 0 for threads; one for each core from {_MANY_PHOTOS} photographs",
    )
    command.add_argument(
        "--json",
        action="store_true",
        help='print JSON lines, one object a photograph: {"photo", "predictions": [{"class", "index", "probability"}]}',
    )
    command.set_defaults(run=run_predict)


def _add_scale(commands: Any) -> None:
    command = commands.add_parser(
        "scale",
        help="print what networks cost: parameters, multiply-accumulates, resolution",
        description="Prints parameters, multiply-accumulates of one image, and resolution: of released networks by "
        "name (all without one), or of the network that compound scaling gives for a phi. The two differ: the released "
        "coefficients were rounded, so that B1 is near phi 0.5 and B4 near 3.5.",
    )
    command.add_argument("variants", nargs="*", metavar="VARIANT", help="such as efficientnet_b0 or efficientnet_v2_s")
    command.add_argument("--phi", type=float, action="append", default=[], help="any number; may be given repeatedly")
    command.add_argument("--json", action="store_true", help="print JSON lines, one object a network")
    command.set_defaults(run=run_scale)


def _add_info(commands: Any) -> None:
    command = commands.add_parser("info", help="print versions, devices and what each backend can do here")
    command.add_argument("--kernels", action="store_true", help="list the GPU kernels that a network needs instead")
    command.add_argument("--model", default="efficientnet_b0", help="the network, for --kernels")
    command.add_argument("--batch", type=positive, default=64, help="its batch, for --kernels")
    command.add_argument("--resolution", type=positive, default=224, help="its images' size, for --kernels")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run_info)


def run_selftest(arguments: argparse.Namespace) -> int:
    """Compares the fused network with eager PyTorch on this machine's GPU. Status 0, or 1 where a check failed."""
    from effnet_kernels import create_model
    from effnet_kernels.tools.selftest import selftest

    report = selftest(lambda: create_model(arguments.model), arguments.resolution, arguments.batch, arguments.rounds)
    print(report)
    if arguments.json:
        arguments.json.write_text(to_json(report.as_json(), indent=2))
    return EXIT_OK if report.passed else EXIT_SOME_FAILED


def _add_selftest(commands: Any) -> None:
    command = commands.add_parser("selftest", help="compare the GPU kernels with eager PyTorch on this machine")
    command.add_argument("--model", default="efficientnet_b0", help="the network (efficientnet_b0)")
    command.add_argument("--batch", type=positive, default=64, help="images of a timed step (64)")
    command.add_argument("--resolution", type=positive, default=224, help="the images' size (224)")
    command.add_argument("--rounds", type=positive, default=10, help="timed steps of each contender (10)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    command.set_defaults(run=run_selftest)


def run_bench(arguments: argparse.Namespace) -> int:
    """Compares this CPU's engines on a network. Status 0; 1 where outputs disagree, and then without a speed."""
    from effnet_kernels.tools import bench

    if arguments.plot:
        # Before the minutes that the comparison takes.
        import matplotlib  # noqa: F401
    try:
        comparison = bench.compare(
            arguments.model,
            arguments.batch,
            arguments.resolution,
            arguments.threads,
            arguments.engines,
            arguments.rounds,
            arguments.training,
            arguments.dtype,
        )
    except bench.Disagreement as error:
        say(f"effnet: {error}", sys.stderr)
        return EXIT_SOME_FAILED
    if arguments.json:
        facts = comparison._asdict() | {"rows": [row._asdict() for row in comparison.rows]}
        print(to_json(facts, indent=2))
    else:
        print(comparison)
    if arguments.plot:
        bench.plot(comparison, arguments.plot)
    return EXIT_OK


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench", help="compare the CPU with torchvision, torch.compile, ONNX Runtime, OpenVINO"
    )
    command.add_argument("--model", default="efficientnet_b0", help="the network (efficientnet_b0)")
    command.add_argument("--batch", type=positive, default=1, help="images of a call (1)")
    command.add_argument("--resolution", type=positive, help="the images' size (the network's own)")
    command.add_argument("--threads", type=positive, help="of each engine (as many as torch takes)")
    command.add_argument("--engines", type=lambda text: text.split(","), help="some of them, by commas (all installed)")
    command.add_argument("--rounds", type=positive, default=8, help="turns of each engine, of a tenth of a second (8)")
    command.add_argument("--training", action="store_true", help="a training step instead of inference")
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of our engine that ratios are of (float32)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw images a second (needs matplotlib)")
    command.set_defaults(run=run_bench)


def run_tune(arguments: argparse.Namespace) -> int:
    """Measures launch configurations on this machine's GPU and writes those that beat the rules. Status 0."""
    import torch

    from effnet_kernels.tools import tune

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
    shape = (arguments.batch, 3, arguments.resolution, arguments.resolution)
    options = {"fields": arguments.fields, "minutes": arguments.minutes, "report": arguments.json}
    number, path = tune.tune_and_write(arguments.model, shape, dtype, arguments.output, **options)
    print(f"{number} entries in {path}")
    return EXIT_OK


def _add_tune(commands: Any) -> None:
    command = commands.add_parser("tune", help="measure launch configurations on this machine's GPU, and keep the best")
    command.add_argument("--model", default="efficientnet_b0", help="the network (efficientnet_b0)")
    command.add_argument("--batch", type=positive, default=64, help="images of a step (64)")
    command.add_argument("--resolution", type=positive, default=224, help="the images' size (224)")
    command.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], default="fp16", help="of the maps (fp16)")
    command.add_argument("--output", type=Path, metavar="FILE", help="written there, and not where they are looked for")
    command.add_argument("--minutes", type=minutes, help="stop after so many (not before all is timed)")
    command.add_argument("--fields", type=positive, default=2, help="of a configuration that change at once (2)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the time of every configuration there, too")
    command.set_defaults(run=run_tune)


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        from effnet_kernels import __version__

        print(f"effnet-kernels {__version__}")
        raise SystemExit(EXIT_OK)


def _model(name: str | None, weights: str | None) -> tuple[Any, Any, list[str] | None]:
    """The trained model, its preprocessing and its class names."""
    from effnet_kernels import create_model
    from effnet_kernels.models.weights.hub import PREFIX, read_hub_network
    from effnet_kernels.models.weights.pretrained import imagenet_classes, resolve_weights

    for option, value in (("--model", name), ("--weights", weights)):
        if value == "":
            raise UsageError(f"{option}: expected a name, got ''")
    if weights is not None and os.path.isdir(weights):
        run = training_commands.open_run(weights)
        if name not in (None, run.config.network.name):
            raise UsageError(f"--model: expected {run.config.network.name}, the network of {weights}, got {name}")
        return run.network, run.preprocess, run.classes
    if name is None and weights is not None and weights.startswith(PREFIX):
        name = read_hub_network(weights).variant
    if name is None and weights is not None:
        raise UsageError("--weights: expected --model beside it, to say which network they are for")
    variant = name or "efficientnet_lite0"
    try:
        model = create_model(variant, weights=weights or "DEFAULT")
    except ModuleNotFoundError as error:
        hint = "; or give --model efficientnet_b0, whose weights are downloaded" if name is None else ""
        raise UsageError(f"{error}{hint}") from error
    if model.num_classes == 0:
        raise UsageError(f"--weights {weights}: expected a checkpoint with a classifier, got one without")
    source = resolve_weights(variant, weights or "DEFAULT")
    names = source.meta.get("categories") or (imagenet_classes() if model.num_classes == 1000 else None)
    return model, source.transforms(), names


def _as_text(prediction: Any) -> str:
    lines = [f"  {guess.probability:7.2%}  {guess.name}" for guess in prediction.guesses]
    return "\n".join([printable(prediction.photo), *lines])


def _as_json(prediction: Any) -> str:
    guesses = [{"class": g.name, "index": g.index, "probability": g.probability} for g in prediction.guesses]
    return to_json({"photo": prediction.photo, "predictions": guesses})


if __name__ == "__main__":
    sys.exit(main())
