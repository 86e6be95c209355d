"""BatchNorm whose mean and variance are those of all ranks' batches, on CPUs and GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from .. import world
from .mpi_ops import allreduce_async
from .start import Sum, synchronize


class SyncBatchNorm(_BatchNorm):
    """``torch.nn.BatchNorm`` over the batches of all ranks, which may differ in size. Inputs: (N, C, ...), two
    dimensions or more. In evaluation, and with one rank, it is ``torch.nn.BatchNorm``."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The normalized batch. Collective in training."""
        self._check_input_dim(input)
        training = self.training or not self.track_running_stats
        if not training or not world.is_initialized() or world.size() == 1:
            plain: torch.Tensor = super().forward(input)
            return plain
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        found: torch.Tensor = _Normalize.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, momentum
        )
        return found


def _sums(numbers: torch.Tensor) -> torch.Tensor:
    """Of all ranks."""
    reduced: torch.Tensor = synchronize(allreduce_async(numbers, op=Sum))
    return reduced


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, eps: float, momentum: float
    ) -> Any:
        features = input.shape[1]
        dims = [dim for dim in range(input.dim()) if dim != 1]
        shape = [1, features] + [1] * (input.dim() - 2)
        wide = input.double()
        own = torch.cat([wide.sum(dims), wide.new_tensor([input.numel() / features])])
        totals = _sums(own)
        count = float(totals[-1])
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got {count:g} among all ranks")
        mean = totals[:-1] / count
        # Squares of the distances from the mean of all ranks: nothing cancels.
        variance = _sums((wide - mean.view(shape)).square().sum(dims)) / count
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
            unbiased = variance * (count / (count - 1))
            running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)
        inverse = (variance + eps).rsqrt()
        normal = (wide - mean.view(shape)) * inverse.view(shape)
        ctx.save_for_backward(normal, inverse, weight)
        ctx.count, ctx.dims, ctx.shape, ctx.dtype = count, dims, shape, input.dtype
        found = normal if weight is None else normal * weight.double().view(shape)
        found = found if bias is None else found + bias.double().view(shape)
        return found.to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        normal, inverse, weight = ctx.saved_tensors
        gradient = gradients[0].double()
        of_bias, of_weight = gradient.sum(ctx.dims), (gradient * normal).sum(ctx.dims)
        totals = _sums(torch.cat([of_bias, of_weight])) / ctx.count
        features = of_bias.numel()
        mean, along = totals[:features].view(ctx.shape), totals[features:].view(ctx.shape)
        scale = inverse if weight is None else inverse * weight.double()
        of_input = (gradient - mean - normal * along) * scale.view(ctx.shape)
        needs = ctx.needs_input_grad
        return (
            of_input.to(ctx.dtype) if needs[0] else None,
            of_weight.to(weight.dtype) if needs[1] else None,
            of_bias.to(weight.dtype) if needs[2] else None,
            *(None,) * 4,
        )
