"""The wire contract of every family, through tritonclient over HTTP and gRPC, against the real tritonserver."""

import io
import json
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

from conftest import REPOSITORY, Triton
from triton_embed.python_backend.checkpoint import repository

PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
TEXTS = ["The cat sat.", "hello world", "a", "Where is the dog? " * 5, "0.5 - 0.25!"]


class Client:
    """One protocol, and the inputs of the contract."""

    def __init__(self, module: ModuleType, address: str) -> None:
        self.module = module
        self.client = module.InferenceServerClient(address)

    def text(self, *rows: str | bytes) -> Any:
        data = np.array(rows, dtype=np.object_)[:, None]
        found = self.module.InferInput("TEXT", list(data.shape), "BYTES")
        found.set_data_from_numpy(data)
        return found

    def images(self, *rows: Sequence[bytes]) -> Any:
        """Encoded files of each row; none is an empty one."""
        width = max(1, *map(len, rows), 1)
        data = np.array([[*row, *[b""] * (width - len(row))] for row in rows], dtype=np.object_)
        found = self.module.InferInput("IMAGE", list(data.shape), "BYTES")
        found.set_data_from_numpy(data)
        return found

    def ids(self, *rows: list[int]) -> Any:
        data = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
        for i, row in enumerate(rows):
            data[i, : len(row)] = row
        found = self.module.InferInput("INPUT_IDS", list(data.shape), "INT32")
        found.set_data_from_numpy(data)
        return found

    def infer(self, model: str, *inputs: Any, outputs: tuple[str, ...] = (), **parameters: Any) -> Any:
        wanted = [self.module.InferRequestedOutput(name) for name in outputs] or None
        return self.client.infer(model, list(inputs), outputs=wanted, parameters=parameters or None)


@pytest.fixture(scope="module", params=list(PROTOCOLS))
def client(request: pytest.FixtureRequest, triton: Triton) -> Any:
    made = Client(PROTOCOLS[request.param], getattr(triton, request.param))
    yield made
    made.client.close()


@pytest.fixture(scope="module")
def expected(bge_tiny: Any) -> np.ndarray:
    """transformers' own forward over TEXTS, one at a time: CLS, normalised, float32."""
    network, tokenizer = AutoModel.from_pretrained(bge_tiny).eval(), AutoTokenizer.from_pretrained(bge_tiny)
    with torch.no_grad():
        rows = [network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in TEXTS]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def test_texts_become_the_vectors_transformers_computes(client: Client, expected: np.ndarray, bge_tiny: Any) -> None:
    answer = client.infer("bge_tiny", client.text(*TEXTS))
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), expected, atol=2e-5)
    tokenizer = AutoTokenizer.from_pretrained(bge_tiny)
    assert answer.as_numpy("TOKENS")[:, 0].tolist() == [len(tokenizer(text).input_ids) for text in TEXTS]
    assert answer.as_numpy("DROPPED").tolist() == [[0]] * len(TEXTS)


def test_token_ids_are_used_as_they_are(client: Client, expected: np.ndarray, bge_tiny: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bge_tiny)
    answer = client.infer("bge_tiny", client.ids(*(tokenizer(text).input_ids for text in TEXTS)))
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), expected, atol=2e-5)


def test_one_text_alone_equals_the_same_text_among_31_others(client: Client) -> None:
    others = [f"{'the dog and the cat ' * (i % 7)} {i}" for i in range(31)]
    for model in ("minilm", "bge_tiny"):
        together = client.infer(model, client.text(*others[:17], "hello world", *others[17:])).as_numpy("EMBEDDING")
        alone = client.infer(model, client.text("hello world")).as_numpy("EMBEDDING")
        np.testing.assert_allclose(together[17], alone[0], atol=2e-5)
        assert abs(together[17] - together[16]).max() > 1e-3


def test_minilm_serves_its_real_weights(client: Client) -> None:
    from conftest import MINILM

    expected = SentenceTransformer(str(MINILM), device="cpu").encode(TEXTS)
    answer = client.infer("minilm", client.text(*TEXTS)).as_numpy("EMBEDDING")
    assert (answer * expected).sum(axis=1).min() > 0.99999
    np.testing.assert_allclose(np.linalg.norm(answer, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("dimensions", [20, 40, 60])
def test_dimensions_cut_then_normalise(client: Client, expected: np.ndarray, dimensions: int) -> None:
    answer = client.infer("bge_tiny", client.text(*TEXTS), dimensions=dimensions).as_numpy("EMBEDDING")
    cut = torch.nn.functional.normalize(torch.from_numpy(expected[:, :dimensions]), dim=-1).numpy()
    np.testing.assert_allclose(answer, cut, atol=2e-5)


def test_an_instruction_goes_before_the_text(client: Client) -> None:
    plain = client.infer("bge_tiny", client.text("find the cat")).as_numpy("EMBEDDING")
    instructed = client.infer("bge_tiny", client.text("the cat"), instruction="find ").as_numpy("EMBEDDING")
    np.testing.assert_allclose(instructed, plain, atol=2e-6)


@pytest.mark.parametrize(("side", "keep"), [("end", slice(0, 75)), ("start", slice(-75, None))])
def test_truncation_keeps_special_tokens_and_says_so(client: Client, bge_tiny: Any, side: str, keep: slice) -> None:
    text = " ".join("abcdefghij"[i % 10] for i in range(100))
    answer = client.infer("bge_tiny", client.text(text), truncate=side)
    assert answer.as_numpy("TOKENS").tolist() == [[77]]
    assert answer.as_numpy("DROPPED").tolist() == [[25]]
    body = AutoTokenizer.from_pretrained(bge_tiny)(text, add_special_tokens=False).input_ids[keep]
    same = client.infer("bge_tiny", client.ids([2, *body, 3])).as_numpy("EMBEDDING")
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), same, atol=2e-6)


def test_info_describes_the_model_without_computing(client: Client) -> None:
    answer = client.infer("bge_tiny", client.ids([0]), outputs=("INFO",))
    info = json.loads(answer.as_numpy("INFO")[0, 0])
    assert info["dimensions"] == 60
    assert info["max_model_len"] == 77
    assert info["pooling"] == "cls"
    assert info["matryoshka"] == [20, 40]
    assert info["instructions"] is True
    assert (info["batch_tokens"], info["small_tokens"], info["max_request_tokens"]) == (4_096, 256, 300_000)
    assert info["default_prompt_name"] is None


def test_only_the_outputs_asked_for_are_sent(client: Client) -> None:
    answer = client.infer("minilm", client.text("a"), outputs=("TOKENS",))
    assert answer.as_numpy("TOKENS").tolist() == [[3]]
    assert answer.as_numpy("EMBEDDING") is None


def _wrong_type(client: Client) -> Any:
    found = client.module.InferInput("TEXT", [1, 1], "FP32")
    found.set_data_from_numpy(np.zeros((1, 1), dtype=np.float32))
    return found


def _wrong_shape(client: Client) -> Any:
    found = client.module.InferInput("TEXT", [1, 2], "BYTES")
    found.set_data_from_numpy(np.array([["a", "b"]], dtype=np.object_))
    return found


BAD: list[tuple[str, Any, dict[str, Any], str]] = [
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


@pytest.mark.parametrize(("build", "parameters", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_refused_by_name(client: Client, build: Any, parameters: Any, message: str) -> None:
    with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
        client.infer("minilm", build(client), **parameters)
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert message in caught.value.message()
    assert "Traceback" not in caught.value.message()


def test_text_and_ids_together_are_refused(client: Client) -> None:
    with pytest.raises(tritonclient.utils.InferenceServerException, match="Send either INPUT_IDS or TEXT and IMAGE"):
        client.infer("minilm", client.text("a"), client.ids([1]))


def test_a_report_needs_its_output(client: Client) -> None:
    message = refused(client, "minilm", client.text("a"), outputs=("EMBEDDING",), on_error="report")
    assert message == 'on_error "report" needs the output ERROR to be requested'


def test_bad_rows_are_reported_and_the_others_embedded(client: Client, expected: np.ndarray) -> None:
    texts = [TEXTS[0], "", TEXTS[1], b"\xff", *TEXTS[2:]]
    answer = client.infer("bge_tiny", client.text(*texts), outputs=("EMBEDDING", "TOKENS", "ERROR"), on_error="report")
    assert [row[0].decode() for row in answer.as_numpy("ERROR")] == [
        "",
        "Input at index 1 cannot be empty or whitespace only",
        "",
        "Input at index 3 is not valid UTF-8",
        *[""] * 3,
    ]
    found = answer.as_numpy("EMBEDDING")
    np.testing.assert_allclose(np.delete(found, (1, 3), axis=0), expected, atol=2e-5)
    assert not found[[1, 3]].any()
    assert (answer.as_numpy("TOKENS")[:, 0] > 0).tolist() == [True, False, True, False, True, True, True]


def test_a_request_of_bad_rows_alone_is_answered(client: Client) -> None:
    for inputs in (client.text("", " "), client.ids([-1], [30522])):
        answer = client.infer("minilm", inputs, on_error="report")
        assert all(answer.as_numpy("ERROR")[:, 0])
        assert answer.as_numpy("EMBEDDING").shape == (2, 384)
        assert not answer.as_numpy("EMBEDDING").any()
        assert answer.as_numpy("TOKENS").tolist() == answer.as_numpy("DROPPED").tolist() == [[0], [0]]


def test_nobody_is_told_of_errors_who_did_not_ask(client: Client) -> None:
    """tritonclient that names no outputs asks for all."""
    answer = client.infer("minilm", client.text("a"))
    assert [answer.as_numpy(name) is None for name in ("ERROR", "IDS", "INFO", "EMBEDDING")] == [True] * 3 + [False]


def test_ids_come_without_compute_and_uncut(client: Client, triton: Triton, bge_tiny: Any) -> None:
    texts = ["a b " * 60, "hello", ""]
    tokenizer, before = AutoTokenizer.from_pretrained(bge_tiny), computed(triton, "bge_tiny")
    answer = client.infer("bge_tiny", client.text(*texts[:2]), outputs=("IDS",))
    wanted = [tokenizer(text).input_ids for text in texts[:2]]
    assert len(wanted[0]) > 77
    found = answer.as_numpy("IDS")
    assert found.dtype == np.int32
    assert [[i for i in row if i != -1] for row in found.tolist()] == wanted
    answer = client.infer("bge_tiny", client.text(*texts), outputs=("IDS", "ERROR"), on_error="report")
    assert answer.as_numpy("IDS")[2].tolist() == [-1] * len(wanted[0])
    assert [bool(row[0]) for row in answer.as_numpy("ERROR")] == [False, False, True]
    asked = client.infer("bge_tiny", client.text("the cat"), outputs=("IDS",), instruction="find ")
    assert asked.as_numpy("IDS").tolist() == [tokenizer("find the cat").input_ids]
    assert refused(client, "bge_tiny", client.text(*texts), outputs=("IDS",)).startswith("Input at index 2 cannot")
    time.sleep(0.1)
    assert computed(triton, "bge_tiny") == before


def test_each_row_may_have_its_own_prompt(client: Client, bge_tiny: Any) -> None:
    prompts = [{"instruction": "find "}, None, {"prompt_name": "query"}, {"prompt_name": ""}]
    found = client.infer("bge_tiny", client.text(*["the cat"] * 4), prompts=json.dumps(prompts)).as_numpy("EMBEDDING")
    query = "Represent this sentence for searching relevant passages: "
    rows = oracles.ids_of(bge_tiny, ["find the cat", "the cat", f"{query}the cat", "the cat"])
    np.testing.assert_allclose(found, oracles.encoder_vectors(bge_tiny, rows, "cls"), atol=2e-5)


def test_a_long_text_may_be_averaged(client: Client, bge_tiny: Any) -> None:
    """One letter is one token: 77 take 75 of them."""
    letters = ["abcdefghij"[i % 7] for i in range(170)]
    rows = oracles.ids_of(bge_tiny, [" ".join(letters[i : i + 75]) for i in (0, 75, 150)])
    mean = np.average(oracles.encoder_vectors(bge_tiny, rows, "cls"), axis=0, weights=[75, 75, 20])
    for dims in (60, 20):
        answer = client.infer("bge_tiny", client.text(" ".join(letters), "a"), long_text="mean", dimensions=dims)
        wanted = mean[:dims] / np.linalg.norm(mean[:dims])
        np.testing.assert_allclose(answer.as_numpy("EMBEDDING")[0], wanted, atol=2e-5)
        assert answer.as_numpy("TOKENS").tolist() == [[170 + 3 * 2], [3]]
        assert answer.as_numpy("DROPPED").tolist() == [[0], [0]]


def test_a_request_whose_deadline_passed_is_dropped_before_it_is_computed(client: Client, triton: Triton) -> None:
    """Behind one that takes long, for which a small one would not wait."""
    asked = client.ids([7] * 200, [8] * 200)
    assert client.infer("minilm", asked, timeout_ms=60_000).as_numpy("EMBEDDING") is not None
    other = Client(tritonclient.grpc, triton.grpc)
    work = other.ids(*[[10 + i] * 200 for i in range(150)])
    busy = threading.Thread(target=other.infer, args=("minilm", work))
    busy.start()
    time.sleep(0.2)
    with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
        client.infer("minilm", asked, timeout_ms=1)
    busy.join(60)
    other.client.close()
    assert caught.value.message() == "The request's deadline passed before its computation started"
    assert caught.value.status() in ("400", "StatusCode.CANCELLED")  # HTTP has no word for it


def test_a_query_does_not_wait_for_a_bulk_request(client: Client, triton: Triton) -> None:
    """Which is interrupted for it, and right all the same."""
    from conftest import MINILM

    other = Client(tritonclient.grpc, triton.grpc)
    rows = np.random.default_rng(0).integers(1_000, 30_000, (100, 200)).tolist()
    work = other.ids(*rows)
    ended: list[float] = []
    vectors: list[Any] = []
    began = time.perf_counter()

    def bulk() -> None:
        vectors.append(other.infer("minilm", work).as_numpy("EMBEDDING"))
        ended.append(time.perf_counter() - began)

    busy = threading.Thread(target=bulk)
    busy.start()
    time.sleep(0.1)
    took, queries = [], []
    while not ended:
        asked = time.perf_counter()
        queries.append(client.infer("minilm", client.text(f"hello {len(took)}")).as_numpy("EMBEDDING")[0])
        took.append(time.perf_counter() - asked)
    busy.join(60)
    other.client.close()
    texts = oracles.ids_of(MINILM, [f"hello {i}" for i in range(len(took))])
    for found, wanted in ((vectors[0][::8], rows[::8]), (queries[::8], texts[::8])):
        assert (found * oracles.encoder_vectors(MINILM, wanted, "mean")).sum(axis=1).min() > 0.999
    assert len(took) > 5
    assert np.median(took) < ended[0] / 10


def scrape(triton: Triton) -> list[str]:
    """The lines of Triton's own /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{triton._ports[2]}/metrics") as answer:
        return answer.read().decode().splitlines()


def scraped(triton: Triton, name: str, model: str) -> float:
    """A number of Triton's own /metrics."""
    lines = scrape(triton)
    return next(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model="{model}"'))


def rows_by_source(triton: Triton, model: str) -> Counter[str]:
    """Rows that got a vector, by where it came from."""
    lines = scrape(triton)
    start = f'triton_embed_rows_total{{model="{model}",source="'
    found = (line.removeprefix(start).partition('"} ') for line in lines if line.startswith(start))
    return Counter({source: int(float(value)) for source, _, value in found})


def computed(triton: Triton, model: str) -> float:
    return scraped(triton, "triton_embed_forward_tokens_sum", model)


def test_tritons_metrics_hold_the_engines_histograms(client: Client, triton: Triton) -> None:
    kinds = ("wait_seconds", "forward_seconds", "forward_tokens")

    def scrape(what: str) -> list[float]:
        return [scraped(triton, f"triton_embed_{kind}_{what}", "minilm") for kind in kinds]

    counts, sums = scrape("count"), scrape("sum")
    began = time.perf_counter()
    for _ in range(3):
        client.infer("minilm", client.text("a"))
    took = time.perf_counter() - began
    time.sleep(0.1)
    assert [after - before for before, after in zip(counts, scrape("count"), strict=True)] == [3, 3, 3]
    waited, forward, tokens = (after - before for before, after in zip(sums, scrape("sum"), strict=True))
    assert tokens == 9
    assert 0 < waited < took
    assert 0 < forward < took


def test_a_family_without_a_checkpoint_says_where_it_looked_and_what_to_do(client: Client) -> None:
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
    tokens = computed(triton, "bge_tiny")
    order = [0, 1, 0, 2, 3, 1, 0, 4]
    answer = client.infer("bge_tiny", client.text(*(TEXTS[i] for i in order)))
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), expected[order], atol=2e-5)
    reused = answer.as_numpy("REUSED")
    assert (reused.dtype, reused[:, 0].tolist()) == (np.int32, [0, 0, 1, 0, 0, 1, 1, 0])
    lengths = [len(tokenizer(text).input_ids) for text in TEXTS]
    assert answer.as_numpy("TOKENS")[:, 0].tolist() == [lengths[i] for i in order]  # what was embedded is counted
    time.sleep(0.1)
    assert computed(triton, "bge_tiny") - tokens == sum(lengths)
    assert rows_by_source(triton, "bge_tiny") - before == Counter(computed=5, in_flight=3)


def test_the_ids_of_a_text_are_the_same_row(client: Client, expected: np.ndarray, bge_tiny: Any) -> None:
    """And a text with its prompt is what the model reads: not the text alone."""
    prompts = json.dumps([{}, {"instruction": "The cat "}, {}])
    answer = client.infer("bge_tiny", client.text("The cat sat.", "sat.", "sat."), prompts=prompts)
    assert answer.as_numpy("REUSED")[:, 0].tolist() == [0, 1, 0]
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING")[:2], expected[[0, 0]], atol=2e-5)


def test_long_texts_share_their_chunks_and_bad_rows_share_nothing(client: Client, bge_tiny: Any) -> None:
    letters = [" ".join("abcdefg"[(i * k) % 7] for i in range(150)) for k in (1, 2)]
    answer = client.infer(
        "bge_tiny", client.text(letters[0], "", letters[1], letters[0]), long_text="mean", on_error="report"
    )
    assert answer.as_numpy("REUSED")[:, 0].tolist() == [0, 0, 0, 1]
    found = answer.as_numpy("EMBEDDING")
    assert np.array_equal(found[0], found[3])
    chunks = oracles.ids_of(bge_tiny, [letters[0][:149], letters[0][150:]])
    mean = oracles.encoder_vectors(bge_tiny, chunks, "cls").sum(axis=0)
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=2e-5)


@pytest.fixture(scope="module")
def remembering(bge_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """`bge_tiny` with room for a few vectors in its cache."""
    root = tmp_path_factory.mktemp("remembering")
    parameters = {"checkpoint": str(bge_tiny), "threads": "1", "dtype": "float32", "cache_bytes": "4000"}
    repository.write_model(REPOSITORY, "bge", root / "models", "bge_tiny", parameters)
    server = Triton(root / "models", root / "log")
    yield server
    server.stop()


def test_the_cache_answers_what_comes_again(remembering: Triton, expected: np.ndarray) -> None:
    client = Client(tritonclient.grpc, remembering.grpc)
    before = rows_by_source(remembering, "bge_tiny")
    for reused in ([0, 0], [2, 2]):
        answer = client.infer("bge_tiny", client.text(*TEXTS[:2]))
        assert answer.as_numpy("REUSED")[:, 0].tolist() == reused
        np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), expected[:2], atol=2e-5)
    shorter = client.infer("bge_tiny", client.text(TEXTS[1], TEXTS[2]), dimensions=20)
    assert shorter.as_numpy("REUSED")[:, 0].tolist() == [0, 0]
    cut = torch.nn.functional.normalize(torch.from_numpy(expected[1:3, :20]), dim=-1).numpy()
    np.testing.assert_allclose(shorter.as_numpy("EMBEDDING"), cut, atol=2e-5)
    time.sleep(0.1)
    assert rows_by_source(remembering, "bge_tiny") - before == Counter(computed=4, cache=2)
    assert 0 < scraped(remembering, "triton_embed_cache_bytes", "bge_tiny") <= 4_000
    for i in range(20):  # more than there is room for
        client.infer("bge_tiny", client.text(f"the {i}"))
    answer = client.infer("bge_tiny", client.text(TEXTS[0], "the 19"))
    assert answer.as_numpy("REUSED")[:, 0].tolist() == [0, 2]
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING")[0], expected[0], atol=2e-5)
    time.sleep(0.1)
    assert 0 < scraped(remembering, "triton_embed_cache_bytes", "bge_tiny") <= 4_000
    client.client.close()


def test_an_unloaded_model_takes_its_metrics_with_it(bge_tiny: Path, tmp_path: Path) -> None:
    """They end while its process can still tell Triton; later is too late, and a crash at its very end."""
    parameters = {"checkpoint": str(bge_tiny), "threads": "1"}
    repository.write_model(REPOSITORY, "bge", tmp_path / "models", "bge_tiny", parameters)
    server = Triton(tmp_path / "models", tmp_path / "log", "--model-control-mode=explicit", "--load-model=bge_tiny")

    def told() -> bool:
        return any(line.startswith("triton_embed_") for line in scrape(server))

    try:
        client = tritonclient.http.InferenceServerClient(server.http)
        found = [told()]
        client.unload_model("bge_tiny")
        deadline = time.monotonic() + 20
        while told() and time.monotonic() < deadline:
            time.sleep(0.1)
        found.append(told())
        client.load_model("bge_tiny")
        found.append(told())
        client.close()
    finally:
        server.stop()
    assert found == [True, False, True]


def test_identical_requests_at_once(triton: Triton, expected: np.ndarray) -> None:
    """However they meet, everyone gets its vectors, and what is said to be computed was."""
    before = rows_by_source(triton, "bge_tiny")
    told: list[list[int]] = []
    start = threading.Barrier(16)

    def call() -> None:
        client = Client(tritonclient.grpc, triton.grpc)
        start.wait()
        answer = client.infer("bge_tiny", client.text(*TEXTS))
        np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), expected, atol=2e-5)
        told.append(answer.as_numpy("REUSED")[:, 0].tolist())
        client.client.close()

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(told) == 16
    time.sleep(0.1)
    counts = np.bincount(np.concatenate(told), minlength=3)
    assert rows_by_source(triton, "bge_tiny") - before == Counter(computed=counts[0], in_flight=counts[1])
    assert counts.tolist() == [counts[0], 80 - counts[0], 0]


def test_a_bad_request_among_good_ones_fails_alone(triton: Triton, expected: np.ndarray) -> None:
    """Sixteen good and sixteen bad requests at once, so that Triton batches them together."""
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


def test_refusals_do_not_stall(client: Client) -> None:
    """A response sent inside execute() stalls for 500 ms one time in a hundred.

    One in 600 is let pass: on a busy machine the thread that runs execute() may be held up before it is really over.
    """
    stalls = 0
    for _ in range(600):
        began = time.perf_counter()
        client.infer("bge_tiny", client.ids([0]), outputs=("INFO",))
        stalls += time.perf_counter() - began > 0.4
    assert stalls <= 1


def png(width: int, height: int, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


GOOD = png(60, 40)
NO_FILE = "that cannot be read: it is not a BMP, GIF, JPEG, PNG, TIFF or WEBP file"
BROKEN = "that cannot be read: the file is truncated or broken"
BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "truncated": (GOOD[: len(GOOD) // 2], BROKEN),
    "header alone": (GOOD[:33], NO_FILE),
    "text renamed .png": (b"this is a picture of a cat\n", NO_FILE),
    "zeros": (bytes(64), NO_FILE),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', NO_FILE),
    "1x1": (png(1, 1), "of 1x1 pixels; each side must have at least 2"),
    "1x5000": (png(1, 5000), "of 1x5000 pixels; each side must have at least 2"),
    "2x5000": (png(2, 5000), "of 2x5000 pixels; one side may be at most 200 times the other"),
    "60 megapixels": (png_header(10_000, 6_000), "of more than 50,000,000 pixels"),
    "4 gigapixels": (png_header(2**31 - 1, 2), "of more than 50,000,000 pixels"),
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("pictured") / "clip")


@pytest.fixture(scope="module")
def pictured(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """`clip` and `gme_qwen2_vl` with tiny checkpoints."""
    root = tmp_path_factory.mktemp("pictured_models")
    gme = write_qwen2_vl(root / "gme")
    limits = {"min_image_tokens": "4", "max_image_tokens": "16"}
    for family, checkpoint, parameters in (("clip", tiny_clip, {}), ("gme_qwen2_vl", gme, limits)):
        stated = {"checkpoint": str(checkpoint), "threads": "1", **parameters}
        repository.write_model(REPOSITORY, family, root / "models", family, stated)
    server = Triton(root / "models", root / "log")
    yield server
    server.stop()


@pytest.fixture(scope="module", params=list(PROTOCOLS))
def camera(request: pytest.FixtureRequest, pictured: Triton) -> Iterator[Client]:
    made = Client(PROTOCOLS[request.param], getattr(pictured, request.param))
    yield made
    made.client.close()


def refused(camera: Client, model: str, *inputs: Any, outputs: tuple[str, ...] = (), **parameters: Any) -> str:
    """What the server says to bad input."""
    with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
        camera.infer(model, *inputs, outputs=outputs, **parameters)
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    message: str = caught.value.message()
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("kind", BAD_IMAGES)
@pytest.mark.parametrize("model", ["clip", "gme_qwen2_vl"])
def test_a_bad_image_is_refused_by_its_index(camera: Client, model: str, kind: str) -> None:
    data, words = BAD_IMAGES[kind]
    assert refused(camera, model, camera.images([GOOD], [data])) == f"Input at index 1 has an image {words}"
    texts = camera.text("", "", "a cat")
    assert refused(camera, model, texts, camera.images([data], [GOOD], [])).startswith("Input at index 0 has an image")


def test_an_empty_image_is_none(camera: Client) -> None:
    for model in ("clip", "gme_qwen2_vl"):
        plain = camera.infer(model, camera.text("a cat")).as_numpy("EMBEDDING")
        beside = camera.infer(model, camera.text("a cat"), camera.images([b"", b""])).as_numpy("EMBEDDING")
        np.testing.assert_allclose(beside, plain, atol=2e-6)
        nothing = "Input at index 1 cannot be empty or whitespace only"
        assert refused(camera, model, camera.text("a cat", " \n"), camera.images([], [b"", b""])) == nothing
        assert refused(camera, model, camera.images([GOOD], [])) == nothing


BAD_ROWS: list[tuple[str, str, Callable[[Client], list[Any]], str]] = [
    (
        "both in one row",
        "clip",
        lambda c: [c.text("", "a cat"), c.images([GOOD], [GOOD])],
        "Model 'clip' embeds a text or an image, not both together (input at index 1)",
    ),
    (
        "two images in one row",
        "clip",
        lambda c: [c.images([GOOD], [GOOD, GOOD])],
        "Model 'clip' embeds one image at a time (input at index 1)",
    ),
    (
        "typed image token",
        "gme_qwen2_vl",
        lambda c: [c.text("a", "<|image_pad|>"), c.images([], [GOOD])],
        "Input at index 1 has <|image_pad|> in its text, which is reserved for images",
    ),
    ("image and ids", "clip", lambda c: [c.images([GOOD]), c.ids([1])], "Send either INPUT_IDS or TEXT and IMAGE"),
    ("invalid UTF-8", "clip", lambda c: [c.text(b"\xff"), c.images([GOOD])], "Input at index 0 is not valid UTF-8"),
]


@pytest.mark.parametrize(("model", "build", "message"), [r[1:] for r in BAD_ROWS], ids=[r[0] for r in BAD_ROWS])
def test_a_row_that_a_model_cannot_take(
    camera: Client, model: str, build: Callable[[Client], list[Any]], message: str
) -> None:
    assert refused(camera, model, *build(camera)) == message


def _image_of(client: Client, kind: str, dtype: type) -> Any:
    found = client.module.InferInput("IMAGE", [1, 1], kind)
    found.set_data_from_numpy(np.zeros((1, 1), dtype=dtype))
    return found


def test_tensors_that_are_not_those_of_the_contract(camera: Client) -> None:
    """Triton itself looks at types and numbers of rows."""
    wrong_type = _image_of(camera, "UINT8", np.uint8)
    assert "data-type is 'UINT8'" in refused(camera, "clip", wrong_type)
    wrong_type = _image_of(camera, "INT64", np.int64)
    assert "data-type is 'INT64'" in refused(camera, "gme_qwen2_vl", camera.text("a"), wrong_type)
    for texts, images in ((("a", "b"), ([GOOD],)), (("a",), ([GOOD], [GOOD]))):
        message = refused(camera, "gme_qwen2_vl", camera.text(*texts), camera.images(*images))
        assert "batch size" in message


def test_an_image_for_a_model_that_reads_none(client: Client) -> None:
    message = refused(client, "minilm", client.text("a"), client.images([GOOD]))
    assert "unexpected inference input 'IMAGE'" in message


def test_models_say_what_they_read(camera: Client) -> None:
    stated = {}
    for model in ("clip", "gme_qwen2_vl"):
        info = camera.infer(model, camera.images([b""]), outputs=("INFO",)).as_numpy("INFO")
        stated[model] = json.loads(info[0, 0])["modalities"]
    assert stated == {"clip": ["text", "image"], "gme_qwen2_vl": ["text", "image", "text+image"]}


def test_texts_and_pictures_of_one_request_come_back_in_order(camera: Client, tiny_clip: Path) -> None:
    files = [GOOD, png(33, 90, seed=1)]
    answer = camera.infer("clip", camera.text("", "a cat", "", "hello"), camera.images(files[:1], [], files[1:], []))
    ids = oracles.ids_of(tiny_clip, ["a cat", "hello"])
    texts = oracles.clip_text_vectors(tiny_clip, ids)
    images = oracles.clip_image_vectors(tiny_clip, [Image.open(io.BytesIO(file)) for file in files])
    wanted = [images[0], texts[0], images[1], texts[1]]
    np.testing.assert_allclose(answer.as_numpy("EMBEDDING"), wanted, atol=2e-5)
    patches = oracles.clip_image_tokens(tiny_clip)
    assert answer.as_numpy("TOKENS")[:, 0].tolist() == [patches, len(ids[0]), patches, len(ids[1])]
    assert answer.as_numpy("DROPPED").tolist() == [[0]] * 4


def test_a_bad_image_among_good_requests_fails_alone(pictured: Triton, tiny_clip: Path) -> None:
    """Twelve good and twelve bad requests at once, so that Triton batches them together."""
    files = [png(30 + 7 * i, 60 - 3 * i, seed=i) for i in range(12)]
    texts = [f"a photo of {i} cats" for i in range(12)]
    wanted = np.stack(
        [
            oracles.clip_text_vectors(tiny_clip, oracles.ids_of(tiny_clip, texts)),
            oracles.clip_image_vectors(tiny_clip, [Image.open(io.BytesIO(file)) for file in files]),
        ],
        axis=1,
    )
    bad = list(BAD_IMAGES.values())
    outcomes: dict[int, Any] = {}
    start = threading.Barrier(24)

    def call(i: int) -> None:
        client = Client(tritonclient.grpc, pictured.grpc)
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
            np.testing.assert_allclose(outcome, wanted[i // 2], atol=2e-5)
        else:
            assert outcome.message() == f"Input at index 1 has an image {bad[i // 2 % len(bad)][1]}"
