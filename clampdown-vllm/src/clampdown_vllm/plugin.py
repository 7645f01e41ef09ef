"""The entry point that vLLM calls in every process: the front end, the engine's core and each worker.

vLLM swallows what goes wrong when a plugin is imported, and not what its function raises. So nothing is imported here
before the function runs, and a plugin that cannot do its work stops the process.
"""

from __future__ import annotations


def register() -> None:
    """Put the hooks into vLLM. They do nothing in an engine whose configuration names no plans."""
    from clampdown_vllm import install

    install.once()
