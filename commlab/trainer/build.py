"""The device and the optimizer that the flags ask for."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from ..errors import UsageError
from .config import ADAMW_BETAS, Config

if TYPE_CHECKING:
    import torch

    from ..runtime.group import Group


def device_of(config: Config, group: Group) -> torch.device:
    """Where this rank computes: on the CPU, or on one of the node's GPUs, which are dealt to the node's ranks one by
    one, and again from the first where there are fewer GPUs than ranks. UsageError for a GPU where torch sees none."""
    import torch

    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            f"--device cuda, but torch {torch.__version__} sees no GPU; leave it out, or give --device cpu"
        )
    device = torch.device("cuda", group.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def compiled(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """``model`` through torch.compile. UsageError where nothing can be compiled here: a small function is tried,
    before the first step. Cost: seconds; torch's cache saves a later run a part of them."""
    import torch

    compiler = os.environ.get("CXX") or "g++"
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UsageError(
            f"--compile needs a C++ compiler, and there is no {compiler!r} (CXX); install one, or leave it out"
        )
    try:
        total = torch.compile(_sum_of_squares)(torch.ones(3, device=device))
    except Exception as error:  # torch's compilers raise of many kinds; the cause stays attached
        cause = " ".join(str(error.__cause__ or error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:300]
        raise UsageError(
            f"--compile needs a compiler for {device.type}; a small function could not be"
            f" compiled: {type(error.__cause__ or error).__name__}: {cause}; install g++ and Python's headers (GPU:"
            " triton), or leave it out"
        ) from error
    if float(total) != 3.0:
        raise UsageError(f"--compile: a compiled sum of three ones is {float(total)}; this compiler can't be used")
    return torch.compile(model)  # type: ignore[return-value]


def _sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    return (values * values).sum()


def make_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    """torch's AdamW, or Apex's under precision apex; groups as :func:`decay_groups` makes them."""
    import torch

    groups = decay_groups(model, config.weight_decay)
    if config.precision == "apex":
        from ..apex import fused_adam

        return fused_adam(groups, lr=config.lr, betas=ADAMW_BETAS)
    return torch.optim.AdamW(groups, lr=config.lr, betas=ADAMW_BETAS, fused=True)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups of an optimizer: matrices, whose weights decay, and biases and norms, which have one dimension and do
    not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
