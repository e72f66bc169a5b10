"""OpenAI's token ids: rejected without tables, and tables are never downloaded."""

import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from triton_embed.gateway.api.token_encodings import ENCODINGS, URL, decode
from triton_embed.gateway.errors import ApiError


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_missing_tables_are_an_error_and_are_not_downloaded(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", connect)
    for tables in ("", str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(ApiError, match=rf"no tables of {encoding}.*check_embedding_ctx_length=False") as caught:
            decode([1, 2], encoding, tables, 0, "input")
        assert (caught.value.status, caught.value.param) == (400, "token_encoding")


def test_urls_are_those_of_tiktoken() -> None:
    """Check URL against tiktoken's source: the names of its cached files are hashes of these addresses."""
    import tiktoken_ext.openai_public as tiktoken_encodings

    source = Path(tiktoken_encodings.__file__).read_text()
    assert all(URL.format(encoding) in source for encoding in ENCODINGS)
