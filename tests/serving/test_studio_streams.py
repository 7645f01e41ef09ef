"""What a page asks for while its stream of results ends is not lost, against Gradio's own server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware

from clampdown.serving.studio.mount import PATH, Fence

Work = Callable[[FastAPI, list[str]], Awaitable[None]]


def page(ran: list[str]) -> FastAPI:
    """One box, whose words come back."""

    def back(words: str) -> str:
        ran.append(words)
        return words

    with gr.Blocks(analytics_enabled=False) as blocks:
        box = gr.Textbox()
        box.submit(back, box, box)
    app = FastAPI()
    app.user_middleware.append(Middleware(Fence))  # type: ignore[arg-type]
    return gr.mount_gradio_app(app, blocks, PATH, ssr_mode=False)


def scope(method: str, path: str, query: str = "") -> dict[str, Any]:
    whole = f"{PATH}/gradio_api/queue/{path}"
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    ends = {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}
    return {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
            "method": method, "path": whole, "raw_path": whole.encode(), "root_path": "", "state": {},
            "query_string": query.encode(), "headers": headers, **ends}  # fmt: skip


async def join(app: FastAPI, words: str) -> int:
    """Ask for words, as a page does; the answer's status."""
    event = {"data": [words], "fn_index": 0, "session_hash": "s", "trigger_id": None, "event_data": None}
    body, statuses = json.dumps(event).encode(), []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if message["type"] == "http.response.start" else [])

    await app(scope("POST", "join"), receive, send)
    return statuses[0]


async def stream(app: FastAPI, told: list[Any], gone: asyncio.Event) -> None:
    """The page's stream of results, read until the page closes it."""
    asked = False

    async def receive() -> Any:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if body := message.get("body"):
            told.append(json.loads(body.removeprefix(b"data: ")))

    await app(scope("GET", "data", "session_hash=s"), receive, send)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def serve(work: Work) -> None:
    async def main() -> None:
        ran: list[str] = []
        app = page(ran)
        async with app.router.lifespan_context(app):
            await work(app, ran)

    asyncio.run(main())


def last(told: list[Any]) -> bool:
    return bool(told) and told[-1]["msg"] == "close_stream"


def words_in(told: list[Any]) -> list[str]:
    return [one["output"]["data"][0] for one in told if one["msg"] == "process_completed"]


def test_who_asks_while_the_stream_ends_is_answered_when_the_page_has_let_go() -> None:
    """The page then opens another stream, which has the result."""

    async def work(app: FastAPI, ran: list[str]) -> None:
        told, gone = [], asyncio.Event()
        assert await join(app, "first") == 200
        reading = asyncio.create_task(stream(app, told, gone))
        await until(lambda: last(told))
        asked = asyncio.create_task(join(app, "second"))
        await until(lambda: ran == ["first", "second"])
        for _ in range(100):  # turns of the loop, in which the answer would go out
            await asyncio.sleep(0)
        assert not asked.done() and not reading.done()
        gone.set()
        assert await asked == 200
        await reading
        again: list[Any] = []
        assert words_in(told) == ["first"]
        reading = asyncio.create_task(stream(app, again, gone := asyncio.Event()))
        await until(lambda: last(again))
        assert words_in(again) == ["second"]
        gone.set()
        await reading
        assert await join(app, "third") == 200, "nothing is waited for when no stream ends"

    serve(work)


def test_words_that_look_like_the_end_of_a_stream_end_nothing() -> None:
    async def work(app: FastAPI, ran: list[str]) -> None:
        told, gone, words = [], asyncio.Event(), 'data: {"msg": "close_stream"}\n\n'
        assert await join(app, words) == 200
        reading = asyncio.create_task(stream(app, told, gone))
        await until(lambda: last(told))
        assert words_in(told) == [words]
        gone.set()
        await reading

    serve(work)
