"""What a model costs: parameters, and measured latency and memory."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from timm_mamba_pkd.models.macs import blank_image, copy_for_eval


def count_params(model: nn.Module) -> int:
    """Count the elements of the parameters that `model` saves, frozen ones included, shared ones once, buffers not.

    What serves training only, and is therefore left out of the state dict, does not count.
    """
    saved = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in saved.values() if isinstance(tensor, nn.Parameter))


def measure_latency(
    model: nn.Module, input_size: tuple[int, int, int], device: torch.device | str, repeats: int = 50
) -> float:
    """Measure the median milliseconds that one image takes at batch size 1, in eval mode under `inference_mode`.

    A copy without hooks runs, so that `model` is left as it was, on whichever device it is. After a warm-up it runs
    `repeats` times, or as often as fits into about a second, but at least 5 times.

    Args:
        model: takes a float tensor (1, C, H, W) in the dtype of its parameters.
        input_size: (C, H, W).
        device: where to measure; on CUDA every run is synchronised.
        repeats: the most runs to time, at least 5.

    Raises:
        ValueError: `repeats` is below 5.
    """
    if repeats < 5:
        raise ValueError(f"repeats is {repeats}; a median needs at least 5 runs")
    device = torch.device(device)
    runner = copy_for_eval(model, device)
    image = blank_image(model, input_size, device)

    def run() -> None:
        runner(image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        return median_time(run, repeats)


def median_time(run: Callable[[], object], repeats: int = 50) -> float:
    """Median milliseconds of a call of `run`, after a warm-up; as often as `measure_latency`."""
    _time_runs(run, least=2, most=10, seconds=0.3)
    return 1000 * statistics.median(_time_runs(run, least=5, most=repeats, seconds=1.0))


def measure_peak_memory(model: nn.Module, images: Tensor, device: torch.device | str) -> int:
    """Measure the most bytes that PyTorch holds during a forward pass of `images`, model and images included.

    In eval mode under `inference_mode`, on a copy without hooks. It is what PyTorch's allocators give out: without
    the process itself, and without what libraries take on their own.

    Args:
        model: takes `images`.
        images: (B, C, H, W).
        device: where to measure.
    """
    device = torch.device(device)
    runner = copy_for_eval(model, device)
    images = images.to(device)
    with torch.inference_mode():
        runner(images)  # what is made once, such as kernels, is there
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            runner(images)
            return torch.cuda.max_memory_allocated(device)
        profile: Any = torch.autograd.profiler.profile(profile_memory=True)
        with profile:
            runner(images)
    held = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    tensors = {id(tensor): tensor for tensor in (*runner.parameters(), *runner.buffers(), images)}
    return peak + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _time_runs(run: Callable[[], object], least: int, most: int, seconds: float) -> list[float]:
    """Time `run` in seconds, `most` times or until `seconds` have passed, but at least `least` times."""
    times: list[float] = []
    while len(times) < least or (len(times) < most and sum(times) < seconds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times
