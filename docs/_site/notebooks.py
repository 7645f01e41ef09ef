"""Each notebook is a page of the site: its prose as it is, its cells as code. They run in tests/test_notebooks.py."""

from __future__ import annotations

import json
import re
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Beside each notebook, which stays a file to be fetched, a page."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = file.src_uri.removesuffix(".ipynb")
        files.append(File.generated(config, f"{name}.md", content=_page(file.content_string, name.split("/")[-1])))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to a notebook lead to its page; the page itself links to the file."""
    if page.file.src_uri.startswith("notebooks/"):
        return markdown
    return re.sub(r"\]\(([^)]*)\.ipynb\)", r"](\1.md)", markdown)


def _page(text: str, name: str) -> str:
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    shown = [f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells]
    shown.insert(1, f"[The notebook as a file]({name}.ipynb){{ download }}")
    return "\n\n".join(shown)
