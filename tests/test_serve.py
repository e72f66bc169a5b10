"""Tests of the wire contract of every family, with tritonclient over HTTP and gRPC against the real tritonserver."""

import io
import json
import queue
import struct
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from checkpoints import write_clip, write_qwen2_vl
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from conftest import MINILM, REPOSITORY, Triton
from triton_embed.python_backend import wire
from triton_embed.python_backend.checkpoint import repository
from triton_embed.python_backend.wire import InputError

PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
TEXTS = ["The cat sat.", "hello world", "a", "Where is the dog? " * 5, "0.5 - 0.25!"]


class Client:
    """A client for one protocol that creates the inputs of the contract."""

    def __init__(self, module: ModuleType, address: str) -> None:
        self.module = module
        self.client = module.InferenceServerClient(address)

    def text(self, *rows: str | bytes) -> Any:
        data = np.array(rows, dtype=np.object_)[:, None]
        tensor = self.module.InferInput("TEXT", list(data.shape), "BYTES")
        tensor.set_data_from_numpy(data)
        return tensor

    def images(self, *rows: Sequence[bytes]) -> Any:
        """Return IMAGE with the encoded files of each row, padded with empty ones."""
        width = max(1, *map(len, rows), 1)
        data = np.array([[*row, *[b""] * (width - len(row))] for row in rows], dtype=np.object_)
        tensor = self.module.InferInput("IMAGE", list(data.shape), "BYTES")
        tensor.set_data_from_numpy(data)
        return tensor

    def ids(self, *rows: list[int]) -> Any:
        data = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
        for i, row in enumerate(rows):
            data[i, : len(row)] = row
        tensor = self.module.InferInput("INPUT_IDS", list(data.shape), "INT32")
        tensor.set_data_from_numpy(data)
        return tensor

    def infer(self, model: str, *inputs: Any, outputs: tuple[str, ...] = (), **parameters: Any) -> Any:
        requested = [self.module.InferRequestedOutput(name) for name in outputs] or None
        return self.client.infer(model, list(inputs), outputs=requested, parameters=parameters or None)


def texts_of(tensor: np.ndarray) -> list[str]:
    """Return the text of each row of ERROR: UTF-8 padded with spaces."""
    assert tensor.dtype == np.uint8
    return [bytes(row).decode().rstrip() for row in tensor]


@pytest.fixture(scope="module", params=list(PROTOCOLS))
def client(request: pytest.FixtureRequest, triton: Triton) -> Any:
    client = Client(PROTOCOLS[request.param], getattr(triton, request.param))
    yield client
    client.client.close()


@pytest.fixture(scope="module")
def expected(bge_tiny: Any) -> np.ndarray:
    """Compute the vectors of TEXTS with transformers, one at a time: CLS pooling, normalized, float32."""
    network, tokenizer = AutoModel.from_pretrained(bge_tiny).eval(), AutoTokenizer.from_pretrained(bge_tiny)
    with torch.no_grad():
        rows = [network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in TEXTS]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def test_vectors_of_texts_equal_transformers(client: Client, expected: np.ndarray, bge_tiny: Any) -> None:
    answer = client.infer("bge_tiny", client.text(*TEXTS))
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), expected, atol=2e-5)
    tokenizer = AutoTokenizer.from_pretrained(bge_tiny)
    assert answer.as_numpy("TOKENS")[:, 0].tolist() == [len(tokenizer(text).input_ids) for text in TEXTS]
    assert answer.as_numpy("DROPPED").tolist() == [[0]] * len(TEXTS)


def test_token_ids_are_used_as_they_are(client: Client, expected: np.ndarray, bge_tiny: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bge_tiny)
    answer = client.infer("bge_tiny", client.ids(*(tokenizer(text).input_ids for text in TEXTS)))
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), expected, atol=2e-5)


def test_vector_does_not_depend_on_other_texts_of_the_request(client: Client) -> None:
    others = [f"{'the dog and the cat ' * (i % 7)} {i}" for i in range(31)]
    for model in ("minilm", "bge_tiny"):
        together = client.infer(model, client.text(*others[:17], "hello world", *others[17:])).as_numpy("EMBEDDING")
        alone = client.infer(model, client.text("hello world")).as_numpy("EMBEDDING")
        np.testing.assert_allclose(together[17], alone[0], atol=2e-5)
        assert abs(together[17] - together[16]).max() > 1e-3


def test_minilm_serves_its_real_weights(client: Client) -> None:
    expected = SentenceTransformer(str(MINILM), device="cpu").encode(TEXTS)
    answer = client.infer("minilm", client.text(*TEXTS)).as_numpy("EMBEDDING")
    assert (answer * expected).sum(axis=1).min() > 0.99999
    np.testing.assert_allclose(np.linalg.norm(answer, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("dimensions", [20, 40, 60])
def test_dimensions_truncate_then_normalize(client: Client, expected: np.ndarray, dimensions: int) -> None:
    answer = client.infer("bge_tiny", client.text(*TEXTS), dimensions=dimensions).as_numpy("EMBEDDING")
    cut = torch.nn.functional.normalize(torch.from_numpy(expected[:, :dimensions]), dim=-1).numpy()
    np.testing.assert_allclose(answer, cut, atol=2e-5)


def test_instruction_precedes_the_text(client: Client) -> None:
    plain = client.infer("bge_tiny", client.text("find the cat")).as_numpy("EMBEDDING")
    instructed = client.infer("bge_tiny", client.text("the cat"), instruction="find ").as_numpy("EMBEDDING")
    np.testing.assert_allclose(instructed, plain, atol=2e-6)


@pytest.mark.parametrize(("side", "keep"), [("end", slice(0, 75)), ("start", slice(-75, None))])
def test_truncation_keeps_special_tokens_and_is_reported(client: Client, bge_tiny: Any, side: str, keep: slice) -> None:
    text = " ".join("abcdefghij"[i % 10] for i in range(100))
    answer = client.infer("bge_tiny", client.text(text), truncate=side)
    assert answer.as_numpy("TOKENS").tolist() == [[77]]
    assert answer.as_numpy("DROPPED").tolist() == [[25]]
    body = AutoTokenizer.from_pretrained(bge_tiny)(text, add_special_tokens=False).input_ids[keep]
    same = client.infer("bge_tiny", client.ids([2, *body, 3])).as_numpy("EMBEDDING")
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), same, atol=2e-6)


def test_info_describes_the_model_without_computing(client: Client) -> None:
    answer = client.infer("bge_tiny", client.ids([0]), outputs=("INFO",))
    info = json.loads(bytes(answer.as_numpy("INFO")[0]))
    assert info["dimensions"] == 60
    assert info["max_model_len"] == 77
    assert info["pooling"] == "cls"
    assert info["matryoshka"] == [20, 40]
    assert info["instructions"] is True
    assert (info["batch_tokens"], info["small_tokens"], info["max_request_tokens"]) == (4_096, 256, 300_000)
    assert info["default_prompt_name"] is None


def test_only_requested_outputs_are_sent(client: Client) -> None:
    answer = client.infer("minilm", client.text("a"), outputs=("TOKENS",))
    assert answer.as_numpy("TOKENS").tolist() == [[3]]
    assert answer.as_numpy("EMBEDDING") is None


@pytest.mark.parametrize("name", ["EMBEDDING", "TOKENS", "DROPPED", "REUSED", "ERROR", "IDS", "INFO"])
def test_classes_of_every_output_can_be_requested(client: Client, name: str) -> None:
    """Request an output's largest values, by which tritonserver divides by the size of its elements."""
    texts = client.text("hello world", "a", "")

    def infer(**options: Any) -> np.ndarray:
        output = client.module.InferRequestedOutput(name, **options)
        error = client.module.InferRequestedOutput("ERROR")
        outputs = [output] if name in ("ERROR", "INFO") else [output, error]
        answer = client.client.infer("minilm", [texts], outputs=outputs, parameters={"on_error": "report"})
        result: np.ndarray = answer.as_numpy(name)
        return result

    values = infer()
    for count in (1, 2, 1000, 2**32 - 1):
        classes = infer(class_count=count)
        assert classes.shape == (3, min(count, values.shape[1]))
        for row, cells in zip(values, classes, strict=True):
            largest = np.sort(row)[::-1][: len(cells)]
            np.testing.assert_allclose([float(cell.split(b":")[0]) for cell in cells], largest, atol=1e-6)


def test_messages_are_short(client: Client) -> None:
    """Send a name of a megabyte in the prompt of a row. ERROR pads all rows to the longest message."""
    prompts = json.dumps([{}] * 2047 + [{"prompt_name": "x" * 2**20}])
    answer = client.infer("minilm", client.text(*["a"] * 2048), outputs=("ERROR",), on_error="report", prompts=prompts)
    *others, message = texts_of(answer.as_numpy("ERROR"))
    assert not any(others)
    assert len(message) < 1100
    assert message.startswith("Model 'minilm' has no prompt_name 'xxx")
    assert message.endswith("xxx'; it has: none (input at index 2047)")
    message = error_message(client, "minilm", client.text("a"), prompt_name="x" * 2**20)
    assert message.endswith("xxx'; it has: none")


def _wrong_type(client: Client) -> Any:
    tensor = client.module.InferInput("TEXT", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 1), dtype=np.float32))
    return tensor


def _wrong_shape(client: Client) -> Any:
    tensor = client.module.InferInput("TEXT", [1, 2], "BYTES")
    tensor.set_data_from_numpy(np.array([["a", "b"]], dtype=np.object_))
    return tensor


INVALID_INPUTS: list[tuple[str, Any, dict[str, Any], str]] = [
    ("wrong dtype", _wrong_type, {}, "data-type is 'FP32'"),
    ("wrong shape", _wrong_shape, {}, "unexpected shape for input 'TEXT'"),
    ("id past the vocabulary", lambda c: c.ids([1, 2], [1, 30522]), {}, "index 1 has token id 30522"),
    ("negative id", lambda c: c.ids([1, -5, 2]), {}, "index 0 has token id -5"),
    ("row of padding", lambda c: c.ids([1], [-1]), {}, "Input at index 1 cannot be empty"),
    ("empty text", lambda c: c.text("a", ""), {}, "Input at index 1 cannot be empty or whitespace only"),
    ("white space", lambda c: c.text(" \n\t"), {}, "Input at index 0 cannot be empty or whitespace only"),
    ("3,000 rows", lambda c: c.text(*["a"] * 3000), {}, "batch-size must be <= 2048"),
    ("invalid UTF-8", lambda c: c.text(b"a", b"\xc3\x28"), {}, "Input at index 1 is not valid UTF-8"),
    ("unknown parameter", lambda c: c.text("a"), {"temperature": 1}, "Unknown parameter 'temperature'"),
    ("dimensions 0", lambda c: c.text("a"), {"dimensions": 0}, "Requested dimensions must be greater than 0"),
    ("dimensions -1", lambda c: c.text("a"), {"dimensions": -1}, "Requested dimensions must be greater than 0"),
    ("dimensions 385", lambda c: c.text("a"), {"dimensions": 385}, "greater than max embedding dimension: 384"),
    ("no matryoshka", lambda c: c.text("a"), {"dimensions": 64}, "does not support matryoshka"),
    ("dimensions text", lambda c: c.text("a"), {"dimensions": "64"}, "'dimensions' must be a whole number"),
    ("no instruction", lambda c: c.text("a"), {"instruction": "find: "}, "takes no instruction"),
    ("no prompt", lambda c: c.text("a"), {"prompt_name": "query"}, "no prompt_name 'query'"),
    ("bad truncate", lambda c: c.text("a"), {"truncate": "middle"}, "truncate must be end, start or none"),
    ("too long", lambda c: c.text("a " * 300), {"truncate": "none"}, "(302 tokens) is longer than"),
    ("bad long_text", lambda c: c.text("a"), {"long_text": "split"}, "long_text must be truncate or mean"),
    ("bad on_error", lambda c: c.text("a"), {"on_error": "stop"}, "on_error must be fail or report"),
    ("no time", lambda c: c.text("a"), {"timeout_ms": 0}, "timeout_ms must be greater than 0"),
    ("prompts no JSON", lambda c: c.text("a"), {"prompts": "[{"}, "prompts is not valid JSON"),
    ("prompts deep", lambda c: c.text("a"), {"prompts": "[" * 99_999}, "prompts is not valid JSON"),
    ("too few prompts", lambda c: c.text("a", "b"), {"prompts": "[{}]"}, "each of the 2 rows, got 1 entries"),
    ("bad prompt", lambda c: c.text("a"), {"prompts": "[3]"}, "(input at index 0)"),
    ("prompts twice", lambda c: c.text("a"), {"prompts": "[{}]", "prompt_name": ""}, "Send either prompts or one"),
    ("prompts of ids", lambda c: c.ids([1]), {"prompts": "[{}]"}, "need TEXT"),
    ("too many tokens", lambda c: c.ids(*[[5] * 256] * 1200), {}, "307200 tokens, more than the 300000"),
]


@pytest.mark.parametrize(
    ("build", "parameters", "message"), [row[1:] for row in INVALID_INPUTS], ids=[row[0] for row in INVALID_INPUTS]
)
def test_invalid_input_is_refused_with_its_name(client: Client, build: Any, parameters: Any, message: str) -> None:
    with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
        client.infer("minilm", build(client), **parameters)
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert message in caught.value.message()
    assert "Traceback" not in caught.value.message()


def test_text_and_ids_together_are_refused(client: Client) -> None:
    with pytest.raises(tritonclient.utils.InferenceServerException, match="Send either INPUT_IDS or TEXT and IMAGE"):
        client.infer("minilm", client.text("a"), client.ids([1]))


def test_report_needs_the_output_error(client: Client) -> None:
    message = error_message(client, "minilm", client.text("a"), outputs=("EMBEDDING",), on_error="report")
    assert message == 'on_error "report" needs the output ERROR to be requested'


def test_invalid_rows_are_reported_and_the_others_embedded(client: Client, expected: np.ndarray) -> None:
    texts = [TEXTS[0], "", TEXTS[1], b"\xff", *TEXTS[2:]]
    answer = client.infer("bge_tiny", client.text(*texts), outputs=("EMBEDDING", "TOKENS", "ERROR"), on_error="report")
    assert texts_of(answer.as_numpy("ERROR")) == [
        "",
        "Input at index 1 cannot be empty or whitespace only",
        "",
        "Input at index 3 is not valid UTF-8",
        *[""] * 3,
    ]
    vectors = answer.as_numpy("EMBEDDING")
    np.testing.assert_allclose(np.delete(vectors, (1, 3), axis=0), expected, atol=2e-5)
    assert not vectors[[1, 3]].any()
    assert (answer.as_numpy("TOKENS")[:, 0] > 0).tolist() == [True, False, True, False, True, True, True]


def test_errors_of_inputs_are_json_on_request(client: Client) -> None:
    expected = [InputError(1, "empty", "Input cannot be empty or whitespace only"), None]
    expected.append(InputError(3, "invalid_text", "Input is not valid UTF-8"))
    texts = ["a", "", "b", b"\xff"]
    answer = client.infer(
        "bge_tiny", client.text(*texts), outputs=("EMBEDDING", "ERROR"), on_error="report", error_format="json"
    )
    cells = texts_of(answer.as_numpy("ERROR"))
    assert cells[0] == ""
    assert [InputError.from_json(cell) for cell in cells[1:]] == expected
    refused = error_message(client, "bge_tiny", client.text(*texts), error_format="json")
    assert InputError.from_json(refused) == expected[0]
    of_the_request = error_message(client, "bge_tiny", client.text("a"), error_format="json", dimensions=0)
    assert of_the_request == "Requested dimensions must be greater than 0"


def test_request_of_only_invalid_rows_is_answered(client: Client) -> None:
    for inputs in (client.text("", " "), client.ids([-1], [30522])):
        answer = client.infer("minilm", inputs, on_error="report")
        assert all(texts_of(answer.as_numpy("ERROR")))
        assert answer.as_numpy("EMBEDDING").shape == (2, 384)
        assert not answer.as_numpy("EMBEDDING").any()
        assert answer.as_numpy("TOKENS").tolist() == answer.as_numpy("DROPPED").tolist() == [[0], [0]]


def test_optional_outputs_are_not_sent_by_default(client: Client) -> None:
    """Request no outputs by name, which means all of them."""
    answer = client.infer("minilm", client.text("a"))
    assert [answer.as_numpy(name) is None for name in ("ERROR", "IDS", "INFO", "EMBEDDING")] == [True] * 3 + [False]


def test_ids_need_no_compute_and_are_not_truncated(client: Client, triton: Triton, bge_tiny: Any) -> None:
    texts = ["a b " * 60, "hello", ""]
    tokenizer, before = AutoTokenizer.from_pretrained(bge_tiny), computed_tokens(triton, "bge_tiny")
    answer = client.infer("bge_tiny", client.text(*texts[:2]), outputs=("IDS",))
    expected_ids = [tokenizer(text).input_ids for text in texts[:2]]
    assert len(expected_ids[0]) > 77
    ids = answer.as_numpy("IDS")
    assert ids.dtype == np.int32
    assert [[i for i in row if i != -1] for row in ids.tolist()] == expected_ids
    answer = client.infer("bge_tiny", client.text(*texts), outputs=("IDS", "ERROR"), on_error="report")
    assert answer.as_numpy("IDS")[2].tolist() == [-1] * len(expected_ids[0])
    assert [bool(text) for text in texts_of(answer.as_numpy("ERROR"))] == [False, False, True]
    answer = client.infer("bge_tiny", client.text("the cat"), outputs=("IDS",), instruction="find ")
    assert answer.as_numpy("IDS").tolist() == [tokenizer("find the cat").input_ids]
    assert error_message(client, "bge_tiny", client.text(*texts), outputs=("IDS",)).startswith(
        "Input at index 2 cannot"
    )
    time.sleep(0.1)
    assert computed_tokens(triton, "bge_tiny") == before


def test_each_row_may_have_a_prompt(client: Client, bge_tiny: Any) -> None:
    prompts = [{"instruction": "find "}, None, {"prompt_name": "query"}, {"prompt_name": ""}]
    vectors = client.infer("bge_tiny", client.text(*["the cat"] * 4), prompts=json.dumps(prompts)).as_numpy("EMBEDDING")
    query = "Represent this sentence for searching relevant passages: "
    rows = oracles.token_ids(bge_tiny, ["find the cat", "the cat", f"{query}the cat", "the cat"])
    np.testing.assert_allclose(vectors, oracles.pooled_vectors(bge_tiny, rows, "cls"), atol=2e-5)


def test_long_text_can_be_averaged(client: Client, bge_tiny: Any) -> None:
    """Split a text of one-letter tokens: a chunk of 77 tokens holds 75 of them."""
    letters = ["abcdefghij"[i % 7] for i in range(170)]
    rows = oracles.token_ids(bge_tiny, [" ".join(letters[i : i + 75]) for i in (0, 75, 150)])
    mean = np.average(oracles.pooled_vectors(bge_tiny, rows, "cls"), axis=0, weights=[75, 75, 20])
    for dims in (60, 20):
        answer = client.infer("bge_tiny", client.text(" ".join(letters), "a"), long_text="mean", dimensions=dims)
        truncated = mean[:dims] / np.linalg.norm(mean[:dims])
        np.testing.assert_allclose(answer.as_numpy("EMBEDDING")[0], truncated, atol=2e-5)
        assert answer.as_numpy("TOKENS").tolist() == [[170 + 3 * 2], [3]]
        assert answer.as_numpy("DROPPED").tolist() == [[0], [0]]


def test_request_past_its_deadline_is_dropped_before_compute(client: Client, triton: Triton) -> None:
    """Send it after a long request. It is large, because a small one would not wait for that."""
    ids = client.ids([7] * 200, [8] * 200)
    assert client.infer("minilm", ids, timeout_ms=60_000).as_numpy("EMBEDDING") is not None
    other = Client(tritonclient.grpc, triton.grpc)
    work = other.ids(*[[10 + i] * 200 for i in range(50)])
    busy = threading.Thread(target=other.infer, args=("minilm", work))
    busy.start()
    time.sleep(0.2)
    with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
        client.infer("minilm", ids, timeout_ms=1)
    busy.join(60)
    other.client.close()
    assert caught.value.message() == "The request's deadline passed before its computation started"
    assert caught.value.status() in ("400", "StatusCode.CANCELLED")  # HTTP has no status for it


def test_query_does_not_wait_for_a_bulk_request(triton: Triton) -> None:
    """Pause the bulk request for queries, and compare the vectors of both."""
    client, other = Client(tritonclient.http, triton.http), Client(tritonclient.grpc, triton.grpc)
    rows = np.random.default_rng(0).integers(1_000, 30_000, (50, 200)).tolist()
    work = other.ids(*rows)
    ended: list[float] = []
    vectors: list[Any] = []
    start_time = time.perf_counter()

    def bulk() -> None:
        vectors.append(other.infer("minilm", work).as_numpy("EMBEDDING"))
        ended.append(time.perf_counter() - start_time)

    busy = threading.Thread(target=bulk)
    busy.start()
    time.sleep(0.1)
    query_seconds, queries = [], []
    while not ended:
        query_start = time.perf_counter()
        queries.append(client.infer("minilm", client.text(f"hello {len(query_seconds)}")).as_numpy("EMBEDDING")[0])
        query_seconds.append(time.perf_counter() - query_start)
    busy.join(60)
    client.client.close()
    other.client.close()
    texts = oracles.token_ids(MINILM, [f"hello {i}" for i in range(len(query_seconds))])
    for computed_vectors, ids in ((vectors[0][::8], rows[::8]), (queries[::8], texts[::8])):
        assert (computed_vectors * oracles.pooled_vectors(MINILM, ids, "mean")).sum(axis=1).min() > 0.999
    assert len(query_seconds) > 5
    assert np.median(query_seconds) < ended[0] / 10


def test_query_does_not_wait_until_large_requests_are_tokenized(triton: Triton) -> None:
    """Let a query wait together with large requests: it is answered before them, except the first."""
    ended: dict[str, float] = {}

    def call(name: str, output: str, *texts: str) -> None:
        client = Client(tritonclient.grpc, triton.grpc)
        outputs = [client.module.InferRequestedOutput(output)]
        client.client.infer("minilm", [client.text(*texts)], outputs=outputs)
        ended[name] = time.monotonic()
        client.client.close()

    large = ["many words " * 500] * 150
    threads = [threading.Thread(target=call, args=(f"large {i}", "IDS", *large)) for i in range(5)]
    threads.append(threading.Thread(target=call, args=("query", "EMBEDDING", "hello")))
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(60)
    query = ended.pop("query")
    assert min(ended.values()) < query < sorted(ended.values())[2]


def metric_lines(triton: Triton) -> list[str]:
    """Return the lines of Triton's /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{triton._ports[2]}/metrics") as answer:
        return answer.read().decode().splitlines()


def metric_value(triton: Triton, name: str, model: str) -> float:
    """Return a value from Triton's /metrics."""
    lines = metric_lines(triton)
    return next(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model="{model}"'))


def rows_by_source(triton: Triton, model: str) -> Counter[str]:
    """Count the rows of a model by the source of their vector."""
    lines = metric_lines(triton)
    start = f'triton_embed_rows_total{{model="{model}",source="'
    samples = (line.removeprefix(start).partition('"} ') for line in lines if line.startswith(start))
    return Counter({source: int(float(value)) for source, _, value in samples})


def computed_tokens(triton: Triton, model: str) -> float:
    return metric_value(triton, "triton_embed_forward_tokens_sum", model)


def test_triton_metrics_include_the_engine_histograms(client: Client, triton: Triton) -> None:
    kinds = ("wait_seconds", "forward_seconds", "forward_tokens")

    def read_all(suffix: str) -> list[float]:
        return [metric_value(triton, f"triton_embed_{kind}_{suffix}", "minilm") for kind in kinds]

    time.sleep(0.5)  # the passes of the test before are recorded after their responses
    counts, sums = read_all("count"), read_all("sum")
    start_time = time.perf_counter()
    for _ in range(3):
        client.infer("minilm", client.text("a"))
    query_seconds = time.perf_counter() - start_time
    time.sleep(0.1)
    assert [after - before for before, after in zip(counts, read_all("count"), strict=True)] == [3, 3, 3]
    waited, forward, tokens = (after - before for before, after in zip(sums, read_all("sum"), strict=True))
    assert tokens == 9
    assert 0 < waited < query_seconds
    assert 0 < forward < query_seconds


def test_missing_checkpoint_message_has_its_path_and_a_command(client: Client) -> None:
    with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
        client.infer("bge", client.text("a"))
    assert caught.value.status() in ("503", "StatusCode.UNAVAILABLE")
    first, second = caught.value.message().splitlines()
    assert first == ("Model 'bge' has no checkpoint. Fetch it with: triton-embed download BAAI/bge-base-en-v1.5")
    assert second.endswith("checkpoints/BAAI/bge-base-en-v1.5")


def test_identical_texts_of_a_request_are_computed_once(
    client: Client, triton: Triton, expected: np.ndarray, bge_tiny: Any
) -> None:
    tokenizer, before = AutoTokenizer.from_pretrained(bge_tiny), rows_by_source(triton, "bge_tiny")
    tokens = computed_tokens(triton, "bge_tiny")
    order = [0, 1, 0, 2, 3, 1, 0, 4]
    answer = client.infer("bge_tiny", client.text(*(TEXTS[i] for i in order)))
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), expected[order], atol=2e-5)
    reused = answer.as_numpy("REUSED")
    assert (reused.dtype, reused[:, 0].tolist()) == (np.int32, [0, 0, 1, 0, 0, 1, 1, 0])
    lengths = [len(tokenizer(text).input_ids) for text in TEXTS]
    assert answer.as_numpy("TOKENS")[:, 0].tolist() == [lengths[i] for i in order]  # tokens are counted for every row
    time.sleep(0.1)
    assert computed_tokens(triton, "bge_tiny") - tokens == sum(lengths)
    assert rows_by_source(triton, "bge_tiny") - before == Counter(computed=5, in_flight=3)


def test_rows_are_identified_by_their_ids_with_the_prompt(client: Client, expected: np.ndarray, bge_tiny: Any) -> None:
    """Identify a text by its ids with the prompt, not by the text alone."""
    prompts = json.dumps([{}, {"instruction": "The cat "}, {}])
    answer = client.infer("bge_tiny", client.text("The cat sat.", "sat.", "sat."), prompts=prompts)
    assert answer.as_numpy("REUSED")[:, 0].tolist() == [0, 1, 0]
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING")[:2], expected[[0, 0]], atol=2e-5)


def test_long_texts_share_chunks_and_invalid_rows_share_nothing(client: Client, bge_tiny: Any) -> None:
    letters = [" ".join("abcdefg"[(i * k) % 7] for i in range(150)) for k in (1, 2)]
    answer = client.infer(
        "bge_tiny", client.text(letters[0], "", letters[1], letters[0]), long_text="mean", on_error="report"
    )
    assert answer.as_numpy("REUSED")[:, 0].tolist() == [0, 0, 0, 1]
    vectors = answer.as_numpy("EMBEDDING")
    assert np.array_equal(vectors[0], vectors[3])
    chunks = oracles.token_ids(bge_tiny, [letters[0][:149], letters[0][150:]])
    mean = oracles.pooled_vectors(bge_tiny, chunks, "cls").sum(axis=0)
    np.testing.assert_allclose(vectors[0], mean / np.linalg.norm(mean), atol=2e-5)


@pytest.fixture(scope="module")
def caching_server(bge_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """Run a server of `bge_tiny` with a cache that holds a few vectors."""
    root = tmp_path_factory.mktemp("caching")
    parameters = {"checkpoint": str(bge_tiny), "threads": "1", "dtype": "float32", "cache_bytes": "4000"}
    repository.write_model(REPOSITORY, "bge", root / "models", "bge_tiny", parameters)
    server = Triton(root / "models", root / "log")
    yield server
    server.stop()


def test_cache_answers_repeated_texts(caching_server: Triton, expected: np.ndarray) -> None:
    client = Client(tritonclient.grpc, caching_server.grpc)
    before = rows_by_source(caching_server, "bge_tiny")
    for reused in ([0, 0], [2, 2]):
        answer = client.infer("bge_tiny", client.text(*TEXTS[:2]))
        assert answer.as_numpy("REUSED")[:, 0].tolist() == reused
        np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), expected[:2], atol=2e-5)
    shorter = client.infer("bge_tiny", client.text(TEXTS[1], TEXTS[2]), dimensions=20)
    assert shorter.as_numpy("REUSED")[:, 0].tolist() == [0, 0]
    cut = torch.nn.functional.normalize(torch.from_numpy(expected[1:3, :20]), dim=-1).numpy()
    np.testing.assert_allclose(shorter.as_numpy("EMBEDDING"), cut, atol=2e-5)
    time.sleep(0.1)
    assert rows_by_source(caching_server, "bge_tiny") - before == Counter(computed=4, cache=2)
    assert 0 < metric_value(caching_server, "triton_embed_cache_bytes", "bge_tiny") <= 4_000
    for i in range(20):  # more than the cache holds
        client.infer("bge_tiny", client.text(f"the {i}"))
    answer = client.infer("bge_tiny", client.text(TEXTS[0], "the 19"))
    assert answer.as_numpy("REUSED")[:, 0].tolist() == [0, 2]
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING")[0], expected[0], atol=2e-5)
    time.sleep(0.1)
    assert 0 < metric_value(caching_server, "triton_embed_cache_bytes", "bge_tiny") <= 4_000
    client.client.close()


def test_unloading_a_model_removes_its_metrics(bge_tiny: Path, tmp_path: Path) -> None:
    """Remove them while the model's process can still report to Triton: later, the process would crash as it exits."""
    parameters = {"checkpoint": str(bge_tiny), "threads": "1"}
    repository.write_model(REPOSITORY, "bge", tmp_path / "models", "bge_tiny", parameters)
    server = Triton(tmp_path / "models", tmp_path / "log", "--model-control-mode=explicit", "--load-model=bge_tiny")

    def reported() -> bool:
        return any(line.startswith("triton_embed_") for line in metric_lines(server))

    try:
        client = tritonclient.http.InferenceServerClient(server.http)
        states = [reported()]
        client.unload_model("bge_tiny")
        deadline = time.monotonic() + 20
        while reported() and time.monotonic() < deadline:
            time.sleep(0.1)
        states.append(reported())
        client.load_model("bge_tiny")
        states.append(reported())
        client.close()
    finally:
        server.stop()
    assert states == [True, False, True]


def test_identical_concurrent_requests_share_compute(triton: Triton, expected: np.ndarray) -> None:
    """Return the right vectors to each request, and report as computed exactly the rows that were."""
    before = rows_by_source(triton, "bge_tiny")
    sources: list[list[int]] = []
    start = threading.Barrier(16)

    def call() -> None:
        client = Client(tritonclient.grpc, triton.grpc)
        start.wait()
        answer = client.infer("bge_tiny", client.text(*TEXTS))
        np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), expected, atol=2e-5)
        sources.append(answer.as_numpy("REUSED")[:, 0].tolist())
        client.client.close()

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(sources) == 16
    time.sleep(0.1)
    counts = np.bincount(np.concatenate(sources), minlength=3)
    assert rows_by_source(triton, "bge_tiny") - before == Counter(computed=counts[0], in_flight=counts[1])
    assert counts.tolist() == [counts[0], 80 - counts[0], 0]


def test_invalid_request_in_a_batch_fails_alone(triton: Triton, expected: np.ndarray) -> None:
    """Send 16 valid and 16 invalid requests at the same time, so that Triton batches them together."""
    outcomes: dict[int, Any] = {}
    start = threading.Barrier(32)

    def call(i: int) -> None:
        client = Client(tritonclient.grpc, triton.grpc)
        inputs = client.text(*TEXTS) if i % 2 else client.text("a", b"\xff")
        start.wait()
        try:
            outcomes[i] = client.infer("bge_tiny", inputs).as_numpy("EMBEDDING")
        except tritonclient.utils.InferenceServerException as error:
            outcomes[i] = error
        client.client.close()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 32
    for i, outcome in outcomes.items():
        if i % 2:
            np.testing.assert_allclose(outcome, expected, atol=2e-5)
        else:
            assert "Input at index 1 is not valid UTF-8" in outcome.message()


def test_too_many_requests_are_refused(triton: Triton) -> None:
    """Send more small requests than may wait, with no gateway before Triton. None is lost, and none is wrong."""
    client = Client(tritonclient.grpc, triton.grpc)
    outcomes: queue.SimpleQueue[tuple[int, Any, Any]] = queue.SimpleQueue()
    texts = [f"{i} {'many words ' * 20}" for i in range(2 * wire.MAX_REQUESTS)]
    for i, text in enumerate(texts):
        client.client.async_infer(
            "minilm", [client.text(text)], lambda result, error, i=i: outcomes.put((i, result, error))
        )
    vectors, refused = {}, 0
    for _ in texts:
        i, result, error = outcomes.get(timeout=60)
        if error is None:
            vectors[i] = result.as_numpy("EMBEDDING")[0]
        else:
            assert wire.QUEUE_FULL in error.message()
            refused += 1
    client.client.close()
    assert refused
    assert len(vectors) >= wire.MAX_REQUESTS
    some = sorted(vectors)[::16]
    expected = oracles.pooled_vectors(MINILM, oracles.token_ids(MINILM, [texts[i] for i in some]), "mean")
    assert (np.stack([vectors[i] for i in some]) * expected).sum(axis=1).min() > 0.999


def png(width: int, height: int, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header declares this size and which has almost no data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


VALID_PNG = png(60, 40)
NOT_AN_IMAGE = "that cannot be read: it is not a BMP, GIF, JPEG, PNG, TIFF or WEBP file"
BROKEN = "that cannot be read: the file is truncated or broken"
INVALID_IMAGES: dict[str, tuple[bytes, str]] = {
    "truncated": (VALID_PNG[: len(VALID_PNG) // 2], BROKEN),
    "header alone": (VALID_PNG[:33], NOT_AN_IMAGE),
    "text renamed .png": (b"this is an image of a cat\n", NOT_AN_IMAGE),
    "zeros": (bytes(64), NOT_AN_IMAGE),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', NOT_AN_IMAGE),
    "1x1": (png(1, 1), "of 1x1 pixels; each side must have at least 2"),
    "1x5000": (png(1, 5000), "of 1x5000 pixels; each side must have at least 2"),
    "2x5000": (png(2, 5000), "of 2x5000 pixels; one side may be at most 200 times the other"),
    "60 megapixels": (png_header(10_000, 6_000), "of more than 50,000,000 pixels"),
    "4 gigapixels": (png_header(2**31 - 1, 2), "of more than 50,000,000 pixels"),
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("images") / "clip")


@pytest.fixture(scope="module")
def image_server(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """Run a server of `clip` and `gme_qwen2_vl` with tiny checkpoints."""
    root = tmp_path_factory.mktemp("image_models")
    gme = write_qwen2_vl(root / "gme")
    limits = {"min_image_tokens": "4", "max_image_tokens": "16"}
    for family, checkpoint, parameters in (("clip", tiny_clip, {}), ("gme_qwen2_vl", gme, limits)):
        config = {"checkpoint": str(checkpoint), "threads": "1", **parameters}
        repository.write_model(REPOSITORY, family, root / "models", family, config)
    server = Triton(root / "models", root / "log")
    yield server
    server.stop()


@pytest.fixture(scope="module", params=list(PROTOCOLS))
def image_client(request: pytest.FixtureRequest, image_server: Triton) -> Iterator[Client]:
    client = Client(PROTOCOLS[request.param], getattr(image_server, request.param))
    yield client
    client.client.close()


def error_message(
    image_client: Client, model: str, *inputs: Any, outputs: tuple[str, ...] = (), **parameters: Any
) -> str:
    """Return the error message for invalid input."""
    with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
        image_client.infer(model, *inputs, outputs=outputs, **parameters)
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    message: str = caught.value.message()
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("kind", INVALID_IMAGES)
@pytest.mark.parametrize("model", ["clip", "gme_qwen2_vl"])
def test_invalid_image_is_refused_with_its_index(image_client: Client, model: str, kind: str) -> None:
    data, words = INVALID_IMAGES[kind]
    assert (
        error_message(image_client, model, image_client.images([VALID_PNG], [data]))
        == f"Input at index 1 has an image {words}"
    )
    texts = image_client.text("", "", "a cat")
    assert error_message(image_client, model, texts, image_client.images([data], [VALID_PNG], [])).startswith(
        "Input at index 0 has an image"
    )


def test_empty_image_counts_as_absent(image_client: Client) -> None:
    for model in ("clip", "gme_qwen2_vl"):
        plain = image_client.infer(model, image_client.text("a cat")).as_numpy("EMBEDDING")
        with_empty = image_client.infer(model, image_client.text("a cat"), image_client.images([b"", b""])).as_numpy(
            "EMBEDDING"
        )
        np.testing.assert_allclose(with_empty, plain, atol=2e-6)
        empty = "Input at index 1 cannot be empty or whitespace only"
        assert (
            error_message(image_client, model, image_client.text("a cat", " \n"), image_client.images([], [b"", b""]))
            == empty
        )
        assert error_message(image_client, model, image_client.images([VALID_PNG], [])) == empty


INVALID_ROWS: list[tuple[str, str, Callable[[Client], list[Any]], str]] = [
    (
        "both in one row",
        "clip",
        lambda c: [c.text("", "a cat"), c.images([VALID_PNG], [VALID_PNG])],
        "Model 'clip' embeds a text or an image, not both together (input at index 1)",
    ),
    (
        "two images in one row",
        "clip",
        lambda c: [c.images([VALID_PNG], [VALID_PNG, VALID_PNG])],
        "Model 'clip' embeds one image at a time (input at index 1)",
    ),
    (
        "typed image token",
        "gme_qwen2_vl",
        lambda c: [c.text("a", "<|image_pad|>"), c.images([], [VALID_PNG])],
        "Input at index 1 has <|image_pad|> in its text, which is reserved for images",
    ),
    ("image and ids", "clip", lambda c: [c.images([VALID_PNG]), c.ids([1])], "Send either INPUT_IDS or TEXT and IMAGE"),
    (
        "invalid UTF-8",
        "clip",
        lambda c: [c.text(b"\xff"), c.images([VALID_PNG])],
        "Input at index 0 is not valid UTF-8",
    ),
]


@pytest.mark.parametrize(("model", "build", "message"), [r[1:] for r in INVALID_ROWS], ids=[r[0] for r in INVALID_ROWS])
def test_row_that_a_model_does_not_support_is_refused(
    image_client: Client, model: str, build: Callable[[Client], list[Any]], message: str
) -> None:
    assert error_message(image_client, model, *build(image_client)) == message


def _image_of(client: Client, kind: str, dtype: type) -> Any:
    tensor = client.module.InferInput("IMAGE", [1, 1], kind)
    tensor.set_data_from_numpy(np.zeros((1, 1), dtype=dtype))
    return tensor


def test_tensors_outside_the_contract_are_refused(image_client: Client) -> None:
    """Check that Triton itself refuses wrong types and numbers of rows."""
    wrong_type = _image_of(image_client, "UINT8", np.uint8)
    assert "data-type is 'UINT8'" in error_message(image_client, "clip", wrong_type)
    wrong_type = _image_of(image_client, "INT64", np.int64)
    assert "data-type is 'INT64'" in error_message(image_client, "gme_qwen2_vl", image_client.text("a"), wrong_type)
    for texts, images in ((("a", "b"), ([VALID_PNG],)), (("a",), ([VALID_PNG], [VALID_PNG]))):
        message = error_message(image_client, "gme_qwen2_vl", image_client.text(*texts), image_client.images(*images))
        assert "batch size" in message


def test_image_for_a_text_model_is_refused(client: Client) -> None:
    message = error_message(client, "minilm", client.text("a"), client.images([VALID_PNG]))
    assert "unexpected inference input 'IMAGE'" in message


def test_info_lists_the_modalities(image_client: Client) -> None:
    modalities = {}
    for model in ("clip", "gme_qwen2_vl"):
        info = image_client.infer(model, image_client.images([b""]), outputs=("INFO",)).as_numpy("INFO")
        modalities[model] = json.loads(bytes(info[0]))["modalities"]
    assert modalities == {"clip": ["text", "image"], "gme_qwen2_vl": ["text", "image", "text+image"]}


def test_texts_and_images_of_one_request_keep_their_order(image_client: Client, tiny_clip: Path) -> None:
    files = [VALID_PNG, png(33, 90, seed=1)]
    answer = image_client.infer(
        "clip", image_client.text("", "a cat", "", "hello"), image_client.images(files[:1], [], files[1:], [])
    )
    ids = oracles.token_ids(tiny_clip, ["a cat", "hello"])
    texts = oracles.clip_text_vectors(tiny_clip, ids)
    images = oracles.clip_image_vectors(tiny_clip, [Image.open(io.BytesIO(file)) for file in files])
    expected_vectors = [images[0], texts[0], images[1], texts[1]]
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), expected_vectors, atol=2e-5)
    patches = oracles.clip_image_tokens(tiny_clip)
    assert answer.as_numpy("TOKENS")[:, 0].tolist() == [patches, len(ids[0]), patches, len(ids[1])]
    assert answer.as_numpy("DROPPED").tolist() == [[0]] * 4


def test_invalid_image_in_a_batch_fails_alone(image_server: Triton, tiny_clip: Path) -> None:
    """Send 12 valid and 12 invalid requests at the same time, so that Triton batches them together."""
    files = [png(30 + 7 * i, 60 - 3 * i, seed=i) for i in range(12)]
    texts = [f"a photo of {i} cats" for i in range(12)]
    expected_vectors = np.stack(
        [
            oracles.clip_text_vectors(tiny_clip, oracles.token_ids(tiny_clip, texts)),
            oracles.clip_image_vectors(tiny_clip, [Image.open(io.BytesIO(file)) for file in files]),
        ],
        axis=1,
    )
    bad = list(INVALID_IMAGES.values())
    outcomes: dict[int, Any] = {}
    start = threading.Barrier(24)

    def call(i: int) -> None:
        client = Client(tritonclient.grpc, image_server.grpc)
        inputs = (
            client.text(texts[i // 2], ""),
            client.images([], [files[i // 2] if i % 2 else bad[i // 2 % len(bad)][0]]),
        )
        start.wait()
        try:
            outcomes[i] = client.infer("clip", *inputs).as_numpy("EMBEDDING")
        except tritonclient.utils.InferenceServerException as error:
            outcomes[i] = error
        client.client.close()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 24
    for i, outcome in outcomes.items():
        if i % 2:
            np.testing.assert_allclose(outcome, expected_vectors[i // 2], atol=2e-5)
        else:
            assert outcome.message() == f"Input at index 1 has an image {bad[i // 2 % len(bad)][1]}"
