"""What is patched in vLLM and what is read from it is there, by name, in the installed version and for both runners.

When vLLM moves, this says what moved.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest

pytestmark = pytest.mark.ci

V1, V2 = "vllm.v1.worker.gpu_model_runner.GPUModelRunner", "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
CHAT = "vllm.entrypoints.openai.chat_completion"
TEXT = "vllm.entrypoints.openai.completion"

PATCHED: dict[str, tuple[str, ...]] = {
    f"{V1}.load_model": (),
    "vllm.v1.worker.cpu_model_runner.CPUModelRunner.load_model": (),
    f"{V1}._update_states": ("scheduler_output",),
    f"{V1}._prepare_inputs": ("scheduler_output", "num_scheduled_tokens"),
    f"{V1}._dummy_run": (),
    f"{V2}.load_model": (),
    f"{V2}.add_requests": ("scheduler_output",),
    f"{V2}.finish_requests": ("scheduler_output",),
    f"{V2}.prepare_inputs": ("scheduler_output",),
    f"{V2}.execute_model": ("scheduler_output", "intermediate_tensors", "dummy_run"),
    "vllm.v1.engine.core.EngineCore.preprocess_add_request": ("request",),
    "vllm.v1.engine.async_llm.AsyncLLM.generate": ("prompt", "sampling_params", "request_id"),
    "vllm.v1.engine.llm_engine.LLMEngine.add_request": ("request_id", "prompt", "params"),
    "vllm.v1.engine.llm_engine.LLMEngine.step": (),
    "vllm.v1.engine.llm_engine.LLMEngine.abort_request": ("request_ids", "internal"),
    "vllm.engine.arg_utils.EngineArgs.create_engine_config": (),
    "vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys": (
        "request",
        "start_token_idx",
        "end_token_idx",
        "start_mm_idx",
    ),
    "vllm.entrypoints.serve.engine.serving.BaseServing._check_model": ("request",),
    "vllm.entrypoints.anthropic.serving.AnthropicServingMessages.create_messages": ("request", "raw_request"),
    "vllm.entrypoints.scale_out.token_in_token_out.serving.ServingTokens.serve_tokens": ("request", "raw_request"),
    "vllm.entrypoints.openai.models.serving.OpenAIServingModels.__init__": ("engine_client", "base_model_paths"),
    "vllm.entrypoints.openai.models.serving.OpenAIServingModels.init_static_loras": (),
    f"{CHAT}.protocol.ChatCompletionRequest.to_sampling_params": (),
    f"{CHAT}.protocol.ChatCompletionRequest.to_beam_search_params": (),
    f"{CHAT}.serving.OpenAIServingChat.create_chat_completion": ("request",),
    f"{CHAT}.serving.OpenAIServingChat.render_chat_request": ("request",),
    f"{CHAT}.serving.OpenAIServingChat.chat_completion_full_generator": ("request", "result_generator"),
    f"{CHAT}.serving.OpenAIServingChat.chat_completion_stream_generator": ("request", "result_generator"),
    f"{TEXT}.protocol.CompletionRequest.to_sampling_params": (),
    f"{TEXT}.protocol.CompletionRequest.to_beam_search_params": (),
    f"{TEXT}.serving.OpenAIServingCompletion.create_completion": ("request",),
    f"{TEXT}.serving.OpenAIServingCompletion.request_output_to_completion_response": (
        "final_res_batch",
        "request",
    ),
    f"{TEXT}.serving.OpenAIServingCompletion.completion_stream_generator": (
        "request",
        "engine_inputs",
        "result_generator",
    ),
    "vllm.entrypoints.openai.responses.protocol.ResponsesRequest.to_sampling_params": (),
}
"""What the plugin puts itself around, and the parameters that it takes by place."""

READ = {
    V1: ("positions", "input_batch", "requests", "vllm_config", "device", "model"),
    "vllm.v1.worker.gpu_input_batch.InputBatch": ("req_ids", "num_reqs", "num_computed_tokens_cpu"),
    "vllm.v1.worker.gpu_input_batch.CachedRequestState": ("sampling_params", "prompt_token_ids"),
    V2: ("input_buffers", "vllm_config", "device", "model"),
    "vllm.v1.worker.gpu.input_batch.InputBuffers": ("positions",),
    "vllm.v1.worker.gpu.input_batch.InputBatch": (
        "req_ids",
        "num_reqs",
        "query_start_loc_np",
        "num_computed_tokens_np",
    ),
    "vllm.v1.core.sched.output.NewRequestData": ("req_id", "sampling_params", "prompt_token_ids"),
    "vllm.v1.core.sched.output.SchedulerOutput": ("finished_req_ids", "scheduled_new_reqs"),
    "vllm.sampling_params.SamplingParams": ("extra_args", "skip_reading_prefix_cache", "output_kind", "detokenize"),
    "vllm.v1.request.Request": ("sampling_params",),
    "vllm.outputs.RequestOutput": ("finished", "outputs", "num_cached_tokens", "prompt_token_ids", "request_id"),
}
"""By class, the fields that the plugin reads."""

IN_TURN = {
    f"{V1}.execute_model": ("self._update_states(", "self._prepare_inputs("),
    f"{V2}.execute_model": ("self.finish_requests(", "self.add_requests(", "self.prepare_inputs("),
    f"{V2}._dummy_run": ("self.execute_model(", "dummy_run=True"),
}
"""Whose turn comes when: the last pass is counted before the positions of the next are written."""


def found(path: str) -> Any:
    """A module's, a class's or a function's, by its full name."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        try:
            there: Any = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            there = getattr(there, part)
        return there
    raise ModuleNotFoundError(path)


def unwrapped(path: str) -> Any:
    """vLLM's own, under whatever was put around it."""
    there = found(path)
    return inspect.unwrap(there, stop=lambda f: "clampdown" not in f.__code__.co_filename)


@pytest.mark.parametrize("path", PATCHED)
def test_what_is_patched_is_there_with_its_parameters(path: str) -> None:
    names = [name for name in inspect.signature(unwrapped(path)).parameters if name != "self"]
    assert tuple(names[: len(PATCHED[path])]) == PATCHED[path]


@pytest.mark.parametrize("path", READ)
def test_what_is_read_is_there(path: str) -> None:
    source = "\n".join(inspect.getsource(cls) for cls in found(path).__mro__[:-1] if cls.__module__.startswith("vllm"))
    missing = [
        name for name in READ[path] if not re.search(rf"self\.{name}\b|^    {name}\s*[:=]|def {name}\(", source, re.M)
    ]
    assert not missing


@pytest.mark.parametrize("path", IN_TURN)
def test_the_runners_do_things_in_the_order_that_is_counted_on(path: str) -> None:
    source = inspect.getsource(unwrapped(path))
    at = [source.index(part) for part in IN_TURN[path]]
    assert at == sorted(at)


def test_the_workers_can_be_asked() -> None:
    from clampdown_vllm.worker.remote import REMOTE

    worker = found("vllm.v1.worker.worker_base.WorkerBase")
    assert not [f.__name__ for f in REMOTE if getattr(worker, f.__name__, f) is not f]
