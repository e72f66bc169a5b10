"""Every error has the body that OpenAI's clients read."""

import orjson
import pytest

from triton_embed.gateway.errors import STATUSES, ApiError, invalid


@pytest.mark.parametrize("status", STATUSES)
def test_error_body(status: int) -> None:
    response = ApiError(status, "Nein: «é»").response()
    assert response.status_code == status
    assert response.media_type == "application/json"
    kind, code = STATUSES[status]
    expected = {"error": {"message": "Nein: «é»", "type": kind, "param": None, "code": code}}
    assert orjson.loads(response.body) == expected


@pytest.mark.parametrize(("status", "kind"), [(418, "invalid_request_error"), (502, "server_error")])
def test_status_outside_the_table_gets_a_type(status: int, kind: str) -> None:
    response = ApiError(status, "odd").response()
    assert response.status_code == status
    assert orjson.loads(response.body)["error"]["type"] == kind


def test_error_with_param_code_and_headers() -> None:
    response = ApiError(429, "full", param="model", code="special", headers={"Retry-After": "1"}).response()
    assert response.headers["retry-after"] == "1"
    error = orjson.loads(response.body)["error"]
    assert (error["param"], error["code"]) == ("model", "special")


def test_invalid_is_a_400_that_names_the_field() -> None:
    error = invalid("dimensions must be an integer", "dimensions")
    assert (error.status, error.param, str(error)) == (400, "dimensions", "dimensions must be an integer")
