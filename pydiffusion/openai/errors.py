"""Errors of OpenAI's API: a status and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import Any

from pydiffusion.errors import (
    ContextOverflowError,
    ImageError,
    InsufficientMemoryError,
    OptionError,
    PyDiffusionError,
    UnsupportedModelError,
)

log = logging.getLogger("pydiffusion.server")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
# Option -> the field of a request that sets it, where the names differ.
_OPTION_TO_FIELD = {
    "json_schema": "response_format",
    "eos": "stop_token_ids",
    "function_calls": "tool_choice",
}
# In a step's error where adapters are applied: the scales, which requests choose, are too large.
_OF_SCALES = "the adapters' changes at their scales"
_MAX_MESSAGE = 500  # characters; a message quotes the refused value


class ApiError(Exception):
    """An error response to a request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """param: the invalid field of the request.  code: OpenAI's error code."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An invalid request (400)."""
    return ApiError(400, message, param=param, code=code)


def field_of(option: str) -> str:
    """The field of a request that sets an option of GenerationOptions."""
    return _OPTION_TO_FIELD.get(option, option)


def from_exception(error: BaseException) -> ApiError:
    """Convert an exception of the library; unexpected ones are logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextOverflowError):
        return invalid(str(error), code="context_length_exceeded")
    if isinstance(error, InsufficientMemoryError):
        return ApiError(503, str(error), code="insufficient_memory", headers={"Retry-After": "5"})
    if isinstance(error, MemoryError):  # of Python and Pillow, which say no more
        return ApiError(503, "out of memory", code="insufficient_memory", headers={"Retry-After": "5"})
    if isinstance(error, OptionError):
        return invalid(str(error)[:_MAX_MESSAGE], field_of(error.param))
    if isinstance(error, (ImageError, UnsupportedModelError, ValueError)):
        return invalid(str(error))
    if isinstance(error, PyDiffusionError) and _OF_SCALES in str(error):
        return invalid(f"{error}: give adapters smaller scales (lora, or POST /lora-adapters)", "lora")
    if isinstance(error, PyDiffusionError):
        return ApiError(500, str(error))
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "The server failed on this request; its log says more.")
