"""What a request is refused with, in OpenAI's shape.

In: a reason. Out: a status and `{"error": {"message", "type", "param", "code"}}`. No message holds anything that a client
sent: not a text, not a key, not a name.
"""

from __future__ import annotations

import traceback
from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class EngineShortageError(Exception):
    """The device has too little memory for a forward."""


class EngineFaultError(Exception):
    """The model or its tokenizer failed; says where, and nothing of what the error itself said."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__} in {describe_place(error)}")


def describe_place(error: BaseException) -> str:
    """Return the functions and lines that an error came through, without its message, which may quote a text."""
    return " < ".join(f"{f.name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__)[-8:]))


class RequestError(Exception):
    """A request that is not answered with verdicts.

    Attributes:
        status: of HTTP.
        code: one word for programs.
        message: one line for people; holds nothing that the client sent.
        param: the field it is about, as `input[3].answer`.
        headers: sent with the answer.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers: dict[str, str] = {} if retry_after is None else {"retry-after": str(retry_after)}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"
        if status in (408, 413):
            self.headers["connection"] = "close"  # or else the rest of the body would still be sent, to be thrown away

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str) -> RequestError:
    """Return the refusal of a field whose form or length is wrong."""
    return RequestError(422, "invalid_value", f"{param}: {message}" if param else message, param)
