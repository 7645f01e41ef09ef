"""Putting the page into a server's app, and a fence around it.

The page needs nothing from elsewhere, and a policy header tells the browser to ask for nothing: no font, no script, no
analytics. Gradio's own doors for files and proxied addresses are shut, because the page has no use for them, and its
inputs take words and numbers only: an object where a word belongs is how a client names a file.
"""

from __future__ import annotations

import json
import os
from importlib import resources
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by gradio whenever it would report

from clampdown.extras import extra
from clampdown.serving.studio.page import build
from clampdown.serving.studio.streams import Asgi, Receive, Scope, Send, Streams
from clampdown.serving.studio.workbench import Workbench

with extra("serve", "the server"):
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse, RedirectResponse, Response
with extra("studio", "the studio's page"):
    import gradio as gr
    import gradio.themes

PATH = "/studio"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path d="M3 2h3v5h4V2h3v12h-3V9H6v5H3z" '
    'fill="#0b66b0"/></svg>'
)
SHUT = ("upload", "file=", "file/", "proxy=", "stream/", "custom_component/", "component_server", "dev", "deep_link")
"""What is refused below Gradio's prefix."""

_PANELS = {
    "block_info_text_color": "#5b6570",
    "block_info_text_color_dark": "#9fa8b2",
    "input_placeholder_color": "#6b7580",
    "input_placeholder_color_dark": "#9fa8b2",
    "block_background_fill_dark": "#1d2125",
    "input_background_fill_dark": "#262b30",
    "border_color_primary_dark": "#343a41",
    "button_primary_background_fill": "#0b66b0",
    "button_primary_background_fill_hover": "#0a5896",
    "button_primary_background_fill_dark": "#0b66b0",
    "slider_color": "#0b66b0",
    "slider_color_dark": "#63b5f5",
    "checkbox_background_color_selected": "#0b66b0",
    "checkbox_background_color_selected_dark": "#0b66b0",
}

_PLAIN = (str, int, float, bool, type(None))


def mount(app: FastAPI, bench: Workbench) -> FastAPI:
    """The page at /studio, and / leads there."""
    system = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Arial", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "Liberation Mono", "monospace"]
    theme = gradio.themes.Base(primary_hue="blue", neutral_hue="zinc", radius_size="sm", font=system, font_mono=mono)
    theme = theme.set(body_background_fill="#ffffff", body_background_fill_dark="#15181b", **_PANELS)
    app.user_middleware.append(Middleware(Fence))  # type: ignore[arg-type]  (behind the entrance, which bounds bodies)
    app.add_api_route("/", lambda: RedirectResponse(f"{PATH}/"), include_in_schema=False)
    app.add_api_route("/favicon.ico", lambda: Response(ICON, media_type="image/svg+xml"), include_in_schema=False)
    return gr.mount_gradio_app(
        app,
        build(bench),
        PATH,
        theme=theme,
        css=resources.files(__package__ or "").joinpath("studio.css").read_text(encoding="utf-8"),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=1,
        show_error=True,
    )


class Fence:
    """Middleware: refuses the shut doors of the page and what is no plain input, and says in a header what the page may
    ask for."""

    def __init__(self, app: Asgi) -> None:
        self.app = app
        self.streams = Streams()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or not path.startswith(PATH):
            await self.app(scope, receive, send)
        elif path.removeprefix(f"{PATH}/gradio_api/").startswith(SHUT):
            await PlainTextResponse("not here", 404)(scope, receive, send)
        elif path == f"{PATH}/gradio_api/queue/data":
            await self.streams.results(self.app, scope, receive, _with_policy(send))
        elif scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, _with_policy(send))
        else:
            await self._sent(scope, receive, send)

    async def _sent(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _whole(receive)
        except HTTPException as error:
            await PlainTextResponse(error.detail, error.status_code)(scope, receive, send)
            return
        if is_plain(body):
            answering = self.streams.answering(_session_in(body), _with_policy(send))
            await self.app(scope, _again(body, receive), answering)
        else:
            await PlainTextResponse("the page sends words and numbers, and nothing else", 400)(scope, receive, send)


async def _whole(receive: Receive) -> bytes:
    """A request's body, which the server's entrance has bounded."""
    pieces, more = [], True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)  # nothing comes after a client that went away
    return b"".join(pieces)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives out a body that was read, and then what comes after it."""
    given = False

    async def repeated() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return repeated


def is_plain(body: bytes) -> bool:
    """Whether a body is what the page's inputs send: words, numbers and choices. An object or a list in their place is
    how files come, which Gradio would copy from wherever the server can read. Where no inputs are sent, anything else
    that has no file in it will do."""
    if not body:
        return True
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(sent, dict):
        return False
    data, event = sent.pop("data", None) or [], sent.pop("event_data", None)
    own = list(sent.values()) + (list(event.values()) if isinstance(event, dict) else [event])
    return isinstance(data, list) and all(isinstance(value, _PLAIN) for value in [*data, *own])


def _session_in(body: bytes) -> str:
    """The session of the page that sent a plain body; "" if it names none."""
    return str(json.loads(body).get("session_hash", "")) if body else ""


def _with_policy(send: Send) -> Send:
    async def fenced(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
            message = {**message, "headers": headers}
        await send(message)

    return fenced
