"""Sessions of push and pull: who does what, closed forms, bytes on links."""

from __future__ import annotations

import torch

from bench.contestants import parameter_server

FOUR_HOSTS = [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_same_workers_whatever_the_number_of_servers() -> None:
    one, two, four = (parameter_server.roles(FOUR_HOSTS, servers, 4) for servers in (1, 2, 4))
    assert one.workers == two.workers == four.workers == (0, 2, 4, 6)
    assert (one.servers, two.servers, four.servers) == ((7,), (5, 7), (1, 3, 5, 7))


def test_bytes_of_the_busiest_link() -> None:
    """One server takes in what three other hosts push. Four share it: each host's worker sends three quarters to other
    hosts, and its server a quarter to each of the three."""
    assert parameter_server.roles(FOUR_HOSTS, 1, 4).link_bytes(FOUR_HOSTS, 100) == 300
    assert parameter_server.roles(FOUR_HOSTS, 2, 4).link_bytes(FOUR_HOSTS, 100) == 200
    assert parameter_server.roles(FOUR_HOSTS, 4, 4).link_bytes(FOUR_HOSTS, 100) == 150
    assert parameter_server.roles([[0, 1]], 1, 1).link_bytes([[0, 1]], 100) == 0
    assert parameter_server.Roles((0, 1), (2, 3)).link_bytes([[0], [1], [2], [3]], 100) == 100


def test_what_is_pulled_is_a_sum_in_closed_form() -> None:
    mean = sum(parameter_server.pushed(worker, 300).double() for worker in range(3)) / 3
    assert torch.equal(parameter_server.expected(5, 3, 300, None).double(), 5 * mean - 3)
    assert all(
        torch.equal(parameter_server.pushed(worker, 300).bfloat16().float(), parameter_server.pushed(worker, 300))
        for worker in range(9)
    )
    assert (
        not torch.equal(parameter_server.pushed(0, 300), parameter_server.pushed(1, 300))
        and len(parameter_server.pushed(0, 300).unique()) == 97
    )
