"""Model Runner V1: the one on CPUs, and on GPUs where V2 cannot do what is asked.

`_prepare_inputs` comes after `_update_states` has reordered the batch, and fills `positions`; dummy runs are nobody's.
"""

from __future__ import annotations

from typing import Any

from clampdown_vllm.runners.arming import arm
from clampdown_vllm.runners.patching import wrap
from clampdown_vllm.worker.state import Asked, Request


def install() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for runner in (GPUModelRunner, CPUModelRunner):
        wrap(runner, "load_model", _load_model)
    wrap(GPUModelRunner, "_update_states", _update_states)
    wrap(GPUModelRunner, "_prepare_inputs", _prepare_inputs)
    wrap(GPUModelRunner, "_dummy_run", _dummy_run)


def _load_model(before: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    out = before(self, *args, **kwargs)
    if not hasattr(self, "clampdown"):
        arm(self, self.positions)
    return out


def _update_states(before: Any, self: Any, scheduler_output: Any) -> Any:
    if (state := getattr(self, "clampdown", None)) is not None:
        state.leave(scheduler_output.finished_req_ids)
    return before(self, scheduler_output)


def _prepare_inputs(before: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
    out = before(self, scheduler_output, num_scheduled_tokens)
    if (state := getattr(self, "clampdown", None)) is not None:
        batch = self.input_batch
        n = batch.num_reqs
        starts = batch.num_computed_tokens_cpu[:n].tolist()
        asked = zip(batch.req_ids[:n], starts, num_scheduled_tokens[:n].tolist(), strict=True)
        state.step([Asked(*each) for each in asked], lambda id_: _request(self.requests[id_]))
    return out


def _request(found: Any) -> Request | None:
    params = found.sampling_params
    return None if params is None else Request(params.extra_args, found.prompt_token_ids or ())


def _dummy_run(before: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if (state := getattr(self, "clampdown", None)) is not None:
        state.rest()
    return before(self, *args, **kwargs)
