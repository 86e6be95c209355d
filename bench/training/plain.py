"""A training program in plain torch, in one process: what every strategy must come out at. The ranks' samples are gone
through one rank after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .programs import ProgramStep, TrainingProgram
from .small_models import make_model, samples

EDITED_TO = 0.01
"""Event "edit" clips every number of the reduced gradient to this size."""
GROWN = 2
"""So many of the model's first parameters come in with event "grow"."""


def start_model(program: TrainingProgram) -> torch.nn.Module:
    """The program's model, the same on every rank."""
    model = make_model(program.model, program.seed, getattr(torch, program.dtype))
    if any("grow" in step.events for step in program.steps):
        for parameter in list(model.parameters())[:GROWN]:
            parameter.requires_grad_(False)
    return model


def start_optimizer(model: torch.nn.Module, program: TrainingProgram) -> torch.optim.Optimizer:
    """The program's optimizer, with groups that differ in their learning rates; all that is trainable is in it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [trained[index :: program.groups] for index in range(min(program.groups, len(trained)))]
    lr = 0.05 if program.optimizer in ("SGD", "momentum", "nesterov") else 0.01
    entries = [{"params": group, "lr": lr / (1 + index)} for index, group in enumerate(groups)]
    if program.optimizer in ("momentum", "nesterov"):
        return torch.optim.SGD(entries, momentum=0.9, nesterov=program.optimizer == "nesterov", weight_decay=0.01)
    made: torch.optim.Optimizer = getattr(torch.optim, program.optimizer)(entries)
    return made


def start_scheduler(
    optimizer: torch.optim.Optimizer, program: TrainingProgram
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The program's scheduler."""
    schedulers = torch.optim.lr_scheduler
    if program.scheduler == "StepLR":
        return schedulers.StepLR(optimizer, 2, 0.5)
    if program.scheduler == "ExponentialLR":
        return schedulers.ExponentialLR(optimizer, 0.8)
    if program.scheduler == "LambdaLR":
        return schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if program.scheduler == "OneCycleLR":
        cycles = program.optimizer != "Adagrad" and "betas" in optimizer.defaults
        return schedulers.OneCycleLR(optimizer, 0.02, total_steps=len(program.steps) + 2, cycle_momentum=cycles)
    return None


def loss_of(
    forward: Callable[[torch.Tensor], torch.Tensor], program: TrainingProgram, number: int, rank: int, micro_batch: int
) -> tuple[torch.Tensor, float]:
    """The loss of one micro-batch that is not empty, and what it counts: the mean of the samples' losses, or their sum,
    weighted in a step that is counted by weights."""
    step = program.steps[number]
    count = step.samples[rank][micro_batch]
    dtype = getattr(torch, program.dtype)
    inputs, targets, weights = samples(program.seed, number, rank, micro_batch, count, dtype)
    losses = (forward(inputs) - targets).square().mean(1)
    if step.counted == "mean":
        return losses.mean(), 1.0
    if step.counted == "count":
        return losses.sum(), float(count)
    return (losses * weights[:, 0]).sum(), float(weights[:, 0].double().sum())


def total_of(program: TrainingProgram, number: int, trainers: int) -> float:
    """What a step's losses count, all ranks and micro-batches together."""
    step, total = program.steps[number], 0.0
    for rank in range(trainers):
        for micro_batch, count in enumerate(step.samples[rank]):
            if step.counted == "count":
                total += count
            elif count:
                dtype = getattr(torch, program.dtype)
                weights = samples(program.seed, number, rank, micro_batch, count, dtype)[2, :, 0]
                total += float(weights.double().sum())
    return total


class PlainTraining:
    """The program, trained by plain torch."""

    def __init__(self, program: TrainingProgram):
        self.program = program
        self.model = start_model(program)
        self.optimizer = start_optimizer(self.model, program)
        self.scheduler = start_scheduler(self.optimizer, program)
        self.moved = {name: 0.0 for name, _ in self.model.named_parameters()}
        """Of each parameter: the norms of all its updates so far, added up."""
        self.grad_norm: float | None = None

    def happen(self, event: str) -> None:
        """What an event between two steps does to model and optimizer."""
        happen(event, self.model, self.optimizer)
        if event == "write":
            with torch.no_grad():
                write(self.model)

    def step(self, number: int, trainers: int) -> None:
        """One step of the program on so many ranks."""
        program, step = self.program, self.program.steps[number]
        for rank in range(trainers):
            for micro_batch, count in enumerate(step.samples[rank]):
                if not count:
                    continue
                loss, _ = loss_of(self.model, program, number, rank, micro_batch)
                if step.counted == "mean":
                    loss = loss / len(step.samples[rank]) / trainers
                loss.backward()
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        if step.counted != "mean":
            total = total_of(program, number, trainers)
            for gradient in gradients:
                gradient.div_(total)
        if "edit" in step.events:
            edit(gradients)
        if program.max_grad_norm is not None:
            parameters = [each for each in self.model.parameters() if each.grad is not None]
            self.grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, program.max_grad_norm))
        before = {name: each.detach().clone() for name, each in self.model.named_parameters()}
        self.optimizer.step()
        for name, each in self.model.named_parameters():
            self.moved[name] += float((each.detach() - before[name]).double().norm())
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()


def happen(event: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Events that are the user's own lines in every loop."""
    parameters = list(model.parameters())
    if event == "lr":
        for group in optimizer.param_groups:
            group["lr"] *= 0.7
    elif event == "freeze":
        last = parameters[-1]
        if not last.requires_grad or sum(each.requires_grad for each in parameters) > 1:
            last.requires_grad_(not last.requires_grad)
    elif event == "grow":
        grown = [each for each in parameters[:GROWN] if not each.requires_grad]
        for parameter in grown:
            parameter.requires_grad_(True)
        optimizer.add_param_group({"params": grown, "lr": 0.03})


def write(model: torch.nn.Module) -> None:
    """Event "write", inside of no_grad()."""
    for index, parameter in enumerate(model.parameters()):
        parameter.mul_(1 - 0.01 * (index % 3))


def edit(gradients: Iterable[torch.Tensor]) -> None:
    """Event "edit"."""
    for gradient in gradients:
        gradient.clamp_(-EDITED_TO, EDITED_TO)


def micro_batches(step: ProgramStep, rank: int) -> list[tuple[int, bool]]:
    """(micro-batch, whether it is the last) of one rank."""
    last = len(step.samples[rank]) - 1
    return [(index, index == last) for index in range(last + 1)]
