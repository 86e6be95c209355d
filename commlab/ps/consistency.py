"""Consistency: when a worker may read. The rule here is the whole difference between BSP, SSP and ASP.

A worker's clock counts its own steps: a push at clock c is an update of clock c. Of a value, ``contained`` is the
number of clocks that it contains *of every worker*: all updates of clocks 0 .. contained - 1.

    BSP      a read at clock c waits until contained >= c; the workers' updates of one clock are averaged into one
    SSP(s)   a read at clock c waits until contained >= c - s: updates of clocks <= c - s - 1 are there, newer ones may
             be; so no worker that reads runs more than s clocks ahead of the slowest
    ASP      a read never waits

L. Valiant, "A bridging model for parallel computation", CACM 1990 (BSP); Q. Ho et al., "More effective distributed ML
via a stale synchronous parallel parameter server", NIPS 2013 (SSP).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError

LOCKSTEP_ONLY = (
    "needs all workers' gradients of a clock on all servers before any of them is applied, and under {consistency} "
    "every push is applied alone"
)
"""Why clipping to a global norm, and skipping what is not finite, can't be had under ssp and asp; follows the option
that asked for it."""


@dataclass(frozen=True)
class Consistency:
    """One of BSP, SSP(s) and ASP."""

    name: str
    staleness: int | None
    """The most clocks that a read may lack of any worker; None: no limit."""
    averages: bool
    """Whether a clock's updates of all workers are one update, their mean."""

    def may_read(self, clock: int, contained: int) -> bool:
        """Whether a read at ``clock`` may be answered now."""
        return self.staleness is None or contained >= clock - self.staleness

    def require_lockstep(self, option: str) -> None:
        """UsageError, which names ``option``, unless all workers' updates of a clock become one."""
        if not self.averages:
            raise UsageError(
                f"{option} {LOCKSTEP_ONLY.format(consistency=self.name)}: clip each worker's own gradient before the "
                "push, or use bsp"
            )

    def keeps(self, lacking: int) -> bool:
        """Whether the rule allows an answer that lacks ``lacking`` clocks of the slowest worker. Stated apart from
        :meth:`may_read`, because servers check every answer that they give with this."""
        return self.staleness is None or lacking <= self.staleness


BSP = Consistency("bsp", 0, True)


def lacking(clock: int, contained: int) -> int:
    """Staleness of a read at ``clock``: how many clocks of the slowest worker the value lacks; 0 in lockstep."""
    return max(0, clock - contained)


def parse(text: str) -> Consistency:
    """The consistency named ``"bsp"``, ``"ssp:S"`` (S >= 0) or ``"asp"``. UsageError for any other name."""
    name, colon, bound = text.partition(":") if isinstance(text, str) else ("", "", "")
    if name in ("bsp", "asp") and not colon:
        return BSP if name == "bsp" else Consistency(name, None, False)
    if name == "ssp" and bound.isdecimal():
        return Consistency(text, int(bound), False)
    raise UsageError(
        f"unknown consistency {text!r}: give bsp (lockstep), ssp:4 (at most 4 clocks ahead of the slowest worker) "
        "or asp (never wait)"
    )
