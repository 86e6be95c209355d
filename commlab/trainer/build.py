"""The device and the optimizer that the flags ask for."""

from __future__ import annotations

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
