"""Puts everything in place in one process, once. In an engine whose configuration names no plans nothing acts."""

from __future__ import annotations

_DONE: list[bool] = []


def once() -> None:
    """Called by vLLM for each process, and possibly several times in it."""
    if _DONE:
        return
    _DONE.append(True)
    from clampdown_vllm.front import configuring

    configuring.install()
    if configuring.version_is_tested():
        everything()


def everything() -> None:
    """All hooks but those of the front end. On a vLLM of another shape this raises, and the process stops."""
    from vllm.v1.worker.worker_base import WorkerBase

    from clampdown_vllm import blocks, core
    from clampdown_vllm.runners import v1, v2
    from clampdown_vllm.worker.remote import REMOTE

    blocks.install()
    core.install()
    v1.install()
    v2.install()
    for function in REMOTE:
        setattr(WorkerBase, function.__name__, function)


def front_end() -> None:
    """The hooks of the process that takes requests, once."""
    if len(_DONE) > 1:
        return
    _DONE.append(True)
    from clampdown_vllm.front import async_engine, http, sync_engine

    async_engine.install()
    sync_engine.install()
    http.install()
