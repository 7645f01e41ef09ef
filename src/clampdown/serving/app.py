"""The HTTP face: OpenAI's routes over one model and its plans, health, and metrics.

Stateless: every request brings its whole conversation, and clients may rewrite it. A request passes four gates in this
order: the body's size, the key, the schema, the limits; then the engine takes it or says when to come back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from anyio import CapacityLimiter, to_thread

from clampdown.config import CODE_VERSION
from clampdown.errors import ClampdownError, RequestError
from clampdown.extras import extra
from clampdown.serving import faults
from clampdown.serving.desk import Desk, Served
from clampdown.serving.faults import Json
from clampdown.serving.intake import Job
from clampdown.serving.ledger import Exchange
from clampdown.serving.limits import Entrance
from clampdown.serving.metrics import CONTENT_TYPE
from clampdown.serving.plans import BASE, OFF, described
from clampdown.serving.schemas import ChatRequest, CompletionRequest

with extra("serve", "the server"):
    from fastapi import Depends, FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.openapi.utils import get_openapi
    from starlette.exceptions import HTTPException
    from starlette.responses import Response

log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0
_LONG = 4096  # characters or tokens, some milliseconds of work
_SLOW_JOBS = 2
_ENDPOINTS = {"/v1/chat/completions": "chat", "/v1/completions": "text"}
_ERROR = {
    "description": "An error in OpenAI's shape.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: _ERROR for status in (400, 401, 403, 404, 408, 413, 421, 422, 429, 500, 503)
}

Background = Callable[[], Coroutine[Any, Any, None]]


def create_app(
    served: Served, *, background: tuple[Background, ...] = (), drain_seconds: float = DRAIN_SECONDS
) -> FastAPI:
    """The application. `background` are what runs beside the requests (canaries) until the server stops."""
    app = FastAPI(
        title="clampdown",
        version=CODE_VERSION,
        description="A steered model behind an OpenAI-compatible API.",
        lifespan=_lifespan(served, background, drain_seconds),
        openapi_url=None,  # it names the plans: it is asked for with a key, below
        docs_url=None,  # both pages fetch scripts from elsewhere
        redoc_url=None,
    )
    app.state.served = served
    for kind in (ClampdownError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    _add_answers(app, served)
    _add_facts(app, served)
    app.add_middleware(Entrance, limits=served.limits, refuse=_turned_away(served))  # type: ignore[arg-type]
    return app


def _document(app: FastAPI, served: Served) -> dict[str, Any]:
    """The OpenAPI document of this very server: the models and plans that it has now are the ones that may be named."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    names = [name for name, _ in served.plans]
    for body in ("ChatRequest", "CompletionRequest"):
        properties = document["components"]["schemas"][body]["properties"]
        properties["model"]["enum"] = [*served.plans.ids, *(f"{BASE}:{name}" for name in names)]
        by_name = next(way for way in properties["steering"]["anyOf"] if way.get("type") == "string")
        by_name["enum"] = [*names, OFF]
    return document


def _lifespan(served: Served, background: tuple[Background, ...], drain_seconds: float) -> Any:
    import anyio

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await served.engine.start()
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(anyio.create_task_group())
            for job in background:
                tasks.start_soon(job)
            yield
            tasks.cancel_scope.cancel()
        await served.engine.stop(drain_seconds=drain_seconds)
        served.ledger.write("stop", {})

    return lifespan


def _turned_away(served: Served) -> Callable[[str, str, RequestError], Response]:
    """Answers what gets no further than the entrance, and writes it down as everything else that is refused."""

    def answer(method: str, path: str, error: RequestError) -> Response:
        if method == "POST" and path in _ENDPOINTS:
            served.ledger.refuse(_ENDPOINTS[path], None, error.status, error.code)
        return faults.response(error)

    return answer


async def _refused(http: Request, error: Exception) -> Response:
    """Any error as an answer; those of the two endpoints that answer are counted and written down."""
    status, body, headers = faults.fault(error)
    if status >= 500:
        log.error("%s failed", http.url.path, exc_info=error)
    served: Served = http.app.state.served
    endpoint = _ENDPOINTS.get(http.url.path)
    exchange: Exchange | None = getattr(http.state, "exchange", None)
    if exchange is not None:
        served.ledger.close(exchange, status, body["error"]["code"])
    elif endpoint is not None and http.method == "POST":
        served.ledger.refuse(endpoint, getattr(http.state, "key", None), status, body["error"]["code"])
    return Json(body, status_code=status, headers=headers)


def _add_answers(app: FastAPI, served: Served) -> None:
    """The two endpoints that run the model."""
    desk, intake = Desk(served), served.intake

    threads: list[CapacityLimiter] = []

    async def answer(http: Request, make: Callable[[], Job], key: str, *, slow: bool) -> Response:
        if not slow:
            return await desk.answer(make(), http, key)
        if not threads:
            threads.append(CapacityLimiter(_SLOW_JOBS))  # it belongs to the loop that is running
        job = await to_thread.run_sync(make, limiter=threads[0])
        return await desk.answer(job, http, key)

    @app.post("/v1/chat/completions", responses=_ERRORS, response_class=Json)
    async def chat_completions(body: ChatRequest, http: Request, key: str = Depends(_key)) -> Response:
        """Reply to a conversation, with a receipt of how it was steered."""
        return await answer(http, lambda: intake.chat(body), key, slow=_is_slow(body))

    @app.post("/v1/completions", responses=_ERRORS, response_class=Json)
    async def completions(body: CompletionRequest, http: Request, key: str = Depends(_key)) -> Response:
        """Go on with a text, or say how likely it is."""
        return await answer(http, lambda: intake.text(body), key, slow=_is_slow(body))


def _is_slow(body: ChatRequest | CompletionRequest) -> bool:
    """Whether making a job of it may take as long as a token: others wait for what is done on the loop. An edit of the
    client's own is measured on calibration prompts, and a long text takes its time to become tokens."""
    return not isinstance(body.steering, str | None) or body.size > _LONG


async def _key(http: Request) -> str:
    """The name of the key that a request carries. Raises `RequestError` (401)."""
    served: Served = http.app.state.served
    http.state.key = served.keys.name_of(http.headers.get("authorization"))
    return http.state.key


def _add_facts(app: FastAPI, served: Served) -> None:
    """What can be asked without running the model."""
    started = int(time.time())

    def entry(name: str) -> dict[str, Any]:
        plan = served.plans.of_id(name).plan
        facts = {"id": name, "object": "model", "created": started, "owned_by": "clampdown"}
        return {**facts, "steering": described(plan) if plan else None}

    @app.get("/v1/models", responses=_ERRORS, response_class=Json, dependencies=[Depends(_key)])
    async def models() -> Response:
        """The model, and the model under each plan."""
        return Json({"object": "list", "data": [entry(name) for name in served.plans.ids]})

    @app.get("/v1/models/{model:path}", responses=_ERRORS, response_class=Json, dependencies=[Depends(_key)])
    async def model(model: str) -> Response:
        """One of them."""
        return Json(entry(model))

    @app.get("/openapi.json", include_in_schema=False, dependencies=[Depends(_key)])
    async def document() -> Response:
        """What can be asked of this server, and how."""
        return Json(_document(app, served))

    @app.get("/healthz", responses=_ERRORS, response_class=Json)
    async def healthz() -> Response:
        """Whether requests are taken, and how many are on their way."""
        load, audit = served.engine.load(), served.ledger.audit
        state = "draining" if load.draining else "audit_failed" if audit and audit.broken else "ok"
        facts = {"status": state, "model": served.model, "version": CODE_VERSION, "queued": load.queued}
        return Json({**facts, "running": load.running}, status_code=200 if state == "ok" else 503)

    @app.get("/metrics", response_class=Response, dependencies=[Depends(_key)], responses={401: _ERROR})
    async def metrics() -> Response:
        """Prometheus metrics."""
        body = served.ledger.metrics.exposition(served.engine.load())
        return Response(body, headers={"Content-Type": CONTENT_TYPE})
