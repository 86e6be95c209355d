"""The trainer: everything behind ``python -m commlab.train`` that is not the engine.

``flags`` turns a dataclass into flags; ``knobs`` is the page of all knobs, and ``config`` checks them and derives
defaults, both without torch. ``data/`` makes batches from text; ``model`` builds GPT-2 and its losses, ``build`` the
device and the optimizer. ``report`` shows a run to the user: it writes ``metrics``, prints a ``sample`` of the trained
model, and ends with the table of ``summary``.
"""
