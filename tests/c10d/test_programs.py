"""Programs of trainers that know torch.distributed's backends by name give the numbers that they give on gloo, bit for
bit. ``pytest --examples`` runs them where the trainers are, which are no part of commlab's test environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from jobs import Job, finish, mpirun, start, torchrun

COMMON = """
from hashlib import sha256
from torch import nn
import torch.distributed as dist
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
generator = torch.Generator().manual_seed(1)
rows, targets = torch.randn(48, 16, generator=generator), torch.randn(48, 4, generator=generator)
def say_bits(model):
    # A digest: two ranks write to one pipe, and only short lines stay whole there.
    digest = sha256(b"".join(each.detach().numpy().tobytes() for each in model.parameters()))
    say("rank", dist.get_rank(), type(dist.group.WORLD).__name__, digest.hexdigest())
"""

LIGHTNING = """
import warnings
warnings.simplefilter("ignore")
import lightning
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.seen = net(), []
    def training_step(self, batch, at):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("mean", loss, sync_dist=True)
        self.seen.append(self.all_gather(loss.detach()).tolist())
        return loss
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)

module = Module()
trainer = lightning.Trainer(
    accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend=BACKEND), max_epochs=2, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, DataLoader(TensorDataset(rows, targets), 8, shuffle=True))
assert trainer.world_size == dist.get_world_size() == 2 and len(module.seen) == 6 and len(module.seen[0]) == 2
say("mean", trainer.callback_metrics["mean"].item().hex())
say_bits(module)
"""

ACCELERATE = """
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
dist.init_process_group(BACKEND)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = net()
loader = DataLoader(TensorDataset(rows, targets), 8)
model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 0.1), loader)
for batch, wanted in loader:
    with accelerator.accumulate(model):
        loss = (model(batch) - wanted).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
say("mean", accelerator.reduce(loss.detach(), "mean").item().hex())
say_bits(model)
dist.destroy_process_group()
"""

TRAINER = """
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments
dist.init_process_group(BACKEND)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(
    vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None))
tokens = torch.randint(64, (32, 16), generator=generator)
arguments = TrainingArguments(
    output_dir=sys.argv[1], max_steps=3, per_device_train_batch_size=4, report_to="none", save_strategy="no",
    disable_tqdm=True, use_cpu=True)
assert arguments.world_size == 2
trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
trainer.remove_callback(PrinterCallback)  # its lines and the other rank's would lie within each other
say("mean", float(trainer.train().training_loss).hex())
say_bits(model)
dist.destroy_process_group()
"""


def numbers(job: Job, kind: str) -> tuple[list[str], list[str]]:
    """What the two ranks found: their losses, in no order, and their parameters, which are the same on both."""
    assert job.code == 0, job.output
    ranks = sorted(line.split() for line in job.said("rank"))
    assert [rank[:2] for rank in ranks] == [["0", kind], ["1", kind]], job.output
    assert ranks[0][2:] == ranks[1][2:]
    return sorted(job.said("mean")), ranks[0][2:]


def run(launcher: Sequence[str], program: str, backend: str, tmp_path: Path) -> Job:
    # The entry points of a checkout are those of the installation, which may be older.
    head = f"import commlab.c10d\ncommlab.c10d.register()\nBACKEND = {backend!r}\nsys.argv[1:] = [{str(tmp_path)!r}]\n"
    return finish(start([*launcher], head + COMMON + program, tmp_path))


@pytest.fixture(autouse=True)
def asked_for(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--examples"):
        pytest.skip("pytest --examples runs it")


def on_both(program: str, tmp_path: Path) -> tuple[list[str], list[str]]:
    found = numbers(run(torchrun(2), program, "commlab", tmp_path), "CommlabProcessGroup")
    assert found == numbers(run(torchrun(2), program, "gloo", tmp_path), "ProcessGroup")
    return found


def test_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    on_both(ACCELERATE, tmp_path)


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    on_both(TRAINER, tmp_path)


def test_lightning(tmp_path: Path) -> None:
    """Under torchrun and under mpirun."""
    pytest.importorskip("lightning")
    found = on_both(LIGHTNING, tmp_path)
    assert numbers(run(mpirun(2), LIGHTNING, "commlab", tmp_path), "CommlabProcessGroup") == found
