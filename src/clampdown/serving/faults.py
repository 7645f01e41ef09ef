"""Errors as clients see them: OpenAI's shape, a status that says whose mistake it was, and what to do next."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from clampdown.errors import (
    ChatTemplateError,
    ClampdownError,
    PlanError,
    QueueFullError,
    RequestError,
    SaeError,
    SiteError,
    SteeringNotAppliedError,
)
from clampdown.extras import extra

with extra("serve", "the server"):
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.responses import Response

_CLIENTS_MISTAKES = (PlanError, ChatTemplateError, SaeError, SiteError)
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Json(Response):
    """JSON with every character outside ASCII escaped: half of a surrogate pair has no UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


def fault(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(status, body, headers) of an error."""
    if isinstance(error, RequestError):
        return _shaped(error.status, str(error), error.code, error.param)
    if isinstance(error, QueueFullError):
        status, body, _ = _shaped(429, error.message, "queue_full", None)
        return status, body, {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, RequestValidationError):
        return _shaped(400, *_validation(error.errors()))
    if isinstance(error, HTTPException):
        status, body, _ = _shaped(error.status_code, str(error.detail), getattr(error, "code", None), None)
        return status, body, dict(error.headers or {})
    if isinstance(error, _CLIENTS_MISTAKES):
        return _shaped(400, str(error), "cannot_steer", None)
    if isinstance(error, SteeringNotAppliedError):
        return _shaped(500, str(error), "steering_not_applied", None)
    if isinstance(error, ClampdownError):
        return _shaped(500, str(error), None, None)
    return _shaped(500, "the server failed; its log says more", "internal_error", None)


def _shaped(
    status: int, message: str, code: str | None, param: str | None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, {}


def _validation(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str, str | None]:
    """(message, code, field) of what the schema refused: the first mistake, and how many more there are."""
    if errors[0]["type"] == "json_invalid":
        return "the body is not JSON", "invalid_json", None
    first = min(errors, key=lambda error: -len(error["loc"])) if len(errors) > 1 else errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where + ': ' if where else ''}{message}{more}", "invalid_request", where or None


def response(error: Exception) -> Json:
    """The answer to a request that failed."""
    status, body, headers = fault(error)
    return Json(body, status_code=status, headers=headers)
