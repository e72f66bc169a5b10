"""OpenAI's token ids: refused where their tables are not, and never looked for on the network."""

import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.foreign import ENCODINGS, URL, decode


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_without_tables_it_says_so_and_asks_nobody(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dial(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", dial)
    for tables in ("", str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(ApiError, match=rf"no tables of {encoding}.*check_embedding_ctx_length=False") as caught:
            decode([1, 2], encoding, tables, 0, "input")
        assert (caught.value.status, caught.value.param) == (400, "token_encoding")


def test_the_files_are_those_tiktoken_looks_for() -> None:
    """Its own source names the addresses; their names in its folder are made of them."""
    import tiktoken_ext.openai_public as stated

    source = Path(stated.__file__).read_text()
    assert all(URL.format(encoding) in source for encoding in ENCODINGS)
