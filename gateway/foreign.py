"""Token ids of OpenAI's encodings, as clients made for OpenAI send them: back to text, with tiktoken.

tiktoken downloads its tables when they are first asked for. A server does not: an operator puts them where
TIKTOKEN_CACHE_DIR says, under the names tiktoken gives them there.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from triton_embed.gateway.errors import invalid

ENCODINGS = ("cl100k_base", "o200k_base")
URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"  # what tiktoken's file names are made of


def decode(ids: Sequence[int], encoding: str, tables: str, index: int, param: str) -> str:
    """The text of one input's ids; `tables` is TIKTOKEN_CACHE_DIR. ApiError 400: no tables, or ids not of theirs."""
    codec = _codec(encoding, tables)
    try:
        text: str = codec.decode(ids)
    except (KeyError, OverflowError):
        raise invalid(f"Input at index {index} has token ids that {encoding} does not have", param) from None
    if not text or text.isspace():
        raise invalid(f"Input at index {index} cannot be empty or whitespace only", param)
    return text


@cache
def _codec(encoding: str, tables: str) -> Any:
    """tiktoken's own. ApiError 400 where it would not find its table and go looking for it elsewhere."""
    name = hashlib.sha1(URL.format(encoding).encode(), usedforsecurity=False).hexdigest()
    if not tables or not (Path(tables) / name).is_file() or importlib.util.find_spec("tiktoken") is None:
        raise invalid(
            f"token_encoding: this server has no tables of {encoding}, so it cannot read its ids. Send texts, or ids "
            "of the model's own tokenizer; LangChain's OpenAIEmbeddings sends texts with check_embedding_ctx_length="
            "False. (For the operator: install tiktoken, and put its tables into TIKTOKEN_CACHE_DIR.)",
            "token_encoding",
        )
    import tiktoken

    return tiktoken.get_encoding(encoding)
