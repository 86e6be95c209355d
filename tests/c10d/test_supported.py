"""docs/c10d.md says what each operation of torch.distributed goes by; this is how the table is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import Forked

PAGE = Path(__file__).parents[2] / "docs/c10d.md"


def operations(rank: int, size: int) -> dict[str, Callable[[Any], Any]]:
    """Calls by the words of the page; each is given a group."""
    x = torch.ones(4)
    each = [torch.ones(4) for _ in range(size)]
    only_root: Any = each if rank == 0 else None

    def sent(group: Any) -> None:
        dist.send(x, 1, group=group) if rank == 0 else dist.recv(x, 0, group=group)

    def sparse(group: Any) -> None:
        dist.all_reduce(torch.sparse_coo_tensor([[0]], [1.0], (2,)), group=group)

    return {
        "all_reduce": lambda group: dist.all_reduce(x, group=group),
        "all_reduce_coalesced": lambda group: dist.all_reduce_coalesced([x, x + 1], group=group),
        "reduce": lambda group: dist.reduce(x, 0, group=group),
        "broadcast": lambda group: dist.broadcast(x, 0, group=group),
        "all_gather": lambda group: dist.all_gather(each, x, group=group),
        "all_gather_into_tensor": lambda group: dist.all_gather_into_tensor(torch.ones(4 * size), x, group=group),
        "all_gather_coalesced": lambda group: dist.all_gather_coalesced([[t] for t in each], [x], group=group),
        "reduce_scatter": lambda group: dist.reduce_scatter(x, each, group=group),
        "reduce_scatter_tensor": lambda group: dist.reduce_scatter_tensor(x, torch.ones(4 * size), group=group),
        "gather": lambda group: dist.gather(x, only_root, 0, group=group),
        "scatter": lambda group: dist.scatter(x, only_root, 0, group=group),
        "all_to_all": lambda group: dist.all_to_all(each, [torch.ones(4)] * size, group=group),
        "all_to_all_single": lambda group: dist.all_to_all_single(
            torch.ones(4 * size), torch.ones(4 * size), group=group
        ),
        "all_gather_object": lambda group: dist.all_gather_object([None] * size, "text", group=group),
        "broadcast_object_list": lambda group: dist.broadcast_object_list([rank], 0, group=group),
        "barrier": lambda group: dist.barrier(group),
        "monitored_barrier": lambda group: group.monitored_barrier(),
        "send, recv, isend, irecv, batch_isend_irecv": sent,
        "bitwise reductions (BAND, BOR, BXOR)": lambda group: dist.all_reduce(
            torch.ones(2, dtype=torch.int32), dist.ReduceOp.BOR, group=group
        ),
        "sparse tensors": sparse,
    }


def ways(rank: int, size: int) -> dict[str, str]:
    found = {}
    for words, call in operations(rank, size).items():
        group: Any = dist.new_group(backend="commlab")
        call(group)
        found[words] = "gloo" if group._plain is not None else "commlab"
        dist.barrier()
    return found


def test_the_page_says_what_goes_where(forked: Forked) -> None:
    found = forked(ways, 2)
    assert found[0] == found[1]
    table = "".join(f"| {words} | {way} |\n" for words, way in found[0].items())
    shown = re.findall(r"^\| ([^|]+) \| (commlab|gloo) \|$", PAGE.read_text(), re.MULTILINE)
    assert {words.strip("`"): way for words, way in shown} == found[0], f"the page should show\n{table}"
