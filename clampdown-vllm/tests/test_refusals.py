"""Nothing runs unsteered, and nothing untested runs: every refusal by its name, and that what is allowed passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clampdown.config import embedded_model
from clampdown.errors import ClampdownError, PlanMismatchError, SteeringNotAppliedError
from clampdown.organism import PLANS_DIR
from clampdown_vllm import PLUGIN_VERSION
from clampdown_vllm.book import open_book
from clampdown_vllm.front import sinks
from clampdown_vllm.front.configuring import desk_of
from clampdown_vllm.front.desk import Desk
from clampdown_vllm.settings import KEY, Settings
from clampdown_vllm.versions import RUNNERS, UNTESTED, refuse_runner, refuse_untested, refuse_version
from clampdown_vllm.worker import remote

pytestmark = pytest.mark.ci


def configured(settings: dict[str, Any] | None, **options: Any) -> Any:
    """vLLM's own way to a configuration, through which every engine and every server goes."""
    from vllm.engine.arg_utils import EngineArgs

    more = {} if settings is None else {"additional_config": {KEY: settings}}
    return EngineArgs(model=str(embedded_model("organism")), **more, **options).create_engine_config()


@pytest.fixture(scope="module")
def plain() -> Any:
    return configured(None)


@pytest.fixture(scope="module")
def desk() -> Desk:
    found = desk_of(configured({"plans": str(PLANS_DIR)}))
    assert found is not None
    return found


# ---- features ----------------------------------------------------------------------------------------------------


def put(path: str, value: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """Into a field of a configuration."""

    def change(config: Any, patch: pytest.MonkeyPatch) -> None:
        *parts, last = path.split(".")
        for part in parts:
            config = getattr(config, part)
        patch.setattr(config, last, value)

    return change


def say(name: str) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """In the environment."""
    return lambda _, patch: patch.setenv(name, "1")


def connected(kind: str) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def change(config: Any, patch: pytest.MonkeyPatch) -> None:
        from vllm.config import ECTransferConfig, KVTransferConfig

        if kind == "kv":
            made: Any = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
        else:
            made = ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_both")
        patch.setattr(config, f"{kind}_transfer_config", made)

    return change


IN_USE = {
    "pipeline-parallel": put("parallel_config.pipeline_parallel_size", 2),
    "data-parallel": put("parallel_config.data_parallel_size", 2),
    "context-parallel": put("parallel_config.decode_context_parallel_size", 2),
    "expert-parallel": put("parallel_config.enable_expert_parallel", True),
    "sequence-parallel": put("parallel_config.enable_hc_sp", True),
    "ubatching": put("parallel_config.enable_dbo", True),
    "kv-connector": connected("kv"),
    "ec-connector": connected("ec"),
    "lora": put("lora_config", SimpleNamespace(max_loras=1)),
    "speculation": put("speculative_config", SimpleNamespace(method="eagle")),
    "api-servers": put("parallel_config._api_process_count", 2),
    "rust-frontend": say("VLLM_USE_RUST_FRONTEND"),
    "multimodal": put("model_config.multimodal_config", SimpleNamespace()),
    "encoder-decoder": put("model_config.is_encoder_decoder", True),
    "pooling": put("model_config.runner_type", "pooling"),
    "quantization": put("model_config.quantization", "fp8"),
    "fast-prefill": put("cache_config.kv_sharing_fast_prefill", True),
    "sleep": put("model_config.enable_sleep_mode", True),
}
"""What brings each feature into use, in a configuration that vLLM made."""


def test_every_refusal_is_tried() -> None:
    assert IN_USE.keys() == UNTESTED.keys()


def test_what_was_tested_is_not_refused(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_untested(plain, ())
    monkeypatch.setattr(plain, "speculative_config", SimpleNamespace(method="ngram"))
    refuse_untested(plain, ())


@pytest.mark.parametrize("name", UNTESTED)
def test_a_feature_that_was_not_tested_is_refused_by_name(
    name: str, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    IN_USE[name](plain, monkeypatch)
    with pytest.raises(SteeringNotAppliedError) as caught:
        refuse_untested(plain, ())
    assert UNTESTED[name][0] in caught.value.message
    assert name in (caught.value.hint or "")
    refuse_untested(plain, (name,))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enable_lora": True}, "LoRA"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connectors"),
    ],
)
def test_an_engine_does_not_come_as_far_as_to_start(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SteeringNotAppliedError, match=named):
        configured({"plans": str(PLANS_DIR)}, **options)


def test_a_version_that_was_not_tested_is_refused_by_name() -> None:
    refuse_version("0.32.0+cpu", ())
    refuse_version("0.99.0", ("version",))
    with pytest.raises(SteeringNotAppliedError, match=r"0\.99\.0"):
        refuse_version("0.99.0", ())


def test_an_unknown_runner_is_refused_by_name() -> None:
    for runner in RUNNERS:
        refuse_runner(runner, ())
    refuse_runner("somebodys.Runner", ("runner",))
    with pytest.raises(SteeringNotAppliedError, match=r"somebodys\.Runner"):
        refuse_runner("somebodys.Runner", ())


# ---- plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "plans"),
        ({"plans": "DIR", "plan": "x"}, "plan"),
        ({"plans": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"plans": str(Path(__file__).parent)}, "no plan"),
    ],
)
def test_a_configuration_that_is_wrong_stops_the_engine(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ClampdownError, match=named):
        configured(given)


def test_plans_that_changed_since_they_were_checked_are_refused() -> None:
    settings = Settings(plans=str(PLANS_DIR))
    digests = open_book(settings).digests
    open_book(settings.model_copy(update={"resolved": True, "digests": digests}))
    with pytest.raises(PlanMismatchError, match="changed"):
        open_book(settings.model_copy(update={"resolved": True, "digests": {**digests, "clamp-352": "other"}}))


# ---- processes ---------------------------------------------------------------------------------------------------


def answered(desk: Desk, **other: Any) -> dict[str, Any]:
    """What a worker says that is armed as was checked."""
    from vllm import __version__

    own = {"plugin": PLUGIN_VERSION, "vllm": __version__, "runner": RUNNERS[0]}
    return {**own, "digests": desk.book.digests, "sites": list(desk.book.sites), **other}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"plugin": "0.0.1"}, "0.0.1"),
        ({"vllm": "0.31.0"}, "0.31.0"),
        ({"digests": {"clamp-352": "other"}}, "digests"),
        ({"sites": []}, "sites"),
        ({"runner": "somebodys.Runner"}, "somebodys.Runner"),
    ],
)
def test_a_worker_that_holds_something_else_is_refused_by_name(other: dict[str, Any], named: str, desk: Desk) -> None:
    sinks.agree(desk, [answered(desk)])
    with pytest.raises(SteeringNotAppliedError, match=named):
        sinks.agree(desk, [answered(desk), answered(desk, **other)])


def test_a_worker_without_the_plugin_says_so() -> None:
    with pytest.raises(SteeringNotAppliedError, match="the plugin was not there"):
        remote.clampdown_handshake(SimpleNamespace(model_runner=object()))


def test_a_pass_that_went_past_the_hooks_stops_the_server(desk: Desk) -> None:
    made = sinks.measuring(desk)
    found = {order.id: {"missed": False, "next": order.length} for _, order in made}
    for wrong in (None, {"missed": True, "next": 99}, {"missed": False, "next": 0}):
        with pytest.raises(SteeringNotAppliedError, match="did not go through"):
            sinks.limits(desk, made, {**found, made[0][1].id: wrong})


def test_a_class_of_another_shape_is_noticed_when_it_is_patched() -> None:
    from clampdown_vllm.runners.patching import wrap

    with pytest.raises(AttributeError, match="gone"):
        wrap(SimpleNamespace, "gone", print)
