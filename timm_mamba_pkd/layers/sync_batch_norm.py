"""Batch norms with the statistics of the batches of all processes: PyTorch's, and the same on a CPU."""

import torch
from timm.layers import SyncBatchNormAct, convert_sync_batchnorm
from torch import Tensor, nn

from timm_mamba_pkd.distributed import AllReduce, all_present, is_present, world


def synchronize_batch_norms(model: nn.Module) -> None:
    """Have the batch norms of a model in training normalise by the batches of all processes together.

    Parameters, buffers and state dict stay; every process must run the model equally often.
    """
    convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in _ANYWHERE:
            module.__class__ = _ANYWHERE[type(module)]


class SyncBatchNorm(nn.SyncBatchNorm):
    """PyTorch's ``SyncBatchNorm``, which takes CUDA tensors only; this one takes those on a CPU too.

    The batch of a process without data (`only_first`) is normalised as the others, but is no part of the statistics.
    """

    def forward(self, input: Tensor) -> Tensor:
        if world() == 1 or not self.training or (input.device.type != "cpu" and all_present()):
            return super().forward(input)
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        x = input.float()
        count = input.numel() / input.shape[1]
        share = float(is_present())
        sums: Tensor = AllReduce.apply(share * torch.cat([x.sum(dims), x.new_tensor([count])]))  # pyright: ignore
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = x - mean.view(shape)
        variance: Tensor = AllReduce.apply(share * centred.square().sum(dims)) / total  # pyright: ignore
        self._update_statistics(mean.detach(), variance.detach() * total / (total - 1))
        output = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance, weight)


class _SyncBatchNormAct(SyncBatchNormAct, SyncBatchNorm):  # pyright: ignore[reportGeneralTypeIssues]
    """timm's, on our own."""


_ANYWHERE: dict[type, type] = {nn.SyncBatchNorm: SyncBatchNorm, SyncBatchNormAct: _SyncBatchNormAct}
