"""--compile: refused in one sentence where nothing can be compiled. What torch.compile makes is torch's to test."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commlab.errors import UsageError
from commlab.trainer.build import compiled

CPU = torch.device("cpu")


def test_a_compiler_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda what: asked.append(what) or what)
    model = torch.nn.Linear(2, 2)
    assert compiled(model, CPU) is model
    assert asked[1:] == [model], "after a small function"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("backend failed\nSet TORCHDYNAMO_VERBOSE=1") from OSError(
            "no Python.h\nSet TORCHDYNAMO_VERBOSE=1"
        )

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setenv("CXX", "sh")
    with pytest.raises(UsageError, match=r"compiler for cpu; .*could not be compiled: OSError: no Python.h; install"):
        compiled(torch.nn.Linear(2, 2), CPU)
    monkeypatch.setattr(torch, "compile", lambda _: lambda values: values.sum() + 1)
    with pytest.raises(UsageError, match=r"a compiled sum of three ones is 4.0"):
        compiled(torch.nn.Linear(2, 2), CPU)
    monkeypatch.setenv("CXX", "/nowhere")
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler, and there is no '/nowhere' \(CXX\)"):
        compiled(torch.nn.Linear(2, 2), CPU)
