"""Token ids of OpenAI's encodings, decoded to text with tiktoken.

tiktoken would download its tables on first use. A server must not, so the operator stores them in TIKTOKEN_CACHE_DIR
under tiktoken's own file names.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from triton_embed.gateway.errors import invalid

Encoding = Literal["cl100k_base", "o200k_base"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
# tiktoken names a cached table by the hash of its URL.
URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"


def decode(ids: Sequence[int], encoding: str, tables: str, index: int, param: str) -> str:
    """Return the text of one input's token ids.

    Args:
        tables: TIKTOKEN_CACHE_DIR.

    Raises:
        ApiError: 400 if the tables are missing, an id is not in them, or the text is blank.
    """
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
    """Return tiktoken's encoding.

    Raises:
        ApiError: 400 if its table is missing (tiktoken would download it) or tiktoken is not installed.
    """
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
