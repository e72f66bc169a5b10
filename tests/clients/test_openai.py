"""Conformance of openai-python, sync and async, used as in OpenAI's reference and the Qwen3-Embedding walkthrough."""

import asyncio
import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from words import CHINESE, FRUIT, LONG, MATRYOSHKA, QUERY, QWEN3, TASK, TEXT, TEXTS

from conftest import KEY, Expected, Stack

CLIENT, PACKAGE = "openai-python", "openai"


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.Client]:
    with openai.Client(base_url=stack.base_url, api_key="EMPTY") as client:
        yield client


def vectors(response: openai.types.CreateEmbeddingResponse) -> list[list[float]]:
    assert [item.index for item in response.data] == list(range(len(response.data)))
    return [item.embedding for item in response.data]


def test_text(client: openai.Client, expected: Expected) -> None:
    """Embed a text in base64, the client's default."""
    response = client.embeddings.create(model="minilm", input=TEXT)
    expected.check(vectors(response), [TEXT])
    assert response.model == "minilm"
    assert response.usage.prompt_tokens == response.usage.total_tokens == len(expected.ids["minilm"][TEXT])


def test_list(client: openai.Client, expected: Expected) -> None:
    """Embed a list of texts in order."""
    expected.check(vectors(client.embeddings.create(model="minilm", input=TEXTS)), TEXTS)


def test_float(client: openai.Client, expected: Expected) -> None:
    """Set `encoding_format` to float."""
    response = client.embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
    expected.check(vectors(response), TEXTS)


def test_base64(client: openai.Client, expected: Expected) -> None:
    """Set `encoding_format` to base64, decoded by the caller."""
    response = client.embeddings.create(model="minilm", input=TEXTS, encoding_format="base64")
    encoded: Any = [item.embedding for item in response.data]
    expected.check([np.frombuffer(base64.b64decode(item), "<f4") for item in encoded], TEXTS)


def test_token_ids(client: openai.Client, expected: Expected) -> None:
    """Embed token ids, one list and several."""
    ids = [expected.ids["minilm"][text] for text in TEXTS]
    expected.check(vectors(client.embeddings.create(model="minilm", input=ids[0])), TEXTS[:1])
    expected.check(vectors(client.embeddings.create(model="minilm", input=ids)), TEXTS)


def test_async_client(stack: Stack, expected: Expected) -> None:
    """Send 16 concurrent requests with the asynchronous client."""

    async def embed() -> list[openai.types.CreateEmbeddingResponse]:
        async with openai.AsyncClient(base_url=stack.base_url, api_key="EMPTY") as client:
            return await asyncio.gather(*(client.embeddings.create(model="minilm", input=TEXTS) for _ in range(16)))

    for response in asyncio.run(embed()):
        expected.check(vectors(response), TEXTS)


def test_qwen3_walkthrough(stack: Stack, expected: Expected) -> None:
    """Run the Qwen3-Embedding walkthrough: a text, a list, and `{"input", "instruction"}` as the input."""
    client = openai.Client(base_url=f"http://localhost:{stack.port}/v1", api_key="EMPTY")
    response = client.embeddings.create(model="Qwen3-Embedding-0.6B", input="今天天气真好,适合出门散步")
    expected.check(vectors(response), CHINESE[1:], "qwen3_embedding")
    response = client.embeddings.create(model="Qwen3-Embedding-0.6B", input=FRUIT)
    expected.check(vectors(response), FRUIT, "qwen3_embedding")
    search_input: Any = {"input": QUERY, "instruction": TASK}
    response = client.embeddings.create(model="Qwen3-Embedding-0.6B", input=search_input)
    expected.check(vectors(response), [TASK], "qwen3_embedding")
    client.close()


def test_dimensions(client: openai.Client, expected: Expected) -> None:
    """Set `dimensions` for a model with Matryoshka dimensions."""
    response = client.embeddings.create(model=QWEN3, input=MATRYOSHKA, dimensions=512)
    expected.check(vectors(response), [MATRYOSHKA], "qwen3_embedding")


def test_unsupported_dimensions(client: openai.Client) -> None:
    """Raise BadRequestError if `dimensions` is set for any other model."""
    with pytest.raises(openai.BadRequestError, match="dimensions") as caught:
        client.embeddings.create(model="minilm", input=TEXT, dimensions=128)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == "dimensions"


def test_extra_body(client: openai.Client, expected: Expected) -> None:
    """Send an instruction and request receipts in `extra_body`."""
    response = client.embeddings.create(model=QWEN3, input=QUERY, extra_body={"instruction": TASK})
    expected.check(vectors(response), [TASK], "qwen3_embedding")
    response = client.embeddings.create(model="minilm", input=[TEXT, LONG], extra_body={"return_receipt": True})
    receipts: list[Any] = [item.model_extra["receipt"] for item in response.data if item.model_extra]
    assert [receipt["tokens"] for receipt in receipts] == [len(expected.ids["minilm"][TEXT]), 256]
    assert receipts[0]["dropped_tokens"] == 0
    assert receipts[1]["dropped_tokens"] > 100


def test_response_headers(client: openai.Client, expected: Expected) -> None:
    """Read the number of truncated inputs and the request id with `with_raw_response`."""
    raw = client.embeddings.with_raw_response.create(model="minilm", input=[TEXT, LONG])
    assert raw.headers["x-truncated-inputs"] == "1"
    response = raw.parse()
    assert response._request_id == raw.headers["x-request-id"] != ""
    expected.check(vectors(response), [TEXT, LONG])


def test_models(client: openai.Client) -> None:
    """Call `models.list` and `models.retrieve`, also for an id with a slash."""
    assert {"minilm", "qwen3_embedding"} <= {card.id for card in client.models.list()}
    assert client.models.retrieve("minilm").id == "minilm"
    assert client.models.retrieve(QWEN3).model_extra
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nowhere")


@pytest.mark.parametrize("invalid", ["", [], [""], ["a", "  "], [[]], {}, 7, [{"video": "x"}], [200_000_000]])
def test_invalid_input(client: openai.Client, invalid: Any) -> None:
    """Raise BadRequestError for nine kinds of invalid input."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="minilm", input=invalid)
    assert caught.value.message
    assert caught.value.param == "input"


def test_too_long_text(client: openai.Client) -> None:
    """Raise BadRequestError with token count and limit for a text too long for `truncate` none."""
    with pytest.raises(openai.BadRequestError, match=r"\d+ tokens.*256 tokens"):
        client.embeddings.create(model="minilm", input=LONG, extra_body={"truncate": "none"})


def test_unknown_model(client: openai.Client) -> None:
    """Raise NotFoundError that lists the available models for an unknown model."""
    with pytest.raises(openai.NotFoundError, match="minilm") as caught:
        client.embeddings.create(model="gpt-4", input=TEXT)
    assert caught.value.code == "model_not_found"


def test_wrong_api_key(strict: Stack, expected: Expected) -> None:
    """Raise AuthenticationError for a wrong API key, and accept the right one."""
    with openai.Client(base_url=strict.base_url, api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.embeddings.create(model="minilm", input=TEXT)
        assert caught.value.code == "invalid_api_key"
        authorized = client.with_options(api_key=KEY)
        expected.check(vectors(authorized.embeddings.create(model="minilm", input=TEXT)), [TEXT])


def test_model_not_ready(strict: Stack) -> None:
    """Raise InternalServerError with status 503 and the reason for a model that is not ready."""
    with openai.Client(base_url=strict.base_url, api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="clip") as caught:
            client.embeddings.create(model="clip", input=TEXT)
        assert caught.value.status_code == 503


def test_full_queue(strict: Stack, expected: Expected) -> None:
    """Raise RateLimitError with Retry-After for a full queue; the client's retries succeed."""
    texts = [LONG] * 24

    def embed(client: openai.Client) -> openai.types.CreateEmbeddingResponse | openai.RateLimitError:
        try:
            return client.embeddings.create(model="minilm", input=texts)
        except openai.RateLimitError as error:
            return error

    with openai.Client(base_url=strict.base_url, api_key=KEY, max_retries=0) as client, ThreadPoolExecutor(24) as pool:
        responses = list(pool.map(embed, [client] * 24))
        rejected = [response for response in responses if isinstance(response, openai.RateLimitError)]
        assert 0 < len(rejected) < 24
        for error in rejected:
            assert float(error.response.headers["retry-after"]) > 0
            assert error.type == "rate_limit_error"
        retrying_client = client.with_options(max_retries=20)
        for response in pool.map(embed, [retrying_client] * 6):
            assert not isinstance(response, openai.RateLimitError)
            expected.check(vectors(response), texts)
