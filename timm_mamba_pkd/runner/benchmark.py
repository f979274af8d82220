"""``mamba-pkd benchmark``: what models cost, side by side, in the columns of timm's benchmark.py."""

import argparse
import csv
import os
from pathlib import Path
from typing import Any

import torch

from timm_mamba_pkd.models import count_macs
from timm_mamba_pkd.report import count_params, measure_latency, measure_peak_memory, median_time
from timm_mamba_pkd.runner.device import find_device, name_of
from timm_mamba_pkd.runner.errors import ConfigError, first_line
from timm_mamba_pkd.runner.named import create_named
from timm_mamba_pkd.runner.run_folder import make_folder, new_folder

Result = dict[str, str | int | float]

CONVENTIONS = (
    "samples/s and step time: median of forward passes of the batch; latency: the same at batch 1; "
    "GMACs: 1e9 multiply-accumulates of one image, the selective scan included, elementwise work not, 1 MAC = 2 FLOPs; "
    "peak memory: what PyTorch holds at most during such a pass, weights included, in MiB; params in millions"
)


def run_benchmark(args: argparse.Namespace) -> None:
    """``mamba-pkd benchmark``: all models are created before the first is measured."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "10")  # PyTorch's profiler, which measures memory, is noisy otherwise
    device = find_device(args.device)
    results_file = None if args.results_file is None else Path(args.results_file).expanduser()
    if results_file is not None:
        if not args.results_file or results_file.is_dir():
            raise ConfigError(f"--results-file must name a file, got '{args.results_file}'")
        if results_file.exists():
            raise ConfigError(f"--results-file {results_file} exists already: name another, or move it away")
        _require_writable(results_file)
    models = [
        (name, *create_named(name, args.num_classes, args.in_chans, args.img_size, weights=False))
        for name in args.models
    ]
    results = []
    for name, model, input_size in models:
        try:
            measured = _measure(model.to(device), input_size, args.batch_size, device, args.amp)
        except RuntimeError as error:  # memory that is not there, or an operator that the device does not have
            raise ConfigError(f"model {name} cannot be measured on {device}: {first_line(error)}") from error
        results.append({"model": name, **measured})
        model.cpu()
    print(_to_text(results))
    print(f"{CONVENTIONS}. {args.batch_size} images a batch, on {name_of(device)}.")
    if results_file is not None:
        make_folder(results_file.parent)
        with results_file.open("x", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(results[0]))
            writer.writeheader()
            writer.writerows(results)


def _require_writable(path: Path) -> None:
    """Raise a ConfigError unless a file can be made at ``path``; its folder may be missing. Nothing is left."""
    with new_folder(path.parent):
        try:
            path.touch(exist_ok=False)
            path.unlink()
        except OSError as error:
            raise ConfigError(f"--results-file {path} cannot be written: {error.strerror}") from error


def _measure(model: Any, input_size: tuple[int, int, int], batch_size: int, device: torch.device, amp: bool) -> Result:
    images = torch.randn(batch_size, *input_size, device=device)

    def step() -> None:
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        with torch.inference_mode():
            milliseconds = median_time(step)
        latency = measure_latency(model, input_size, device)
        memory = measure_peak_memory(model, images, device)
    return {
        "infer_samples_per_sec": round(1000 * batch_size / milliseconds, 2),
        "infer_step_time": round(milliseconds, 3),
        "infer_batch_size": batch_size,
        "infer_img_size": input_size[-1],
        "infer_gmacs": count_macs(model, input_size) / 1e9,
        "infer_latency": round(latency, 3),
        "infer_peak_memory": round(memory / 2**20, 2),
        "param_count": count_params(model) / 1e6,
    }


def _to_text(results: list[Result]) -> str:
    cells = [list(results[0])] + [
        [f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value}" for value in result.values()]
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + "\n"
        for row in cells
    )
