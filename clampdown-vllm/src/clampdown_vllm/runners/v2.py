"""Model Runner V2: the default on GPUs. The tests run it on a CPU, its Triton kernels interpreted; not yet on a GPU.

It keeps no SamplingParams after `add_requests`, and takes a request's state away when it is preempted; ours stays until
the request is finished. `prepare_inputs` fills `input_buffers.positions` and returns the batch in its order.
"""

from __future__ import annotations

from typing import Any

from clampdown_vllm.runners.arming import arm
from clampdown_vllm.runners.patching import wrap
from clampdown_vllm.worker.state import Asked, Request


def install() -> None:
    try:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    except ImportError:
        return  # without Triton there is no V2; should one be used all the same, the handshake finds it unarmed

    wrap(GPUModelRunner, "load_model", _load_model)
    wrap(GPUModelRunner, "add_requests", _add_requests)
    wrap(GPUModelRunner, "finish_requests", _finish_requests)
    wrap(GPUModelRunner, "prepare_inputs", _prepare_inputs)
    wrap(GPUModelRunner, "execute_model", _execute_model)


def _load_model(before: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    out = before(self, *args, **kwargs)
    if not hasattr(self, "clampdown"):
        self.clampdown_requests = {}
        arm(self, self.input_buffers.positions)
    return out


def _add_requests(before: Any, self: Any, scheduler_output: Any) -> Any:
    if hasattr(self, "clampdown"):
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params is not None:
                found = Request(new.sampling_params.extra_args, new.prompt_token_ids or ())
                self.clampdown_requests.setdefault(new.req_id, found)
    return before(self, scheduler_output)


def _finish_requests(before: Any, self: Any, scheduler_output: Any) -> Any:
    if hasattr(self, "clampdown"):
        self.clampdown.leave(scheduler_output.finished_req_ids)
        for id_ in scheduler_output.finished_req_ids:
            self.clampdown_requests.pop(id_, None)
    return before(self, scheduler_output)


def _prepare_inputs(before: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    batch = before(self, *args, **kwargs)
    if hasattr(self, "clampdown"):
        n = batch.num_reqs
        counts = (batch.query_start_loc_np[1 : n + 1] - batch.query_start_loc_np[:n]).tolist()
        starts = batch.num_computed_tokens_np[:n].tolist()
        asked = [Asked(*each) for each in zip(batch.req_ids[:n], starts, counts, strict=True)]
        self.clampdown.step(asked, self.clampdown_requests.get)
    return batch


def _execute_model(
    before: Any,
    self: Any,
    scheduler_output: Any,
    intermediate_tensors: Any = None,
    dummy_run: bool = False,
    **kwargs: Any,
) -> Any:
    if dummy_run and hasattr(self, "clampdown"):
        self.clampdown.rest()
    return before(self, scheduler_output, intermediate_tensors, dummy_run, **kwargs)
