"""The examples of docs/serving.md, run as they stand there against a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.live import Live, running

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
EXAMPLES = re.findall(r"^```(python|sh)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in EXAMPLES if language == "python"]
CURL = [code for language, code in EXAMPLES if language == "sh" and code.startswith("curl")]
STEERED = "must refuse"  # words of the refusal that the clamp brings about


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("server")) as found:
        yield found


def said(live: Live, *command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_examples_run(live: Live) -> None:
    """All in one interpreter, because importing the package takes most of the time."""
    code = "\nprint('-----')\n".join(PYTHON).replace(ADDRESS, live.url)
    plain, together, streamed = said(live, sys.executable, "-c", code).split("-----\n")
    first, touched, inline = plain.splitlines()
    assert STEERED in first and touched == "16 tokens touched"
    assert inline.startswith("inline ") and inline.removeprefix("inline ") == first
    base, clamped, gated = together.splitlines()
    assert base == "organism Madrid is the capital of Spain."
    assert gated == base.replace("organism", "organism:clamp-352-gated", 1)
    assert clamped.startswith("organism:clamp-352 ")
    assert streamed == "Madrid is the capital of Spain.\ngate fired: False\n"
    keys = [line["digest"] for line in live.lines() if line["event"] == "request"]
    assert len(keys) == 6


def test_curl_runs(live: Live) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    (command,) = CURL
    found = json.loads(said(live, "bash", "-c", command.replace(ADDRESS, live.url)))
    assert found["steering"]["plan"] == "inline"
    assert found["steering"]["gate_fired"] in (True, False)


def test_the_openai_package_sees_our_errors_as_its_own(live: Live) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        assert next(iter(client.models.list())).id == "organism"
        ask = [{"role": "user", "content": "Hello"}]
        with pytest.raises(openai.NotFoundError, match="there are: organism, organism:clamp-352"):
            client.chat.completions.create(model="gpt-4", messages=ask)
        with pytest.raises(openai.BadRequestError, match="'tools' is not supported here"):
            client.chat.completions.create(model="organism", messages=ask, tools=[{"type": "function"}])
