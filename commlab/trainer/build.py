"""Model and optimizer as the flags want them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from .config import ADAMW_BETAS, Config

if TYPE_CHECKING:
    import torch

    from ..runtime.group import Group


def device_of(config: Config, group: Group) -> torch.device:
    """Where this rank computes: the node's GPUs are dealt to its ranks in turn."""
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
    """AdamW; with precision apex, Apex's."""
    import torch

    groups = decay_groups(model, config.weight_decay)
    if config.precision == "apex":
        from ..apex import fused_adam

        return fused_adam(groups, lr=config.lr, betas=ADAMW_BETAS)
    return torch.optim.AdamW(groups, lr=config.lr, betas=ADAMW_BETAS, fused=True)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices are decayed; biases and norms, which have one dimension, are not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
