"""What this plugin was tested with. Everything else is refused by name, unless the configuration allows it by name.

vLLM's insides have no stable interface: a method that changed its meaning would leave replies unsteered under a steered
name. So a server with plans starts only on a version that the tests ran on, and only with features that they covered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from clampdown.errors import SteeringNotAppliedError

TESTED = ("0.32.0",)

Check = Callable[[Any], bool]


def _env(name: str) -> bool:
    import os

    return os.environ.get(name, "") not in ("", "0", "false", "False")


def _spec(config: Any) -> bool:
    return config.speculative_config is not None and config.speculative_config.method != "ngram"


def _sequence_parallel(config: Any) -> bool:
    """Ranks hold different tokens of the residual: in experts, or in hyper-connections."""
    return bool(config.parallel_config.use_sequence_parallel_moe or config.parallel_config.enable_hc_sp)


UNTESTED: dict[str, tuple[str, Check]] = {
    "pipeline-parallel": ("pipeline parallelism", lambda c: c.parallel_config.pipeline_parallel_size > 1),
    "data-parallel": ("data parallelism", lambda c: c.parallel_config.data_parallel_size > 1),
    "context-parallel": (
        "context parallelism",
        lambda c: (
            max(c.parallel_config.decode_context_parallel_size, c.parallel_config.prefill_context_parallel_size) > 1
        ),
    ),
    "expert-parallel": ("expert parallelism", lambda c: bool(c.parallel_config.enable_expert_parallel)),
    "sequence-parallel": ("sequence parallelism", _sequence_parallel),
    "ubatching": ("batches cut into micro-batches (DBO, ubatch_size)", lambda c: bool(c.parallel_config.use_ubatching)),
    "kv-connector": ("KV connectors", lambda c: c.kv_transfer_config is not None),
    "ec-connector": ("encoder-cache connectors", lambda c: c.ec_transfer_config is not None),
    "lora": ("LoRA adapters", lambda c: c.lora_config is not None),
    "speculation": ("speculative decoding by anything but ngram", _spec),
    "api-servers": ("several API server processes", lambda c: c.parallel_config._api_process_count > 1),
    "rust-frontend": ("the Rust front end", lambda c: _env("VLLM_USE_RUST_FRONTEND")),
    "multimodal": ("multimodal models", lambda c: bool(c.model_config.is_multimodal_model)),
    "encoder-decoder": ("encoder-decoder models", lambda c: bool(c.model_config.is_encoder_decoder)),
    "pooling": ("models that do not generate", lambda c: c.model_config.runner_type != "generate"),
    "quantization": ("weights that vLLM quantises", lambda c: bool(c.model_config.quantization)),
    "fast-prefill": ("fast prefill (kv_sharing_fast_prefill)", lambda c: bool(c.cache_config.kv_sharing_fast_prefill)),
    "sleep": ("sleep mode", lambda c: bool(c.model_config.enable_sleep_mode)),
}
"""Name in `allow_untested`, what it is, and whether a vLLM configuration has it. A field that is no longer there is an
error, not a feature that is off."""


RUNNERS = (
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
    "vllm.v1.worker.cpu_model_runner.CPUModelRunner",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner",
    "vllm.v1.worker.cpu.model_runner.CPUModelRunner",
)
"""The model runners whose methods `runners/` knows, V1 and V2. One derived from them may go its own ways."""


def refuse_runner(runner: str, allowed: tuple[str, ...]) -> None:
    """Raises `SteeringNotAppliedError` for a worker whose model runner is none of those."""
    if runner not in RUNNERS and "runner" not in allowed:
        raise SteeringNotAppliedError(
            f"a worker's model runner is {runner}, which steering does not know",
            hint="allow it at your own risk: allow_untested = [runner]",
        )


def refuse_version(version: str, allowed: tuple[str, ...]) -> None:
    """Raises `SteeringNotAppliedError` for a vLLM that the tests never ran on."""
    plain = version.partition("+")[0]
    if plain not in TESTED and "version" not in allowed:
        raise SteeringNotAppliedError(
            f"clampdown-vllm was tested with vLLM {', '.join(TESTED)}, this is {version}",
            hint='install that version, or allow it: {"clampdown": {"allow_untested": ["version"], ...}}',
        )


def refuse_untested(config: Any, allowed: tuple[str, ...]) -> None:
    """Raises `SteeringNotAppliedError` naming every feature in use that steering was not tested with."""
    found = list(_in_use(config, allowed))
    if found:
        names = ", ".join(name for name, _ in found)
        raise SteeringNotAppliedError(
            "steering was not tested with " + "; ".join(what for _, what in found),
            hint=f"turn it off, or allow it at your own risk: allow_untested = [{names}]",
        )


def _in_use(config: Any, allowed: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, (what, check) in UNTESTED.items():
        if name not in allowed and check(config):
            yield name, what
