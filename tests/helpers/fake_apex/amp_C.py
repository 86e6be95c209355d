"""``multi_tensor_scale`` as Apex's extension checks and does it."""

from __future__ import annotations

import torch

launches = 0


def multi_tensor_scale(chunk_size: int, flag: torch.Tensor, lists: list[list[torch.Tensor]], scale: float) -> None:
    global launches
    launches += 1
    sources, targets = lists
    assert flag.dtype == torch.int32 and flag.numel() == 1
    assert sources and len(sources) == len(targets), "Apex refuses empty lists"
    for source, target in zip(sources, targets, strict=True):
        assert source.numel() == target.numel() > 0 and source.is_contiguous() and target.is_contiguous()
        assert {source.dtype, target.dtype} <= {torch.float32, torch.float16, torch.bfloat16}
        if not source.isfinite().all():
            flag.fill_(1)
        target.copy_((source.float() * scale).view(target.shape))
