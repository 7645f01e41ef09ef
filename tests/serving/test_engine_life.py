"""Requests that are cancelled, refused, broken or slow to be read leave everybody else alone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from clampdown.errors import PlanMismatchError, QueueFullError, RequestError, ScopeError
from clampdown.models.loading import LanguageModel
from clampdown.serving.engine import Engine, RequestStream
from clampdown.serving.pool import Pool
from clampdown.serving.requests import Done, Piece, Request, Sampling
from clampdown.serving.worker import Limits
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef
from tests.serving.example_plans import Answer, ask
from tests.steering.conftest import SITE, random_sae, tiny_llama

LM, SAE = tiny_llama(), random_sae()
vars(LM)["eos_ids"] = frozenset({9999})  # replies are as long as they may be
LM.model.config.max_position_embeddings = 100_000
ENDLESS, LONG = 90_000, 60  # tokens; the first takes minutes on any machine, and never has to come to its end
PATIENCE = 240  # seconds, for what must come


def plan(strength: float, scope: str = "all", revision: str = "r0") -> Plan:
    edit = Edit(site=SITE.name, operator="add", features=(3,), strengths=(strength,), scope=scope)
    sae = SaeRef(site=SITE.name, name="random", revision="s0")
    return Plan(name="p", model=ModelRef(name="tiny", revision=revision), saes=(sae,), edits=(edit,))


def request(n: int, plan: Plan | None = None, prompt: tuple[int, ...] = (1, 2, 8, 9), **more: Any) -> Request:
    return Request("r", prompt, plan, Sampling(max_tokens=n), **more)


def serve(work: Callable[[Engine], Awaitable[None]], limits: Limits | None = None, lm: LanguageModel = LM) -> None:
    async def main() -> None:
        async with Engine(lm, (SAE,), limits) as engine:
            await work(engine)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def idle(engine: Engine) -> bool:
    return not engine.load().running and not engine.load().queued


@pytest.mark.parametrize("how", ["closed", "dropped", "task cancelled"])
def test_a_request_that_nobody_wants_any_more_frees_its_row(how: str) -> None:
    async def work(engine: Engine) -> None:
        if how == "task cancelled":
            task = asyncio.create_task(ask(engine, request(ENDLESS)))
            await until(lambda: engine.load().running == 1)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            del task  # its traceback holds the stream
        else:
            stream = engine.submit(request(ENDLESS))
            assert isinstance(await anext(stream), Piece)
            if how == "closed":
                await stream.aclose()
            del stream
        gc.collect()
        assert (await ask(engine, request(20, plan(2.0)))).done.n_generated == 20
        await until(lambda: idle(engine))

    serve(work)


def test_a_full_queue_says_when_to_come_back_and_a_place_in_it_is_kept_in_order() -> None:
    finished: list[int] = []

    async def read(stream: RequestStream, i: int) -> None:
        async for item in stream:
            if isinstance(item, Done):
                finished.append(i)

    async def work(engine: Engine) -> None:
        for _ in range(2):  # by which the engine knows how long one takes
            await ask(engine, request(1))
        first = engine.submit(request(ENDLESS))
        await anext(first)
        streams = [engine.submit(request(4)) for _ in range(3)]
        with pytest.raises(QueueFullError) as refused:
            engine.submit(request(4))
        assert 0 < refused.value.retry_after <= 60
        await first.aclose()
        await asyncio.gather(*(read(stream, i) for i, stream in enumerate(streams)))
        assert finished == [0, 1, 2]

    serve(work, Limits(rows=1, queue=3))


def test_who_has_gone_away_takes_no_place_in_the_queue() -> None:
    async def work(engine: Engine) -> None:
        first = engine.submit(request(ENDLESS))
        await anext(first)
        waiting = [engine.submit(request(4)) for _ in range(3)]
        await waiting[0].aclose()
        await waiting[1].aclose()
        assert engine.load().queued == 1
        again = [engine.submit(request(4)) for _ in range(2)]
        with pytest.raises(QueueFullError):
            engine.submit(request(4))
        await first.aclose()
        for stream in (waiting[2], *again):
            assert [item async for item in stream][-1].n_generated == 4  # type: ignore[union-attr]

    serve(work, Limits(rows=1, queue=3))


def test_prefixes_are_one_s_own() -> None:
    prompt = tuple(range(3, 43))

    async def work(engine: Engine) -> None:
        found = [(await ask(engine, request(1, prompt=prompt, owner=who))).done.n_reused for who in "aabb"]
        assert found == [0, len(prompt) - 1] * 2

    serve(work)


def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    async def main() -> Answer:
        engine = Engine(LM, (SAE,))
        await engine.start()
        running = asyncio.create_task(ask(engine, request(LONG)))
        await until(lambda: engine.load().running == 1 or running.done())
        stopping = asyncio.create_task(engine.stop(drain_seconds=PATIENCE))
        await asyncio.sleep(0)
        assert engine.load().draining
        with pytest.raises(QueueFullError):
            engine.submit(request(1))
        await stopping
        return await running

    assert asyncio.run(asyncio.wait_for(main(), PATIENCE)).done.n_generated == LONG


def test_at_the_deadline_the_rest_is_cancelled_and_says_so() -> None:
    async def main() -> list[Answer]:
        engine = Engine(LM, (SAE,), Limits(rows=1))
        await engine.start()
        tasks = [asyncio.create_task(ask(engine, request(ENDLESS))) for _ in range(3)]
        await until(lambda: engine.load().running == 1)
        await engine.stop(drain_seconds=0)
        return await asyncio.gather(*tasks)

    answers = asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert [answer.done.reason for answer in answers] == ["cancelled"] * 3


def test_a_reader_that_sleeps_holds_up_nobody_and_misses_nothing() -> None:
    async def work(engine: Engine) -> None:
        slow = engine.submit(request(LONG))
        fast = await ask(engine, request(LONG))
        await until(lambda: idle(engine))
        items = [item async for item in slow]
        assert len(items) == 2, "what waited is one piece"
        assert isinstance(items[0], Piece) and items[0].text == fast.text
        assert isinstance(items[1], Done)

    serve(work)


def test_errors_reach_the_request_that_made_them() -> None:
    """Before it is queued where that can be seen; else from its stream, and the others of its pass are served."""

    async def work(engine: Engine) -> None:
        for wrong, error in [
            (request(4, prompt=()), RequestError),
            (request(4, prompt=(1,) * 100_000), RequestError),
            (request(4, plan(1.0, revision="other")), PlanMismatchError),
            (request(4, given=4), RequestError),
        ]:
            with pytest.raises(error):
                engine.submit(wrong)
        together = [request(4), request(4, plan(1.0, "assistant")), request(4, plan(2.0))]
        first, failed, last = await asyncio.gather(*(ask(engine, r) for r in together), return_exceptions=True)
        assert isinstance(failed, ScopeError), "the prompt has no assistant turn"
        assert isinstance(first, Answer) and isinstance(last, Answer)
        assert first.text == (await ask(engine, request(4))).text

    serve(work)


def test_a_row_that_explodes_poisons_no_other() -> None:
    """Its keys and values are not numbers; whoever decodes beside it, or in its place after it, is as if alone."""
    n = 100

    async def work(engine: Engine) -> None:
        expected = (await ask(engine, request(n))).text
        huge = float(torch.finfo(torch.float32).max)
        edit = Edit(
            site=SITE.name, operator="add", features=tuple(range(20)), strengths=(huge,) * 20, scope="generated"
        )
        beside, pieces = engine.submit(request(n)), []
        with pytest.raises(RequestError, match="not finite") as told:  # the mistake of who asked for it
            await ask(engine, request(n, plan(1.0).model_copy(update={"edits": (edit,)})))
        assert told.value.status == 400
        async for item in beside:  # the place is empty while columns are added
            pieces.append(item)
            if len(pieces) == 5:
                break
        after = await ask(engine, request(n))
        pieces += [item async for item in beside]
        assert "".join(piece.text for piece in pieces if isinstance(piece, Piece)) == after.text == expected

    serve(work, Limits(rows=2))


def test_replies_end_at_the_models_context() -> None:
    async def work(engine: Engine) -> None:
        answer = await ask(engine, request(1000, prompt=(1,) * 100))
        assert (answer.done.reason, answer.done.n_generated) == ("length", 28)

    serve(work, lm=tiny_llama())


def test_a_failing_step_ends_who_was_in_it_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: Engine) -> None:
        stream = engine.submit(request(ENDLESS))
        await anext(stream)
        with monkeypatch.context() as broken:
            broken.setattr("clampdown.serving.worker.choose", None)
            with pytest.raises(TypeError):
                async for _ in stream:
                    pass
        assert (await ask(engine, request(8))).done.n_generated == 8

    serve(work)


def test_rows_that_cannot_join_say_nothing_twice_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the batch's memory ends: the first tokens of the joining rows have been given out by then."""

    def fails(pool: Pool, *arguments: Any) -> None:
        raise RuntimeError("no memory")

    async def read(stream: RequestStream, seen: list[Any]) -> None:
        async for item in stream:
            seen.append(item)

    async def work(engine: Engine) -> None:
        first = engine.submit(request(ENDLESS))
        await anext(first)
        with monkeypatch.context() as broken:
            broken.setattr(Pool, "join", fails)
            joining = [engine.submit(request(20)) for _ in range(2)]  # one pass or two, the first ends everybody's
            for stream in (*joining, first):
                seen: list[Any] = []
                with pytest.raises(RuntimeError, match="no memory"):
                    await read(stream, seen)
                assert stream is first or sum(len(piece.tokens) for piece in seen) <= 1
        assert (await ask(engine, request(8))).done.n_generated == 8

    serve(work)


def test_echoed_logprobs_are_those_of_one_plain_pass() -> None:
    """Also beside a longer prompt, and with a plan."""
    prompt, acting = (1, 2, 8, 20, 33, 7), plan(3.0)

    async def work(engine: Engine) -> None:
        asked = [
            Request("", prompt, None, Sampling(max_tokens=0, top_logprobs=2), echo=True),
            Request("", (1,) * 12, None, Sampling(max_tokens=1), echo=True),
            Request("", prompt, acting, Sampling(max_tokens=1, top_logprobs=0), echo=True),
        ]
        plain, _, steered = await asyncio.gather(*(ask(engine, r) for r in asked))
        log = LM.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = [float(log[i, token]) for i, token in enumerate(prompt[1:])]
        assert [token.logprob for token in plain.done.prompt[1:]] == pytest.approx(expected, abs=1e-4)
        assert plain.done.prompt[0].logprob is None and plain.done.n_generated == 0
        assert [token.top[0][0] for token in plain.done.prompt[1:]] == log[:-1].argmax(-1).tolist()
        assert steered.done.prompt[2].logprob != pytest.approx(expected[1], abs=1e-2)
        assert steered.done.receipt is not None and steered.done.receipt.tokens_touched == len(prompt)

    serve(work)


def test_a_prompt_that_ends_with_a_given_reply_is_steered_as_if_the_model_had_written_it() -> None:
    """The scope 'generated' covers the given tokens and nothing else; 'prompt' the rest."""

    async def work(engine: Engine) -> None:
        for scope, touched in [("generated", 2), ("prompt", 4), ("all", 6)]:
            asked = request(0, plan(3.0, scope), prompt=(1, 2, 8, 9, 10, 11), given=2, echo=True)
            answer = await ask(engine, asked)
            assert answer.done.receipt is not None and answer.done.receipt.tokens_touched == touched

    serve(work)
