"""A causal language model fine-tuned by Hugging Face's Trainer, whose DDP exchanges gradients through commlab.

    pip install transformers accelerate
    mpirun -n 2 python docs/examples/finetune.py              # or torchrun --nproc-per-node 2 docs/examples/finetune.py

What it shows: one line, ``init_process_group("commlab")`` before ``TrainingArguments`` is made, and no other change.
The model is a small GPT-2 with random weights, and the text is the source of Python's own json package, byte by byte,
so nothing is downloaded; put ``from_pretrained(...)`` and a data set of your own in their places.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

LENGTH, STEPS = 64, 30


class Blocks(Dataset[dict[str, Tensor]]):
    """The bytes of the json package's sources, in blocks of ``LENGTH``."""

    def __init__(self) -> None:
        files = sorted(Path(json.__file__).parent.glob("*.py"))
        text = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
        self.rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[at], "labels": self.rows[at]}


def main() -> None:
    dist.init_process_group("commlab")
    torch.manual_seed(42)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            ddp_find_unused_parameters=False,
        )
        assert arguments.world_size == dist.get_world_size(), "the Trainer trains alone, not with the other ranks"
        trainer = Trainer(model=model, args=arguments, train_dataset=Blocks())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    whole = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    everybodys = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, whole)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks over {dist.get_backend()}: loss {losses[0]:.3f}, then {losses[-1]:.3f}")
        same = all(torch.equal(whole, other) for other in everybodys)
        print(f"all ranks have the same parameters: {same}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
