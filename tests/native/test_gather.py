"""The loop that reduces out of many memories at once, against torch in rank order: bit for "
"bit, everywhere, in place."""

from __future__ import annotations

import itertools

import pytest
import torch
from bits import BUILT, assert_same_bits, needs_native, numbers
from closed_form import DTYPES, HALVES, expected, ops_for
from closed_form import numbers as exact_numbers
from torch import Tensor

from commlab import native
from commlab.native import library
from commlab.native.dtypes import DTYPES as CODES
from commlab.native.dtypes import OP_CODES

OPS = ("sum", "prod", "min", "max")
SIZES = (0, 1, 2, 5, 15, 31, 64, 129, 1000)
STREAMED = 300_007
"""Enough for the stores that pass the caches by, which begin at 1 MiB of results, and with a ragged end."""
COMBINE = {"sum": torch.add, "prod": torch.mul, "min": torch.minimum, "max": torch.maximum}

pytestmark = needs_native
backends = pytest.mark.parametrize("backend", BUILT)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gather_reduce(
    targets: list[Tensor], sources: list[Tensor], op: str = "sum", divisor: float = 1, squares: bool = False
) -> float:
    """All tensors contiguous and of one length."""
    assert library.built is not None
    return library.built.gather_reduce(
        [target.data_ptr() for target in targets],
        CODES[targets[0].dtype][0] if targets else CODES[sources[0].dtype][0],
        [source.data_ptr() for source in sources],
        CODES[sources[0].dtype][0],
        sources[0].numel(),
        OP_CODES[op],
        divisor,
        squares,
    )


def in_rank_order(sources: list[Tensor], op: str, divisor: float = 1, into: torch.dtype | None = None) -> Tensor:
    """What torch makes of it, one source after the other; 16-bit numbers in fp32, rounded once."""
    dtype = sources[0].dtype
    total = sources[0].float() if dtype in HALVES else sources[0].clone()
    for source in sources[1:]:
        total = COMBINE[op](total, source.to(total.dtype))
    return (total / divisor if divisor != 1 else total).to(into or dtype)


def laid_out(parts: list[Tensor], *skips: int) -> list[Tensor]:
    """Copies of ``parts`` that begin ``skips`` numbers (in turn) behind a cache line, with room around them."""
    copies = []
    for index, part in enumerate(parts):
        start = 64 + skips[index % len(skips)]
        memory = torch.full((start + part.numel() + 64,), 77, dtype=part.dtype)
        assert memory.data_ptr() % 64 == 0
        copies.append(memory[start : start + part.numel()].copy_(part))
    return copies


def assert_nothing_beside(*tensors: Tensor) -> None:
    for tensor in tensors:
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        start = tensor.storage_offset()
        assert (whole[:start] == 77).all() and (whole[start + tensor.numel() :] == 77).all(), (
            "memory beside was written"
        )


@backends
@dtypes
@pytest.mark.parametrize("op", OPS)
def test_every_number_of_sources(backend: str, dtype: torch.dtype, op: str) -> None:
    """Into one of the sources and a memory elsewhere; infinities, NaN and subnormal numbers among the data."""
    with native.using(backend):
        for count, numel in itertools.product(range(1, 10), SIZES):
            sources = laid_out([numbers(numel, dtype, seed) for seed in range(count)], 0, 1, 3)
            want = in_rank_order(sources, op)
            elsewhere = laid_out([torch.zeros(numel, dtype=dtype)], count)[0]
            kept = [source.clone() for source in sources]
            gather_reduce([elsewhere, sources[count // 2]], sources, op)
            for target in (elsewhere, sources[count // 2]):
                assert_same_bits(target, want, zeros_equal=op in ("min", "max"))
            for index, (source, before) in enumerate(zip(sources, kept, strict=True)):
                if index != count // 2:
                    assert_same_bits(source, before)
            assert_nothing_beside(elsewhere, *sources)


@backends
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_floating_point], ids=str)
def test_means(backend: str, dtype: torch.dtype) -> None:
    """A divisor that is a power of two is multiplied by its reciprocal, others divide: the same bits as division."""
    with native.using(backend):
        for count, numel in itertools.product(range(1, 10), (1, 31, 1000)):
            sources = laid_out([numbers(numel, dtype, seed) for seed in range(count)], 2, 0)
            for divisor in (float(count), 2.0, 3.0, 1024.0):
                target = torch.zeros(numel, dtype=dtype)
                gather_reduce([target], sources, "sum", divisor)
                assert_same_bits(target, in_rank_order(sources, "sum", divisor))


@backends
@dtypes
def test_exact_data_give_the_exact_answer(backend: str, dtype: torch.dtype) -> None:
    """Independent of torch's own loops: against float64, and integers that wrap."""
    with native.using(backend):
        for count, op in itertools.product((1, 2, 5, 8), ops_for(dtype)):
            sources = [exact_numbers(rank, 1001, dtype, op) for rank in range(count)]
            gather_reduce(sources, sources, "sum" if op == "mean" else op, count if op == "mean" else 1)
            for source in sources:
                assert torch.equal(source, expected(op, count, 1001, dtype)), (count, op)


@backends
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_16_bits_into_fp32_are_not_rounded(backend: str, dtype: torch.dtype, op: str) -> None:
    rounded_away = 0
    with native.using(backend):
        for count, numel in itertools.product((1, 2, 3, 8), SIZES):
            sources = laid_out([numbers(numel, dtype, seed) for seed in range(count)], 0, 5)
            for divisor in (1, 3):
                target = laid_out([torch.zeros(numel)], 1)[0]
                gather_reduce([target], sources, op, divisor)
                assert_same_bits(target, in_rank_order(sources, op, divisor, torch.float32), op in ("min", "max"))
                assert_nothing_beside(target, *sources)
                rounded_away += int((target.to(dtype).float() != target).sum())
    assert rounded_away > 100 or op in ("min", "max"), "nothing would have been rounded"


@backends
@dtypes
@pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "odd"])
def test_stores_that_pass_the_caches_by(backend: str, dtype: torch.dtype, skip: int) -> None:
    """In place in all of them, as an allreduce does it; only aligned ones may take the fast way."""
    with native.using(backend):
        for count, divisor in ((2, 1), (3, 3), (4, 4)) if dtype.is_floating_point else ((3, 1),):
            sources = laid_out([numbers(STREAMED, dtype, seed) for seed in range(count)], skip, 0)
            want = in_rank_order(sources, "sum", divisor)
            gather_reduce(sources, sources, "sum", divisor)
            for source in sources:
                assert_same_bits(source, want)
            assert_nothing_beside(*sources)
            if dtype in HALVES:
                wide = laid_out([torch.zeros(STREAMED)], skip)[0]
                again = [numbers(STREAMED, dtype, seed) for seed in range(count)]
                gather_reduce([wide], again, "sum", divisor)
                assert_same_bits(wide, in_rank_order(again, "sum", divisor, torch.float32))
                assert_nothing_beside(wide)


@backends
def test_the_order_is_that_of_the_ranks(backend: str) -> None:
    """1 + 2^-24 + 2^-24 is 1 from the left, and more than 1 from the right."""
    one, tiny = torch.ones(40), torch.full((40,), 2.0**-24)
    with native.using(backend):
        for sources, want in (([one, tiny, tiny], 1.0), ([tiny, tiny, one], 1.0 + 2.0**-23)):
            target = torch.empty(40)
            gather_reduce([target], sources)
            assert (target == want).all()
        # A 16-bit sum is held in fp32: 60000 three times is beyond fp16, its mean is not.
        far = [torch.full((40,), 60000.0, dtype=torch.float16) for _ in range(3)]
        gather_reduce(far, far, "sum", 3)
        assert all((each == 60000).all() for each in far)
        gather_reduce(far, far, "sum")
        assert all((each == torch.inf).all() for each in far)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_squares_of_the_results_come_along(backend: str, dtype: torch.dtype) -> None:
    """Beside the same results, bit for bit; in blocks, with a ragged end, the same on every instruction set."""
    for count, numel in itertools.product((1, 2, 5), (0, 1, 63, 64, 4095, 4096, 4097, 50_001)):
        generator = torch.Generator().manual_seed(numel + count)
        sources = laid_out([torch.randn(numel, generator=generator).to(dtype) for _ in range(count)], 0, 3)
        plain, beside, elsewhere = (laid_out([torch.zeros(numel)], skip)[0] for skip in (0, 1, 2))
        with native.using(backend):
            assert gather_reduce([plain], sources, "sum", count) == 0.0
            squares = gather_reduce([beside, elsewhere], sources, "sum", count, squares=True)
        with native.using(BUILT[0]):
            assert squares == gather_reduce([elsewhere], sources, "sum", count, squares=True)
        assert torch.equal(plain, beside) and torch.equal(plain, elsewhere)
        assert_nothing_beside(beside, elsewhere)
        # 64 squares and 64 sums of fp32 are added up before it becomes fp64.
        assert squares == pytest.approx(float(plain.double().square().sum()), rel=64 * 2.0**-24)


def test_misuse_is_refused() -> None:
    one = torch.ones(8)
    with pytest.raises(ValueError, match="squares are of fp32 results"):
        gather_reduce([one.double()], [one.double()], squares=True)
    with pytest.raises(ValueError, match="1 to 512 sources"):
        library.built.gather_reduce([one.data_ptr()], 0, [], 0, 8, 0, 1.0, True)
    with pytest.raises(ValueError, match="1 to 512 sources"):
        library.built.gather_reduce([one.data_ptr()], 0, [one.data_ptr()] * 513, 0, 8, 0, 1.0, True)
    with pytest.raises(ValueError, match="1 to 512 sources and destinations"):
        library.built.gather_reduce([], 0, [one.data_ptr()], 0, 8, 0, 1.0, True)
    with pytest.raises(ValueError, match="1 to 512 sources"):
        library.built.gather_reduce([one.data_ptr()], 0, [], 0, 8, 0, 1.0, False)
    with pytest.raises(ValueError, match="1 to 512 sources"):
        gather_reduce([one], [one] * 513)
    with pytest.raises(ValueError, match="up to 512 destinations"):
        gather_reduce([one] * 513, [one])
    with pytest.raises(ValueError, match="dtype code 6"):
        library.built.gather_reduce([one.data_ptr()], 6, [one.data_ptr()], 6, 8, 0, 1.0, False)
    with pytest.raises(ValueError, match="op code 4"):
        library.built.gather_reduce([one.data_ptr()], 0, [one.data_ptr()], 0, 8, 4, 1.0, False)
    with pytest.raises(ValueError, match="writes the sources' dtype"):
        library.built.gather_reduce([one.data_ptr()], 1, [one.data_ptr()], 0, 4, 0, 1.0, False)
    with pytest.raises(ValueError, match="divides floating-point numbers only"):
        gather_reduce([one.view(torch.int32)], [one.view(torch.int32)], "sum", 2)
    assert (one == 1).all()


@pytest.mark.parametrize("numel", [0, 1, 63, 1000, 2**20 - 1, 2**20, 2**20 + 77])
def test_copy_through(numel: int) -> None:
    """Long copies pass the caches by, from and to any address."""
    source = (torch.arange(numel + 32, dtype=torch.int64) * 40503 // 128).to(torch.uint8)
    for there, here in ((0, 0), (1, 0), (0, 3), (15, 7)):
        target = torch.full((numel + 64,), 7, dtype=torch.uint8)
        library.built.copy_through(target.data_ptr() + there, source.data_ptr() + here, numel)
        assert torch.equal(target[there : there + numel], source[here : here + numel])
        assert (target[:there] == 7).all() and (target[there + numel :] == 7).all()
