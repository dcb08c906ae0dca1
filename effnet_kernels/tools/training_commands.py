"""The subcommands around training: ``effnet train``, ``evaluate``, ``plot`` and ``export``."""

import argparse
import importlib.util
import signal
import sys
import time
from pathlib import Path
from typing import Any

from effnet_kernels.tools.arguments import EXIT_OK, UsageError, positive
from effnet_kernels.tools.console import printable, say, to_json

# Imports of the extra train are inside the functions, which name it where it is missing.
_MODULES = (
    "lightning",
    "matplotlib",
    "pydantic",
    "sklearn",
    "tensorboard",
    "timm",
    "tomli_w",
    "torchmetrics",
    "torchvision",
)


def add_to(commands: Any) -> None:
    """Adds the subcommands to the command's parser."""
    _add_train(commands)
    _add_evaluate(commands)
    _add_plot(commands)
    _add_export(commands)


def run_train(arguments: argparse.Namespace) -> int:
    """Trains a network. Status 0, also after SIGTERM; 130 after SIGINT; 2 where something does not fit."""
    _check_extra()
    from effnet_kernels.train.checkpoints import EXIT_INTERRUPTED, Interrupted
    from effnet_kernels.train.config import merge, parse_settings, read_config
    from effnet_kernels.train.recipes import resolve
    from effnet_kernels.train.run import CONFIG, is_run, process_rank, train

    values: dict[str, Any] = {}
    folder: Path | None = arguments.output
    if arguments.resume is not None:
        if folder is None:
            raise UsageError("--resume: expected --output beside it, the folder of the run")
        if is_run(folder):
            values = read_config(folder / CONFIG)
    if arguments.config is not None:
        values = merge(values, read_config(arguments.config))
    recipe = arguments.recipe or values.pop("recipe", None)
    values.pop("recipe", None)
    options = {
        "network.name": arguments.model,
        "data.name": arguments.data,
        "data.dir": arguments.data_dir,
        "data.batch_size": arguments.batch_size,
        "data.max_broken": arguments.max_broken,
        "schedule.epochs": arguments.epochs,
        "training.seed": arguments.seed,
        "training.device": arguments.device,
        "training.deterministic": arguments.deterministic or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    config = resolve(merge(merge(values, _by_section(given)), parse_settings(arguments.set)), recipe)
    if folder is None:
        if config.processes() != (1, 1):
            raise UsageError("--output: expected a folder, which all processes know")
        name = f"{Path(config.data.name).stem}-{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path("runs", name)
    try:
        accuracy = train(config, folder, arguments.resume)
    except Interrupted as stop:
        if process_rank() == 0:
            command = f"effnet train --output {printable(str(folder))} --resume auto"
            say(f"effnet: stopped and saved; {command} goes on", sys.stderr)
        return EXIT_INTERRUPTED if stop.signal == signal.SIGINT else EXIT_OK
    if process_rank() == 0:
        print(f"best validation accuracy {accuracy:.2%}; weights, settings and logs are in {printable(str(folder))}")
    return EXIT_OK


def _by_section(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        section, _, key = name.partition(".")
        values.setdefault(section, {})[key] = value
    return values


def _add_train(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        help="train a network",
        description="Trains a network. Without options, one that reads handwritten digits, in a minute or two and "
        "without a download. The folder that it writes is what --weights of predict, and evaluate and plot, take.",
        epilog="Every value can be set: --set optimizer.lr=0.1 --set training.clip=5. A run's config.toml "
        "has all of them. Exit status: 0, also after SIGTERM, which saves; 130 after Ctrl-C, which saves; 2 where "
        "something is missing or does not fit.",
    )
    command.add_argument(
        "--data",
        metavar="NAME",
        help="digits, cifar10, cifar100, a folder with a folder for each class (or such folders in train and val), or "
        "a pattern of WebDataset shards such as train-{000..099}.tar; digits",
    )
    command.add_argument("--data-dir", metavar="DIR", help="where CIFAR's archive is, or goes; torch's cache")
    command.add_argument("--recipe", help="paper, modern, finetune, cifar or v2; by the data set, cifar or modern")
    command.add_argument("--model", help="such as efficientnet_b0; the recipe's, efficientnet_b0")
    command.add_argument("--epochs", type=positive, metavar="N", help="passes over the images; the recipe's")
    command.add_argument("--batch-size", type=positive, metavar="N", help="images of a step; 64")
    command.add_argument("--max-broken", type=positive, metavar="N", help="images that may be unreadable; none")
    command.add_argument("--seed", type=int, metavar="N", help="of all random draws; 0")
    command.add_argument("--device", help="auto, cpu, cuda; auto")
    command.add_argument("--deterministic", action="store_true", help="refuse operators whose results change")
    command.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="any other value")
    command.add_argument("--config", type=Path, metavar="FILE", help="values, such as a run's config.toml")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="a new folder for the run; one in runs/")
    command.add_argument(
        "--resume",
        metavar="auto",
        help="go on with the run in --output from its newest good checkpoint, in the middle of an epoch too, or begin "
        "it; or the path of a checkpoint",
    )
    command.set_defaults(run=run_train)


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Prints the accuracy of a trained network, by class too, and draws its confusions. Status 0."""
    _check_extra()
    from effnet_kernels.train.evaluation import evaluate

    run = open_run(arguments.run_folder)
    given = {"data.name": arguments.data, "data.dir": arguments.data_dir, "data.max_broken": arguments.max_broken}
    values = _by_section({name: value for name, value in given.items() if value is not None})
    evaluation = evaluate(run._replace(config=run.config.override(values)), arguments.device)
    if arguments.json:
        print(to_json(evaluation.as_json(), indent=2))
    else:
        print(evaluation)
    path = arguments.plot or arguments.run_folder / "confusion.png"
    evaluation.plot(path)
    say(f"the confusion matrix is in {printable(str(path))}", sys.stderr)
    return EXIT_OK


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser("evaluate", help="print the accuracy of a trained network, by class too")
    command.add_argument("run_folder", type=Path, metavar="RUN", help="the folder that effnet train has written")
    command.add_argument("--data", metavar="NAME", help="other images to validate with, as for effnet train; the run's")
    command.add_argument("--data-dir", metavar="DIR", help="where CIFAR's archive is; the run's")
    command.add_argument("--max-broken", type=positive, metavar="N", help="images that may be unreadable; the run's")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda; auto")
    command.add_argument("--plot", type=Path, metavar="FILE", help="for the confusion matrix; RUN/confusion.png")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run_evaluate)


def run_plot(arguments: argparse.Namespace) -> int:
    """Draws the curves of runs. Status 0."""
    _check_extra()
    from effnet_kernels.train.curves import plot_runs

    path = arguments.output or arguments.runs[0] / "curves.png"
    plot_runs(arguments.runs, path)
    print(f"the curves are in {printable(str(path))}")
    return EXIT_OK


def _add_plot(commands: Any) -> None:
    command = commands.add_parser("plot", help="draw loss, accuracy and learning rate of runs over their steps")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a folder that effnet train has written")
    command.add_argument("--output", type=Path, metavar="FILE", help="an image's path; curves.png in the first run")
    command.set_defaults(run=run_plot)


def run_export(arguments: argparse.Namespace) -> int:
    """Writes a trained network for others. Status 0."""
    run = open_run(arguments.run_folder)
    from effnet_kernels.train.export import FORMS, export

    path = arguments.output or arguments.run_folder / FORMS[arguments.to]
    export(run, arguments.to, path)
    print(f"the network is in {printable(str(path))}")
    return EXIT_OK


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write a trained network for others",
        description="Writes a trained network: onnx, for any batch; engine, frozen, for torch.load; safetensors, with "
        "torchvision's keys; timm, a folder for timm.create_model('local-dir:...') or the Hugging Face hub.",
    )
    command.add_argument("run_folder", type=Path, metavar="RUN", help="the folder that effnet train has written")
    command.add_argument("--to", choices=["onnx", "engine", "safetensors", "timm"], required=True, help="the form")
    command.add_argument("--output", type=Path, metavar="PATH", help="a file, or for timm a folder; one in RUN")
    command.set_defaults(run=run_export)


def open_run(folder: Any) -> Any:
    """The trained network in a run's folder; raises UsageError for another folder."""
    _check_extra()
    from effnet_kernels.train.run import CONFIG, is_run, load_run

    if not is_run(folder):
        raise UsageError(f"{folder}: expected the folder of a run of effnet train, with {CONFIG}")
    return load_run(folder)


def _check_extra() -> None:
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'training needs {", ".join(missing)}: pip install "effnet-kernels[train]"')
