"""Servers that do not steer: one that would have to does not start, and `check` sees one that did."""

from __future__ import annotations

from pathlib import Path

import pytest
from server import plain, serving

from clampdown.errors import SteeringNotAppliedError
from clampdown.organism import PLANS_DIR
from clampdown_vllm.cli import checked, main

NO_PLUGINS = {"VLLM_PLUGINS": "some-other"}
EAGER = ("--enforce-eager", "--max-num-seqs", "4")


def test_with_the_plugin_left_out_of_its_workers_a_server_does_not_start(tmp_path: Path) -> None:
    """The command's own process has it, the engine's does not."""
    with (
        pytest.raises(RuntimeError, match="did not start") as caught,
        serving(PLANS_DIR, tmp_path, *EAGER, environment=NO_PLUGINS),
    ):
        pass
    assert "clampdown" in str(caught.value)


def test_a_server_that_vllm_starts_without_the_plugin_fails_the_check(tmp_path: Path) -> None:
    with serving(PLANS_DIR, tmp_path, *EAGER, command=plain, environment=NO_PLUGINS) as server:
        assert server.post("/v1/completions", {"model": "organism", "prompt": "Hello.", "max_tokens": 2})[0] == 200
        with pytest.raises(SteeringNotAppliedError, match="lists no plan"):
            checked(server.url)
        with pytest.raises(SystemExit) as stopped:
            main(["check", server.url])
        assert stopped.value.code == 2


def test_vllms_own_command_steers_with_the_plugin(tmp_path: Path) -> None:
    with serving(PLANS_DIR, tmp_path, *EAGER, command=plain) as server:
        assert len(checked(server.url)) == len(list(PLANS_DIR.glob("*.toml")))


@pytest.mark.ci
def test_a_server_that_is_not_there_fails_the_check() -> None:
    with pytest.raises(SteeringNotAppliedError, match="cannot be asked"):
        checked("http://127.0.0.1:9")
