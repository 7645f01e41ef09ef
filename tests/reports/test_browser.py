"""The report in a real browser, where one is installed: figures drawn, nothing blocked, no sideways scrolling."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from clampdown.results.run import Run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--virtual-time-budget=8000",
    "--enable-logging=stderr",
)
PROBE = """
<script nonce="NONCE">
addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  root.dataset.sideways = root.scrollWidth - root.clientWidth;
  document.querySelectorAll("#table-arms-0 th button")[1].click();
  root.dataset.first = document.querySelector("#table-arms-0 tbody tr th").textContent.trim();
}, 1500));
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_it_works_in_a_browser(run_dir, tmp_path):
    path = Run.read(shutil.copytree(run_dir, tmp_path / "copy")).report()
    html = path.read_text(encoding="utf-8")
    nonce = re.search(r"'nonce-([0-9a-f]+)'", html)
    assert nonce is not None
    path.write_text(html.replace("</body>", PROBE.replace("NONCE", nonce[1])), encoding="utf-8")
    dom, log = dump(path, tmp_path / "profile")
    assert dom.count('<svg class="main-svg"') >= 6
    assert 'data-sideways="0"' in dom
    assert 'data-first="difference of means +6' in dom, "sorted by strength, strongest first"
    assert "Uncaught" not in log
    assert "Content Security Policy" not in log


def dump(path: Path, profile: Path) -> tuple[str, str]:
    """The document after its scripts ran, and the browser's console."""
    command = [
        str(BROWSER),
        *OPTIONS,
        "--window-size=360,780",
        f"--user-data-dir={profile}",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=True)
    return done.stdout, done.stderr
