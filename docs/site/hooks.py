"""What the site has beyond docs/: pictures drawn from the schedules, API pages, the examples' sources.

mkdocs calls the functions ``on_...``. Nothing here needs torch: schedules are data.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers"), str(ROOT / "docs/site")]

from drawing import svg  # noqa: E402
from reference import REFERENCE  # noqa: E402

PICTURES = {"ring": (4,), "halving": (4, 6), "tree": (8,), "direct": (4,)}
ONLY_IN_THE_CHECKOUT = re.compile(r"\]\((?:\.\./)+((?:bench|commlab|tests|kernels)/[^)]*)\)")


def on_files(files: Files, config: Any) -> Files:
    for page, (title, names) in REFERENCE.items():
        text = f"# {title}\n\n" + "".join(f"::: commlab.{name}\n\n" for name in names)
        files.append(File.generated(config, f"reference/{page}.md", content=text))
    for name, sizes in PICTURES.items():
        for size in sizes:
            files.append(File.generated(config, f"pictures/{name}-{size}.svg", content=svg(name, size)))
    style = (Path(__file__).parent / "style.css").read_text()
    files.append(File.generated(config, "style.css", content=style))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    path = page.file.src_uri
    # Files beside docs/ are not on the site: their paths are told, as in the text.
    markdown = ONLY_IN_THE_CHECKOUT.sub(lambda link: f'](# "{link[1]}")', markdown)
    name = Path(path).stem
    if path.startswith("algorithms/") and name in PICTURES:
        pictures = "\n\n".join(
            f"![allreduce by {name} on {size} ranks: who sends what to whom](../pictures/{name}-{size}.svg)"
            for size in PICTURES[name]
        )
        fence = markdown.index("\n```\n")
        markdown = f"{markdown[:fence]}\n{pictures}\n{markdown[fence:]}"
    if path == "examples.md":
        for script in sorted((ROOT / "docs/examples").glob("*.py")):
            markdown += f"\n## {script.name}\n\n```python\n{script.read_text()}```\n"
    return markdown
