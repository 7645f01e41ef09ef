"""The engines that the table is about: one change each from the plainest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

COMMON: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "block_size": 32}
EAGER: dict[str, Any] = {"enforce_eager": True}

SETUPS: Mapping[str, dict[str, Any]] = {
    "eager": EAGER,
    "small budget": {**EAGER, "max_num_batched_tokens": 32, "enable_chunked_prefill": True},
    "no chunks": {**EAGER, "enable_chunked_prefill": False, "max_num_batched_tokens": 2048},
    "preempted": {**EAGER, "num_gpu_blocks_override": 40},
    "ngram": {
        **EAGER,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 1,
        },
    },
    "tensor parallel": {**EAGER, "tensor_parallel_size": 2},
    "compiled": {},
}
"""The block is the smallest that the CPU's kernels take: conversations of one beginning share some."""

RUNNERS: Mapping[str, str] = {
    "v1": "vllm.v1.worker.cpu_model_runner.CPUModelRunner",
    "v2": "vllm.v1.worker.cpu.model_runner.CPUModelRunner",
}
V2_TOO = ("eager", "small budget", "no chunks", "preempted", "ngram")
"""Engines that Model Runner V2 is tried in as well."""


def interpret() -> None:
    """Before vLLM is imported: Model Runner V2 on a CPU. Its kernels are Triton's, which can interpret them; vLLM asks
    whether Triton has a backend for CPUs, of which it then uses the driver's name only."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)  # type: ignore[assignment]


def environment() -> None:
    """Before vLLM is imported: small, quiet, and on whatever cores there are."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", "1800")
    os.environ.setdefault("VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT", "300")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")
