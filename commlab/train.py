"""The trainer: ``mpirun -n 8 python -m commlab.train``. The program reads from top to bottom; every knob of it is in
trainer/knobs.py.

All ranks run the whole program. Before the first step ranks agree on everything that may differ between them (files,
memory), so that a bad input ends the job on all ranks with one message.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from . import trace
from .errors import AgreedError, NotFiniteError, UsageError
from .job.launch import detect, end_job, install_exception_hook
from .trainer.build import compiled, device_of, make_optimizer
from .trainer.config import Config
from .trainer.preemption import EXIT_CODE, Preemption, listening

if TYPE_CHECKING:
    import torch

    from .checkpoint import Checkpoints
    from .runtime.group import Group
    from .trainer.data.batches import Blocks


def main(argv: Sequence[str] | None = None) -> int:
    """Run one training job; returns the exit code. Called on every rank by the launcher."""
    started_s = time.perf_counter()
    prepare_streams()
    try:
        launch = detect()
    except UsageError as error:
        print(f"commlab: {error}", file=sys.stderr)
        return 2
    try:
        config = Config.from_argv(argv, speak=launch.rank == 0)
    except UsageError as error:
        # All ranks have the same argv, so one of them prints the error; neither torch nor numpy is loaded yet.
        if launch.rank == 0:
            print(f"commlab: {error}", file=sys.stderr)
        return 2
    if launch.launcher is not None:
        # Ctrl-C while torch is being imported, which takes seconds: no traceback of every rank.
        install_exception_hook(os._exit)
    try:
        with listening(bool(config.checkpoint_every)) as preemption:
            return train(config, started_s, preemption)
    except (AgreedError, NotFiniteError) as error:
        # All ranks in lockstep have it; without lockstep one worker may be the only one.
        if launch.rank == 0 or not config.lockstep:
            print(f"commlab: {error}", file=sys.stderr)
            if config.servers is not None:
                end_job(2)  # servers do not know of the error, and wait
        return 2
    except UsageError as error:
        # Perhaps this rank is the only one with the error, and the others wait for it already.
        print(f"commlab: [rank {launch.rank} of {launch.size}] {error}", file=sys.stderr)
        end_job(2)
        return 2


def prepare_streams() -> None:
    """Standard output and error that any text can be written to: some are closed, and some are of a character set that
    samples of text do not fit into."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        with suppress(AttributeError, ValueError, OSError):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def train(config: Config, started_s: float, preemption: Preemption) -> int:
    """Train one model on all ranks; returns the exit code. ``started_s``: when the process began, by
    ``time.perf_counter()``; ``preemption``: whether this rank is warned of the job's end. Collective."""
    from .runtime import world
    from .runtime.control import gather_int, raise_together
    from .trainer.outputs import Outputs, save_somewhere

    if config.trace:
        trace.enable()
    group = world.init(
        config.transport, config.nodes, config.timeout, window=config.window, links=config.links, iface=config.iface
    )
    raise_together(group, lambda: config.validate_for(group.size))
    outputs = raise_together(group, lambda: Outputs(config) if group.rank == 0 else None)

    import torch

    from .checkpoint import Checkpoints
    from .strategies import strategy
    from .trainer.data.batches import BatchSampler, Blocks, require_held_out
    from .trainer.data.loading import load_together
    from .trainer.model import build_model, loss_sum, save_model
    from .trainer.report import Report
    from .trainer.sample import generate

    threads, why = config.thread_count(group.local_size, group.cores)
    torch.set_num_threads(threads)
    device = raise_together(group, lambda: device_of(config, group))

    corpus = load_together(
        group, config.data, config.tokenizer, config.tokenizer_cache, config.text_field, config.written
    )
    blocks = Blocks(corpus.train, config.seq_len)
    held_out = Blocks(corpus.held_out, config.seq_len, token_bytes=corpus.held_out_bytes)
    raise_together(group, lambda: require_held_out(held_out, config.batch_size, config.eval_batches or None))
    bare_model = raise_together(
        group,
        lambda: build_model(
            config.model,
            seq_len=config.seq_len,
            vocab_size=corpus.vocab_size,
            dropout=config.dropout,
            seed=config.seed,
            separator=corpus.separator,
        ).to(device),
    )
    model_bytes = sum(tensor.nbytes for tensor in [*bare_model.parameters(), *bare_model.buffers()])
    torch.manual_seed(config.seed * 1_000_003 + group.rank)  # dropout differs between ranks, weights do not
    optimizer = raise_together(group, lambda: make_optimizer(config, bare_model))
    model = raise_together(group, lambda: compiled(bare_model, device)) if config.compile else bare_model
    engine = strategy(config.strategy, model, optimizer, group, **vars(config.options))
    if engine.role == "server":  # strategy() has returned because all workers are done
        end(config, group)
        return EXIT_CODE if preemption.warned else 0
    everyone, group, model = group, engine.group, engine.model
    sampler = raise_together(
        group,
        lambda: BatchSampler(
            len(blocks),
            config.batch_size,
            rank=group.rank,
            size=group.size,
            grad_accumulation=config.grad_accumulation,
            seed=config.seed,
        ),
    )
    total_steps = config.total_steps(sampler.steps_per_epoch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.lr_factor(step, total_steps))
    report = Report(config, group, engine, total_steps, started_s)
    checkpoints = Checkpoints(config.checkpoint_folder, bare_model, engine, schedule, config.checkpoint_keep)
    if config.checkpoint_every:
        checkpoints.claim()
    raise_together(group, lambda: outputs.require_room(model_bytes, total_steps) if outputs else None)
    cursor = {**sampler.state_dict(0), "text": corpus.digest(), **config.shaping()}
    start_step = resume(config, group, checkpoints, cursor, total_steps)

    def leave() -> None:
        engine.close(state=False)
        checkpoints.close()
        end(config, everyone)
        if outputs is not None:
            outputs.close()

    report.opening(corpus.summary(), threads, why, len(blocks), start_step, checkpoints.refused)

    for step, rank in engine.turns(start_step, total_steps):
        batch = sampler.batch(step, rank)
        if not engine.averages:
            # Workers are at different steps, and every share is an update of its own.
            for entry, lr in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
                entry["lr"] = lr * config.lr_factor(step, total_steps)
        report.step_begins()
        # Every rank knows the number without a message: all have the same order of samples.
        total = blocks.token_count(batch.samples if engine.averages else batch.own)
        if not total:
            continue
        losses = torch.zeros((), dtype=torch.float64, device=device)
        for index, micro_batch in enumerate(batch.micro_batches):
            input_ids, labels, _ = blocks.batch(micro_batch)
            last = index == len(batch.micro_batches) - 1
            with nullcontext() if last else engine.no_sync():
                with report.phase("forward"), engine.autocast():
                    loss, count = loss_sum(model, input_ids.to(device), labels.to(device))
                losses += loss.detach().double()
                with report.phase("backward"):
                    engine.backward(loss, count, total)
        with report.phase("step"):
            updated = engine.step()
            engine.zero_grad()
        report.step_ends(batch, losses.cpu(), total, float(optimizer.param_groups[0]["lr"]), preemption.warned)
        if updated and engine.averages:
            schedule.step()
        if config.checkpoint_every and ((batch.step + 1) % config.checkpoint_every == 0 or report.preempted):
            begun_s = time.perf_counter()
            path = checkpoints.save(batch.step + 1, {**cursor, **sampler.state_dict(batch.step + 1)})
            report.saved(batch.step + 1, path, time.perf_counter() - begun_s)
            if report.preempted:
                report.leaving(batch.step + 1)
                leave()
                return EXIT_CODE
        if config.eval_every and (batch.step + 1) % config.eval_every == 0 and batch.step + 1 < total_steps:
            engine.settle()
            report.evaluated(batch.step + 1, held_out_bits(config, group, bare_model, held_out))

    engine.settle(last=True)
    report.evaluated(total_steps, held_out_bits(config, group, bare_model, held_out))
    folder = trouble = ""
    if group.rank == 0:

        def write(into: str) -> None:
            save_model(bare_model, into)
            corpus.tokenizer.save(into)

        folder, trouble = save_somewhere(config.output, write)
        if trouble:
            report.failed(trouble)
        if config.sample:
            with trace.span("sample"):
                report.sampled(generate(bare_model, corpus, config.sample, seed=config.seed, limit_s=config.sample_s))
    report.closing(folder)
    code = 2 if any(gather_int(group, bool(trouble or report.trouble), "what could not be written")) else 0
    leave()
    return code


def end(config: Config, group: Group) -> None:
    """The last steps of every rank, servers included: write the trace and disconnect. Collective."""
    from .runtime import world
    from .runtime.control import gather_bytes, raise_together

    if config.trace:
        dumps = gather_bytes(group, trace.dump(), "trace")
        raise_together(group, lambda: write_trace(config, group, dumps) if group.rank == 0 else None)
    world.shutdown()


def write_trace(config: Config, group: Group, dumps: Sequence[bytes]) -> None:
    """Write the file of ``--trace``. UsageError where that fails: the model is saved by then."""
    command = shlex.join(["python", "-m", "commlab.train", *sys.argv[1:]])
    about = {"command": command, "ranks": group.size, "nodes": len(group.nodes), "config": config.as_dict()}
    try:
        trace.write(str(config.trace), dumps, about)
    except OSError as error:
        raise UsageError(
            f"--trace {config.trace!r} can't be written: {error.strerror or error}; the model is saved"
        ) from error


def resume(config: Config, group: Group, checkpoints: Checkpoints, cursor: dict[str, object], total_steps: int) -> int:
    """The step to start with: 0, or the one after the newest whole checkpoint, which is restored. ``cursor``: what the
    saved run must have in common with this one. Collective."""
    from .runtime.control import raise_together

    if not config.resume:
        if config.checkpoint_every:
            checkpoints.require_none()
        return 0
    found = checkpoints.restore()
    if found is None:
        return 0
    step, saved = found

    def compare() -> None:
        for name, value in cursor.items():
            if name != "step" and saved.get(name) != value:
                raise UsageError(
                    f"the checkpoint of step {step} was made with {name} {saved.get(name)}, and this run has {value}; "
                    "give what it was made with, or start anew in another --checkpoint-dir"
                )
        if step > total_steps:
            raise UsageError(
                f"the checkpoint is of step {step}, and this run ends after {total_steps}; give more steps"
            )

    raise_together(group, compare)
    return step


def held_out_bits(config: Config, group: Group, model: torch.nn.Module, held_out: Blocks) -> float:
    """Bits per byte of held-out text, of which every rank evaluates its share. Collective."""
    import torch

    from .collectives.allreduce import allreduce
    from .trainer.data.batches import held_out_batches
    from .trainer.model import bits_per_byte, evaluate

    limit = config.eval_batches or None
    with trace.span("evaluate"):
        batches = held_out_batches(held_out, config.batch_size, rank=group.rank, size=group.size, limit=limit)
        loss, _, byte_count = evaluate(model, batches)
        sums = allreduce(
            torch.tensor([loss, byte_count], dtype=torch.float64, device="cpu"), "sum", "held-out loss", group=group
        )
    return bits_per_byte(float(sums[0]), int(sums[1]))


if __name__ == "__main__":
    sys.exit(main())
