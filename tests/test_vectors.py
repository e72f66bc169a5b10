"""Every family against transformers, with tiny checkpoints.

The first checkpoint of a family is served by tritonserver, and requested over HTTP and over gRPC. The others are
loaded into this process, because each would need a process that imports torch for longer than its tests take. They get
the same tensors and parameters, which EmbeddingServer's own classes turn into rows.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from checkpoints import CASES, CORPUS, EXTRA_TOKEN, FAMILIES, Case, write_decoder
from oracles import INSTRUCTION_PROMPTS, Answer, Item, expected_answer, parameters_of, vectors_of
from PIL import Image
from test_ops import one_thread  # noqa: F401 - applies to every test here
from transformers import Qwen2Model
from tritonclient.utils import InferenceServerException

from conftest import REPOSITORY, Family, Triton
from triton_embed.python_backend.checkpoint import repository
from triton_embed.python_backend.errors import BadRequest
from triton_embed.python_backend.inputs.rows import IdRows, ItemRows

# Number of words of each text.
WORDS = (1, 90, 2, 3, 3, 3, 13, 1, 5, 8, 21, 34, 55, 2, 4, 6, 1, 1, 9, 27, 40, 7, 7, 7, 7, 30, 2, 11, 16, 32, 18, 3)
SIZES = ((60, 40), (24, 130), (150, 37), (48, 48), (70, 71), (9, 33), (200, 180), (31, 30))  # width, height in pixels
UNKNOWN_WORDS = ("zebra", "Ωmega", "emoji🙂", "日本語", "x\ty", "two  spaces", "A\nB", "3.14", "'s")

REFUSED = (InferenceServerException, BadRequest)

ERRORS: list[float] = []  # the largest error of each vector of the running test


@dataclass
class Served:
    """All cases of a family, and the expected answers to `items_of` the family."""

    triton: Triton
    loaded: Mapping[str, Family]  # the cases that tritonserver does not serve
    directories: Mapping[str, Path]
    expected: dict[str, Answer] = field(default_factory=dict)

    def oracle(self, case: Case) -> Answer:
        if case.name not in self.expected:
            self.expected[case.name] = expected_answer(case, self.directories[case.name], items_of(case.family))
        return self.expected[case.name]


class Servers:
    """Runs one tritonserver at a time, with cases of one family. The previous one stops in the background."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._family = ""
        self._served: Served | None = None
        self._failed: dict[str, Exception] = {}
        self._stopper = ThreadPoolExecutor(1)
        self._stopped: list[Future[None]] = []

    def of(self, family: str) -> Served:
        if family in self._failed:  # do not wait for its start again
            raise self._failed[family]
        if self._served is None or family != self._family:
            self._stop_current()
            try:
                self._family, self._served = family, self._start(family)
            except Exception as error:
                self._failed[family] = error
                raise
        return self._served

    def _start(self, family: str) -> Served:
        root = self._factory.mktemp(family)
        cases = [case for case in CASES if case.family == family]
        directories = {case.name: case.write(root / "checkpoints" / case.id) for case in cases}
        parameters = {
            case.name: {"threads": "1", "is_matryoshka": "true", **case.parameters, "checkpoint": str(directory)}
            for case, directory in zip(cases, directories.values(), strict=True)
        }
        first, *others = cases
        repository.write_model(REPOSITORY, family, root / "models", first.name, parameters[first.name])
        loaded = {case.name: Family(family, directories[case.name], **parameters[case.name]) for case in others}
        return Served(Triton(root / "models", root / "log"), loaded, directories)

    def _stop_current(self) -> None:
        if self._served is not None:
            self._stopped.append(self._stopper.submit(self._served.triton.stop))
        self._served = None

    def stop(self) -> None:
        self._stop_current()
        for stopped in self._stopped:
            stopped.result()
        self._stopper.shutdown()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    all_servers = Servers(tmp_path_factory)
    yield all_servers
    all_servers.stop()


@pytest.fixture
def served(servers: Servers, case: Case) -> Served:
    return servers.of(case.family)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, list[float]]]]:
    """Yield a table family -> check -> errors. It is printed after the last test of this file."""
    errors: dict[str, dict[str, list[float]]] = {}
    yield errors
    checks = list(dict.fromkeys(check for row in errors.values() for check in row))
    lines = ["| largest difference from transformers float32 | checkpoints | " + " | ".join(checks) + " |"]
    lines.append("|---" * (len(checks) + 2) + "|")
    for family, row in sorted(errors.items()):
        cells = [f"{max(row[check]):.1e} ({len(row[check])})" if row.get(check) else "–" for check in checks]
        count = sum(case.family == family for case in CASES)
        lines.append(f"| `{family}` | {count} | " + " | ".join(cells) + " |")
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        plugins.getplugin("terminalreporter").write_line("\n\n" + "\n".join(lines))


@pytest.fixture(autouse=True)
def collect_errors(request: pytest.FixtureRequest, table: dict[str, dict[str, list[float]]]) -> Iterator[None]:
    ERRORS.clear()
    yield
    if ERRORS:
        check = request.function.__name__.removeprefix("test_").replace("_", " ")
        table.setdefault(request.getfixturevalue("case").family, {}).setdefault(check, []).extend(ERRORS)


# Module scope runs all tests of a case, and all cases of a family, one after the other.
for_each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES], scope="module")


def texts() -> list[str]:
    """Return 32 texts of 1 to 90 words: known and unknown words, other scripts, unusual white space."""
    words = [*" ".join(CORPUS).split(), *UNKNOWN_WORDS]
    random = np.random.default_rng(0)
    drawn = [" ".join(random.choice(words, count)) for count in WORDS]
    drawn[6] += f" {EXTRA_TOKEN} {drawn[2]}"
    return drawn


def pictures() -> list[Image.Image]:
    """Return an image of each size in SIZES: gradients plus noise."""
    random = np.random.default_rng(1)
    drawn = []
    for width, height in SIZES:
        y, x = np.mgrid[:height, :width]
        smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=2)
        noisy = smooth + random.normal(0, 40, smooth.shape)
        drawn.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return drawn


def items_of(family: str) -> list[Item]:
    """Return 32 items that mix all modalities of the family."""
    images, network = pictures(), parameters_of(family)["model_types"]
    if network not in ("clip", "qwen2_vl"):
        return [{"text": text} for text in texts()]
    items: list[Item] = []
    for i, text in enumerate(texts()):
        image, other = images[i % len(images)], images[(3 * i + 1) % len(images)]
        if network == "clip":
            items.append({"images": [image]} if i % 2 else {"text": text})
        else:
            short = " ".join(text.split()[:20])
            kinds: list[Item] = [
                {"text": short},
                {"images": [image]},
                {"text": short, "images": [image]},
                {"text": short, "images": [image, other]},
            ]
            items.append(kinds[i % 4])
    return items


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def embed(served: Served, case: Case, items: Sequence[Item], **parameters: object) -> Answer:
    """Send one request with TEXT, and with IMAGE if the family accepts images."""
    inputs = {"TEXT": np.array([[item.get("text", "").encode()] for item in items], dtype=np.object_)}
    if takes_images(case):
        width = max(1, *(len(item.get("images", ())) for item in items), 1)
        files = [[png(image) for image in item.get("images", ())] for item in items]
        inputs["IMAGE"] = np.array([row + [b""] * (width - len(row)) for row in files], dtype=np.object_)
    return infer(served, case, inputs, parameters)


def infer(served: Served, case: Case, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, object]) -> Answer:
    """Send a request to the case: over HTTP and over gRPC, if tritonserver serves it."""
    if case.name in served.loaded:
        return compute(served.loaded[case.name], inputs, parameters)
    over_http, over_grpc = (
        send(module, address, case.name, inputs, parameters)
        for module, address in ((tritonclient.http, served.triton.http), (tritonclient.grpc, served.triton.grpc))
    )
    np.testing.assert_allclose(over_http.vectors, over_grpc.vectors, atol=2e-6)
    assert (over_http.tokens, over_http.dropped) == (over_grpc.tokens, over_grpc.dropped)
    return over_http


def send(
    module: Any, address: str, model: str, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, object]
) -> Answer:
    """Send a request with a client of tritonclient's `module`."""
    client = module.InferenceServerClient(address)
    tensors = []
    for name, values in inputs.items():
        kind = "BYTES" if values.dtype == np.object_ else "INT32"
        tensors.append(module.InferInput(name, list(values.shape), kind))
        tensors[-1].set_data_from_numpy(values)
    try:
        result = client.infer(model, tensors, parameters=dict(parameters) or None)
    finally:
        client.close()
    tokens, dropped = (result.as_numpy(name)[:, 0].tolist() for name in ("TOKENS", "DROPPED"))
    return Answer(result.as_numpy("EMBEDDING"), tokens, dropped)


def compute(family: Family, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, object]) -> Answer:
    """Compute the answer of a request in this process, with the classes that EmbeddingServer uses."""
    processor = family.processor
    rows: IdRows | ItemRows
    if "INPUT_IDS" in inputs:
        rows = IdRows(processor, parameters, inputs["INPUT_IDS"])
    else:
        rows = ItemRows(processor, parameters, inputs["TEXT"], inputs.get("IMAGE"), limit=300_000)
        with ThreadPoolExecutor(1) as pool:
            rows.decode_images(pool)
    rows.set_ids(iter(processor.tokenizer.encode(rows.texts())))
    rows.make_rows(family.serving.max_request_tokens)
    dims = int(str(parameters.get("dimensions", family.model.dimensions)))
    vectors = rows.embeddings(family.embedder.embed(rows.rows, [dims] * len(rows.rows))[:, :dims], dims)
    return Answer(vectors, rows.tokens()[:, 0].tolist(), rows.dropped()[:, 0].tolist())


def takes_images(case: Case) -> bool:
    return parameters_of(case.family)["model_types"] in ("clip", "qwen2_vl")


def takes_chat(case: Case) -> bool:
    return parameters_of(case.family)["model_types"] == "qwen2_vl"


def assert_same(answer: Answer, expected: Answer) -> None:
    assert answer.vectors.dtype == np.float32
    assert answer.vectors.shape == expected.vectors.shape
    errors = np.abs(answer.vectors - expected.vectors).max(1).tolist()
    ERRORS.extend(errors)
    assert errors == pytest.approx([0] * len(errors), abs=2e-5)
    assert (answer.vectors * expected.vectors).sum(1).min() >= 0.999999
    assert all(b is None or a == b for a, b in zip(answer.tokens, expected.tokens, strict=True))
    assert answer.dropped == expected.dropped


def row(answer: Answer, i: int) -> Answer:
    return Answer(answer.vectors[i : i + 1], answer.tokens[i : i + 1], answer.dropped[i : i + 1])


def test_every_family_has_a_tiny_checkpoint() -> None:
    assert {case.family for case in CASES} == set(FAMILIES)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [True, False])
def test_oracle_of_gte_applies_is_causal(causal: bool, attention: str, tmp_path: Path) -> None:
    """Compare the hidden states with those of transformers under an explicit mask."""
    directory = write_decoder(tmp_path / "tiny", "qwen2", is_causal=causal)
    ids = torch.tensor([[5, 9, 7, 7, 31, 8]])
    network = Qwen2Model.from_pretrained(directory, attn_implementation=attention).eval()
    visible = torch.ones(6, 6).tril() if causal else torch.ones(6, 6)
    mask = torch.zeros(1, 1, 6, 6).masked_fill(visible == 0, -1e9)
    with torch.inference_mode():
        expected = network(ids, attention_mask=mask).last_hidden_state[0, 3:]
    states = torch.stack(oracles.hidden_states(directory, [ids[0].tolist()]))[0, 3:]
    assert (states - expected).abs().max() <= 2e-5


@for_each_case
def test_mixed_batch_of_32(served: Served, case: Case) -> None:
    items = items_of(case.family)
    assert len(items) == 32
    assert_same(embed(served, case, items), served.oracle(case))


@for_each_case
def test_each_row_alone(served: Served, case: Case) -> None:
    for i, item in enumerate(items_of(case.family)):
        assert_same(embed(served, case, [item]), row(served.oracle(case), i))


@for_each_case
def test_truncated_dimensions_are_normalized_again(served: Served, case: Case) -> None:
    full = served.oracle(case)
    size = full.vectors.shape[1] // 3
    truncated = full.vectors[:, :size]
    expected = truncated / np.linalg.norm(truncated, axis=1, keepdims=True)
    vectors = embed(served, case, items_of(case.family), dimensions=size).vectors
    ERRORS.extend(np.abs(vectors - expected).max(1).tolist())
    # A truncated vector is shorter than 1; dividing by its length enlarges the error.
    assert np.abs(vectors - expected).max() <= 2e-5 / np.linalg.norm(truncated, axis=1).min()
    assert np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max() <= 1e-6


@for_each_case
def test_instruction_is_applied_or_refused(served: Served, case: Case) -> None:
    instruction, items = "Find the cat: ", items_of(case.family)[:8]
    if not takes_chat(case) and case.family not in INSTRUCTION_PROMPTS:
        with pytest.raises(REFUSED, match="takes no instruction"):
            embed(served, case, items, instruction=instruction)
        return
    prompt = INSTRUCTION_PROMPTS.get(case.family, "{text}").replace("{instruction}", instruction)
    expected = prompted_answer(served, case, items, instruction, prompt)
    assert_same(embed(served, case, items, instruction=instruction), expected)


@for_each_case
def test_named_prompts_of_the_checkpoint_are_applied(served: Served, case: Case) -> None:
    items, file = items_of(case.family)[:4], served.directories[case.name] / "config_sentence_transformers.json"
    if not file.is_file():
        with pytest.raises(REFUSED, match="has no prompt_name 'query'"):
            embed(served, case, items, prompt_name="query")
        return
    prompts = json.loads(file.read_text())["prompts"]
    assert prompts
    for name, prompt in prompts.items():
        expected = prompted_answer(served, case, items, prompt, prompt + "{text}")
        assert_same(embed(served, case, items, prompt_name=name), expected)


def prompted_answer(served: Served, case: Case, items: Sequence[Item], instruction: str, prompt: str) -> Answer:
    """Return the expected answer with an instruction inside the chat template, or else with a prompt around texts."""
    if takes_chat(case):
        items, prompt = [{**item, "instruction": instruction} for item in items], "{text}"
    return expected_answer(case, served.directories[case.name], items, prompt)


@for_each_case
def test_token_ids_are_used_unchanged(served: Served, case: Case) -> None:
    """Send rows of ids up to the maximum length of the model."""
    random, directory = np.random.default_rng(2), served.directories[case.name]
    lengths = [2, case.limit, 5, 9, case.limit - 1]
    rows = [random.integers(5, 50, length).tolist() for length in lengths]  # no special tokens
    if oracles.model_type(directory) == "clip":  # pools the end-of-text token
        rows = [[*ids[:-1], oracles.token_ids(directory, ["a"])[0][-1]] for ids in rows]
    padded = np.full((len(rows), case.limit), -1, dtype=np.int32)
    for i, ids in enumerate(rows):
        padded[i, : len(ids)] = ids
    expected = Answer(vectors_of(directory, rows), lengths, [0] * len(rows))
    assert_same(infer(served, case, {"INPUT_IDS": padded}, {}), expected)
