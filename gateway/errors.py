"""Errors as callers see them: one exception, one body in OpenAI's form, one table of statuses."""

from collections.abc import Mapping
from typing import Annotated

import orjson
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

# status -> (type, code), OpenAI's where its API has them
STATUSES: dict[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "timeout"),
    413: ("invalid_request_error", "body_too_large"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "timeout"),
}


class ErrorBody(TypedDict):
    """What OpenAI clients read under `error`"""

    message: str
    type: str
    param: Annotated[str | None, Field(description="The request field that is wrong")]
    code: str | None


class ApiError(Exception):
    """An error that ends a request with `status`. Callers read the message: no stacks, paths or secrets.

    Args:
        param: The request field that is wrong.
        code: Replaces the code of the status.
        headers: Added to the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> ErrorBody:
        """Return the object under `error`."""
        kind, code = STATUSES.get(self.status, STATUSES[400 if self.status < 500 else 500])
        message = self.message.encode(errors="replace").decode()  # it may quote a string that JSON cannot hold
        return {"message": message, "type": kind, "param": self.param, "code": self.code or code}

    def response(self) -> Response:
        """Return the HTTP response."""
        return Response(orjson.dumps({"error": self.body()}), self.status, self.headers, "application/json")


def invalid(message: str, param: str | None) -> ApiError:
    """Return a 400 that the caller can fix by changing `param`."""
    return ApiError(400, message, param=param)
