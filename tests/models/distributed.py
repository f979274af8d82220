"""What the processes of the distributed test run."""

from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def train_in_a_process(rank: int, folder: Path, names: list[str]) -> None:
    """One step of each (model, images per rank) saved in the folder; saves its logits and gradients."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    for name in names:
        model, shares = torch.load(folder / f"{name}.pt", weights_only=False)
        parallel = DistributedDataParallel(model)
        logits = parallel(shares[rank])
        nn.functional.cross_entropy(logits, torch.arange(len(shares[rank]))).backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        torch.save({"logits": logits.detach(), **gradients}, folder / f"{name}.{rank}.pt")
    distributed.destroy_process_group()
