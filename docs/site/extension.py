"""What mkdocstrings is told about commlab's docstrings."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:\w+):`~?([^`]+)`")


class Roles(Extension):
    """Docstrings name things by Sphinx's roles, ``:func:`name` ``; the site's Markdown has code instead."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
