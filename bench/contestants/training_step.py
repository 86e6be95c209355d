"""The contestants of :mod:`bench.overlap`: steps of one engine, with a check of every step."""

from __future__ import annotations

import time
from hashlib import sha256

import torch

import commlab
from commlab.runtime.control import exchange_records
from commlab.runtime.group import Group
from commlab.strategies.steps import Times
from commlab.trainer.model import build_model, loss_sum

from ..core.ranks import Ranks

VOCABULARY = 257


class Task:
    """The computation that all contestants share: ``batch_size`` sequences on each rank, which differ between ranks,
    from the same parameters in every step."""

    def __init__(self, model_name: str, batch_size: int, seq_len: int, group: Group, ranks: Ranks, seed: int):
        self.model_name, self.seq_len, self.group, self.ranks, self.seed = model_name, seq_len, group, ranks, seed
        self.size, self.tokens = ranks.size, batch_size * seq_len
        generator = torch.Generator().manual_seed(1000 * seed + ranks.rank)
        self.ids = torch.randint(0, VOCABULARY, (batch_size, seq_len), generator=generator)
        self.labels = self.ids.roll(-1, dims=1)
        self.start = [parameter.detach().clone() for parameter in self.build().parameters()]
        self.samples = [
            torch.tensor(sorted({0, tensor.numel() // 3, tensor.numel() // 2, tensor.numel() - 1}))
            for tensor in self.start
        ]
        self.mean: list[torch.Tensor] = []
        """The mean of all ranks' gradients, at the samples, in float64; known after the first call of
        :meth:`Computing.measure`."""
        self.mean_size: list[torch.Tensor] = []
        """The mean of the absolute values of all ranks' gradients, at the samples: how large the numbers are that a
        wire rounds."""

    def build(self) -> torch.nn.Module:
        # A config file's own dropout would make every step another one.
        return build_model(self.model_name, seq_len=self.seq_len, vocab_size=VOCABULARY, dropout=0.0, seed=self.seed)

    def loss(self, model: torch.nn.Module) -> tuple[torch.Tensor, int]:
        return loss_sum(model, self.ids, self.labels)

    def take_mean(self, model: torch.nn.Module, count: int) -> None:
        """Fill in ``mean`` and ``mean_size`` from the ranks' own gradients, each of a sum over ``count`` tokens.
        Collective."""
        own = [
            parameter.grad.view(-1)[at].double() if parameter.grad is not None else torch.zeros(len(at)).double()
            for parameter, at in zip(model.parameters(), self.samples, strict=True)
        ]
        numbers, lengths = torch.cat(own), [len(at) for at in self.samples]
        totals = torch.tensor(self.ranks.total([*numbers, *numbers.abs()]), dtype=torch.float64) / (count * self.size)
        mean, mean_size = totals.chunk(2)
        self.mean, self.mean_size = list(mean.split(lengths)), list(mean_size.split(lengths))


class TrainingStep:
    """One contestant: ``dps``, or ``allreduce:fp16`` with a wire. SGD at learning rate 1 leaves the reduced gradient in
    the parameters, where every strategy has it."""

    def __init__(self, name: str, task: Task, bucket_bytes: int):
        self.name, self.task = name, task
        strategy, _, self.wire = name.partition(":")
        self.model = task.build()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.engine = commlab.strategy(
            strategy, self.model, optimizer, task.group, wire=self.wire or None, bucket_bytes=bucket_bytes
        )
        self.buckets = self.engine.buckets
        self.bytes_sent = 0
        """The bytes that the rank which sends most sends in a step."""
        last, across, levels = self.buckets.buckets[-1], self.engine.across, self.engine.levels
        share = (task.size - 1) / task.size if levels is None else (levels.across.size - 1) / task.size
        twice = strategy == "allreduce" or across is not None
        late = last.numel * last.dtype.itemsize * share * (2 if twice else 1)
        pulls = strategy == "dps" and across is None
        pulled = share * sum(4 * tensor.numel() for tensor in task.start) if pulls else 0
        self.late_bytes = round(late + pulled)
        """The bytes of ``bytes_sent`` that are not known before backward ends: the last bucket and the updated
        parameters."""
        self.wrong = 0
        self._digest = b""

    def step(self, *, overlap: bool) -> tuple[float, float]:
        """Make a whole step from the task's parameters and check the step; returns (seconds, seconds of the update).
        Collective."""
        engine, task = self.engine, self.task
        self.buckets.overlap, engine.times = overlap, Times()
        sent_before = task.group.bytes_sent
        task.ranks.barrier()
        started_s = time.perf_counter()
        loss, count = task.loss(engine.model)
        engine.backward(loss, count, count * task.size)
        engine.step()
        spent_s = time.perf_counter() - started_s
        self.bytes_sent = int(task.ranks.maximum([task.group.bytes_sent - sent_before])[0])
        self._check_bits()
        self._check_numbers()
        engine.zero_grad()
        engine.update_parameters(self._restore)
        return spent_s, engine.times.update_s

    @torch.no_grad()
    def _restore(self, model: torch.nn.Module) -> None:
        for parameter, start in zip(model.parameters(), self.task.start, strict=True):
            parameter.copy_(start)

    def _check_bits(self) -> None:
        """The parameters must have the same bits on all ranks and after every step, with and without overlap."""
        task, digest = self.task, sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().contiguous().view(-1).numpy().data)
        found = digest.digest()
        self._digest = self._digest or found
        self.wrong += int(found != self._digest) + int(len(set(exchange_records(task.group, found, "digest"))) > 1)

    def _check_numbers(self) -> None:
        """The parameters must be those before the step, less the mean of all ranks' gradients."""
        task = self.task
        # A 16-bit number has 10 bits (8 in bf16), and steps of 6e-8 where it is small.
        relative, least = (2**-7, 2e-7) if self.wire else (1e-4, 1e-8)
        for parameter, start, at, mean, size in zip(
            self.model.parameters(), task.start, task.samples, task.mean, task.mean_size, strict=True
        ):
            before = start.view(-1)[at].double()
            off = (before - parameter.detach().view(-1)[at].double() - mean).abs()
            self.wrong += int((off > relative * size + 1.2e-7 * before.abs() + least).sum())


class Computing:
    """Forward and backward of a contestant's model, with nothing packed or sent."""

    def __init__(self, training_step: TrainingStep):
        self.training_step = training_step
        self.samples_s: list[tuple[float, float]] = []
        """The seconds of forward and of backward, each of the slowest rank, a pair per round."""

    def measure(self) -> None:
        """Compute once more and add a sample. Collective."""
        engine, task = self.training_step.engine, self.training_step.task
        task.ranks.barrier()
        started_s = time.perf_counter()
        with engine.no_sync():
            loss, count = task.loss(engine.model)
            between_s = time.perf_counter()
            engine.backward(loss, count, count * task.size)
        ended_s = time.perf_counter()
        forward_s, backward_s = task.ranks.maximum([between_s - started_s, ended_s - between_s])
        self.samples_s.append((forward_s, backward_s))
        if not task.mean:
            task.take_mean(engine.model, count)
        engine.zero_grad()
