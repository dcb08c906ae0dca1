"""CPU inference of a whole network, ours against torchvision's: a process per engine, asked in turn, medians and ratio.

Thread pools that share a process disturb one another, so that engines timed in one process are not what a user gets.

    python benchmarks/inference.py [--model efficientnet_b0] [--batch 1] [--threads 2] [--rounds 12]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

ENGINES = ("effnet_kernels", "torchvision channels-last", "torchvision")


def worker(engine: str, name: str, batch: int, threads: int) -> None:
    """Prints the outputs once, then for each line of input the seconds of that many forwards."""
    import torch
    import torchvision

    import effnet_kernels

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    # Statistics of the data, so that activations neither vanish nor grow through an untrained network.
    resolution = effnet_kernels.VARIANTS[name].resolution
    x = torch.randn(batch, 3, resolution, resolution)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        model(torch.randn(4, 3, resolution, resolution))
        model.eval()
    if engine == "effnet_kernels":
        ours = getattr(effnet_kernels, name)().eval()
        ours.load_state_dict(model.state_dict())
        model = ours
    elif engine == "torchvision channels-last":
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(4):
            y = model(x)
        print(json.dumps(y.flatten().tolist()), flush=True)
        for line in sys.stdin:
            seconds = []
            for _ in range(int(line)):
                start = time.perf_counter()
                model(x)
                seconds.append(time.perf_counter() - start)
            print(json.dumps(seconds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = (arguments.model, arguments.batch, arguments.threads)
    if arguments.engine:
        worker(arguments.engine, *settings)
        return

    options = ["--model", settings[0], "--batch", str(settings[1]), "--threads", str(settings[2])]
    workers = {
        engine: subprocess.Popen(
            [sys.executable, __file__, "--engine", engine, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for engine in ENGINES
    }
    outputs = {engine: json.loads(process.stdout.readline()) for engine, process in workers.items()}
    reference = outputs["torchvision"]
    for engine, values in outputs.items():
        error = sum((a - b) ** 2 for a, b in zip(values, reference, strict=True)) ** 0.5
        if not error <= 1e-4 * sum(b * b for b in reference) ** 0.5:
            raise SystemExit(f"{engine} disagrees with torchvision: {error:.1e}; no time is printed")
    times: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    calls = max(1, 8 // arguments.batch)
    for _ in range(arguments.rounds):
        for engine, process in workers.items():
            process.stdin.write(f"{calls + 1}\n")
            process.stdin.flush()
            # The first call after another process had the caches is not counted.
            times[engine] += json.loads(process.stdout.readline())[1:]
            time.sleep(0.05)
    for process in workers.values():
        process.stdin.close()
        process.wait()
    medians = {engine: statistics.median(values) for engine, values in times.items()}
    peer = min((m, engine) for engine, m in medians.items() if engine != "effnet_kernels")
    ratio = peer[0] / medians["effnet_kernels"]
    shown = ", ".join(f"{engine} {m * 1e3:.1f} ms" for engine, m in medians.items())
    print(f"{settings[0]}, batch {settings[1]}, {settings[2]} threads: {shown}; {ratio:.2f}x {peer[1]}")


if __name__ == "__main__":
    main()
