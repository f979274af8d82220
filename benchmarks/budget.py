"""How often `ensemble.predict` keeps a budget of milliseconds, on an ensemble with random weights.

    python benchmarks/budget.py --batches 1000

Batches of the given sizes take turns, each with a budget drawn between what the first student takes and what all of
them take. Prints how many batches were within their budgets, by how much the others were over, and how much of the
budget the batches used.
"""

import argparse
import random
import statistics
import time

import timm
import torch

from timm_mamba_pkd.models import Budget, Depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 7, 32, 100], help="(default: 1 7 32 100)")
    parser.add_argument("--img-size", type=int, default=28, help="(default: 28)")
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    ensemble = timm.create_model("mamba_pkd_ensemble", num_classes=10, in_chans=1, img_size=args.img_size).eval()
    images = torch.randn(max(args.sizes), 1, args.img_size, args.img_size)
    spans = {
        size: (milliseconds(ensemble, images[:size], 1), milliseconds(ensemble, images[:size], 7))
        for size in args.sizes
    }
    for size in args.sizes:
        ensemble.predict(images[:size], Budget(milliseconds=1e6))  # measures the students
    taken, over = [], []
    for number in range(args.batches):
        size = args.sizes[number % len(args.sizes)]
        least, most = spans[size]
        while True:
            budget = random.uniform(least, 1.2 * most)
            began = time.perf_counter()
            try:
                ensemble.predict(images[:size], Budget(milliseconds=budget))
            except ValueError:  # it does not suffice for the first student's slowest run
                continue
            break
        spent = 1000 * (time.perf_counter() - began)
        taken.append(spent / budget)
        over += [spent / budget - 1] * (spent > budget)
    print(f"{args.batches} batches of {args.sizes} images, {torch.get_num_threads()} CPU threads, seed 0")
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
