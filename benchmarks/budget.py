"""How often `ensemble.predict` keeps a budget of milliseconds, on an ensemble with random weights.

    python benchmarks/budget.py --batches 1000

Batches of random sizes, each with a budget drawn between what the first student takes and 1.2 times what all of them
take (or twice what the first takes, if that is more), after `Budget.measure`, whose time is printed as well. Prints how
many batches were within their budgets, by how much the others were over, and how much of the budget the batches used.
"""

import argparse
import random
import statistics
import time
from typing import Any

import timm
import torch

from timm_mamba_pkd.models import Budget, Depth
from timm_mamba_pkd.models.cascade import padded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--largest", type=int, default=100, help="batch (default: 100)")
    parser.add_argument("--img-size", type=int, default=28, help="(default: 28)")
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    ensemble: Any = timm.create_model("mamba_pkd_ensemble", num_classes=10, in_chans=1, img_size=args.img_size).eval()
    images = torch.randn(padded(args.largest), 1, args.img_size, args.img_size)
    spans = {
        size: [milliseconds(ensemble, images[:size], k) for k in (1, 7)]
        for size in {padded(count) for count in range(1, args.largest + 1)}
    }
    began = time.perf_counter()
    Budget.measure(ensemble, images[: args.largest])
    print(f"Budget.measure for batches of up to {args.largest}: {time.perf_counter() - began:.1f} s")
    taken, over = [], []
    for _ in range(args.batches):
        size = random.randint(1, args.largest)
        least, most = spans[padded(size)]
        while True:
            budget = random.uniform(least, max(1.2 * most, 2 * least))
            began = time.perf_counter()
            try:
                ensemble.predict(images[:size], Budget(milliseconds=budget))
            except ValueError:  # it does not suffice for the first student's slowest run
                least = budget
                continue
            break
        spent = 1000 * (time.perf_counter() - began)
        taken.append(spent / budget)
        over += [spent / budget - 1] * (spent > budget)
    print(f"{args.batches} batches of 1 to {args.largest} images, {torch.get_num_threads()} CPU threads, seed 0")
    print(f"kept: {100 * (1 - len(over) / args.batches):.2f} %, over by at most {100 * max(over, default=0):.1f} %")
    print(f"of the budget used: {100 * statistics.mean(taken):.0f} % on average")


def milliseconds(ensemble, images: torch.Tensor, k: int) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        ensemble.predict(images, Depth(k))
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


if __name__ == "__main__":
    main()
