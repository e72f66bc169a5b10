"""Every family against transformers: 43 tiny checkpoints, served by the real tritonserver, asked over HTTP and gRPC."""

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
from checkpoints import CASES, CORPUS, FAMILIES, Case, write_decoder
from PIL import Image
from test_ops import one_thread  # noqa: F401 - applies to every test here
from transformers import Qwen2Model
from tritonclient.utils import InferenceServerException

from conftest import REPOSITORY, Triton
from triton_embed.python_backend.checkpoint import repository

Item = Mapping[str, Any]

WORDS = (1, 90, 2, 3, 3, 3, 13, 1, 5, 8, 21, 34, 55, 2, 4, 6, 1, 1, 9, 27, 40, 7, 7, 7, 7, 30, 2, 11, 16, 32, 18, 3)
SIZES = ((60, 40), (24, 130), (150, 37), (48, 48), (70, 71), (9, 33), (200, 180), (31, 30))  # width, height in pixels
# What official code puts behind a text although the tokenizer does not.
ENDS = {"e5_mistral": "</s>", "gte_qwen2": "<|endoftext|>"}
PROMPTS = {
    "bge": "{instruction}{text}",
    "e5_mistral": "Instruct: {instruction}\nQuery: {text}",
    "gte_qwen2": "Instruct: {instruction}\nQuery: {text}",
    "qwen3_embedding": "Instruct: {instruction}\nQuery:{text}",
}
MULTIMODAL = ("clip", "gme_qwen2_vl")
ODD = ("zebra", "Ωmega", "emoji🙂", "日本語", "x\ty", "two  spaces", "A\nB", "3.14", "'s")
EXTRA = "<cat-toy>"  # a token of some CLIPs


ERRORS: list[float] = []  # of the running test: the largest of each vector's values


@dataclass
class Answer:
    """Vectors [n,d], tokens [n] (None: it does not matter how many) and tokens cut off [n]."""

    vectors: np.ndarray
    tokens: list[int | None]
    dropped: list[int]


@dataclass
class Served:
    """All cases of a family behind one tritonserver, each with transformers' answer to `items_of` its family."""

    triton: Triton
    directories: Mapping[str, Path]
    expected: dict[str, Answer] = field(default_factory=dict)

    def oracle(self, case: Case) -> Answer:
        if case.name not in self.expected:
            self.expected[case.name] = expected(case, self.directories[case.name], items_of(case.family))
        return self.expected[case.name]


class Servers:
    """One tritonserver at a time, over all the cases of a family; the one before ends meanwhile."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._family = ""
        self._served: Served | None = None
        self._broken: dict[str, Exception] = {}
        self._ending = ThreadPoolExecutor(1)
        self._ended: list[Future[None]] = []

    def of(self, family: str) -> Served:
        if family in self._broken:  # waiting for it once is enough
            raise self._broken[family]
        if self._served is None or family != self._family:
            self._end()
            try:
                self._family, self._served = family, self._start(family)
            except Exception as error:
                self._broken[family] = error
                raise
        return self._served

    def _start(self, family: str) -> Served:
        root = self._factory.mktemp(family)
        directories = {}
        for case in CASES:
            if case.family == family:
                directories[case.name] = case.write(root / "checkpoints" / case.id)
                parameters = {"threads": "1", "is_matryoshka": "true", **case.parameters}
                parameters["checkpoint"] = str(directories[case.name])
                repository.write_model(REPOSITORY, case.family, root / "models", case.name, parameters)
        return Served(Triton(root / "models", root / "log"), directories)

    def _end(self) -> None:
        if self._served is not None:
            self._ended.append(self._ending.submit(self._served.triton.stop))
        self._served = None

    def stop(self) -> None:
        self._end()
        for ended in self._ended:
            ended.result()
        self._ending.shutdown()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    made = Servers(tmp_path_factory)
    yield made
    made.stop()


@pytest.fixture
def served(servers: Servers, case: Case) -> Served:
    return servers.of(case.family)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, list[float]]]]:
    """family -> check -> errors; printed when all have run."""
    found: dict[str, dict[str, list[float]]] = {}
    yield found
    checks = list(dict.fromkeys(check for row in found.values() for check in row))
    lines = ["| largest difference from transformers float32 | checkpoints | " + " | ".join(checks) + " |"]
    lines.append("|---" * (len(checks) + 2) + "|")
    for family, row in sorted(found.items()):
        cells = [f"{max(row[check]):.1e} ({len(row[check])})" if row.get(check) else "–" for check in checks]
        count = sum(case.family == family for case in CASES)
        lines.append(f"| `{family}` | {count} | " + " | ".join(cells) + " |")
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        plugins.getplugin("terminalreporter").write_line("\n\n" + "\n".join(lines))


@pytest.fixture(autouse=True)
def figures(request: pytest.FixtureRequest, table: dict[str, dict[str, list[float]]]) -> Iterator[None]:
    ERRORS.clear()
    yield
    if ERRORS:
        check = request.function.__name__.removeprefix("test_").replace("_", " ")
        table.setdefault(request.getfixturevalue("case").family, {}).setdefault(check, []).extend(ERRORS)


# Of module scope, so that all tests of a case run one after the other, and all cases of a family.
for_each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES], scope="module")


def texts() -> list[str]:
    """32 texts, 1 to 90 words long: known words, unknown ones, other scripts, odd spaces."""
    words = [*" ".join(CORPUS).split(), *ODD]
    random = np.random.default_rng(0)
    found = [" ".join(random.choice(words, count)) for count in WORDS]
    found[6] += f" {EXTRA} {found[2]}"
    return found


def pictures() -> list[Image.Image]:
    """Of every aspect ratio in SIZES: gradients with noise on them."""
    random = np.random.default_rng(1)
    found = []
    for width, height in SIZES:
        y, x = np.mgrid[:height, :width]
        smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=2)
        noisy = smooth + random.normal(0, 40, smooth.shape)
        found.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return found


def items_of(family: str) -> list[Item]:
    """32 rows of all modalities the family has, mixed."""
    images = pictures()
    if family not in MULTIMODAL:
        return [{"text": text} for text in texts()]
    items: list[Item] = []
    for i, text in enumerate(texts()):
        image, other = images[i % len(images)], images[(3 * i + 1) % len(images)]
        if family == "clip":
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


def expected(case: Case, directory: Path, items: Sequence[Item], prompt: str = "{text}") -> Answer:
    """What transformers says to these items, each alone; `prompt` is put around a text."""
    if case.family == "gme_qwen2_vl":
        low, high = (int(case.parameters[f"{end}_image_tokens"]) for end in ("min", "max"))
        inputs = list(oracles.gme_inputs(directory, items, low, high))
        lengths = [one["input_ids"].shape[1] for one in inputs]
        assert max(lengths) <= case.limit
        vectors = oracles.gme_vectors(directory, inputs, case.parameters["image_positions"])
        return Answer(vectors, lengths, [0] * len(items))
    asked = [prompt.replace("{text}", item["text"]) for item in items if "text" in item]
    whole = oracles.ids_of(directory, asked, ENDS.get(case.family, ""))
    rows = oracles.ids_of(directory, asked, ENDS.get(case.family, ""), case.limit)
    dropped = [len(uncut) - len(ids) for uncut, ids in zip(whole, rows, strict=True)]
    if case.family != "clip":
        return Answer(vectors_of(case, directory, rows), [len(ids) for ids in rows], dropped)
    # Whether tokens behind the pooled one are computed is the server's affair.
    tokens = [None if EXTRA in text else len(ids) for text, ids in zip(asked, rows, strict=True)]
    by_text = Answer(vectors_of(case, directory, rows), tokens, dropped)
    images = [item["images"][0] for item in items if "images" in item]
    patches = [oracles.clip_image_tokens(directory)] * len(images)
    by_image = Answer(oracles.clip_image_vectors(directory, images), patches, [0] * len(images))
    return interleave(by_text, by_image, ["images" in item for item in items])


def interleave(first: Answer, second: Answer, from_second: Sequence[bool]) -> Answer:
    """The rows of two answers as one."""
    order = np.argsort(np.argsort(np.array(from_second), kind="stable"), kind="stable")
    tokens, dropped = [*first.tokens, *second.tokens], [*first.dropped, *second.dropped]
    vectors = np.concatenate([first.vectors, second.vectors])[order]
    return Answer(vectors, [tokens[i] for i in order], [dropped[i] for i in order])


def vectors_of(case: Case, directory: Path, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """transformers' vectors of token ids."""
    if case.family == "bge":
        return oracles.encoder_vectors(directory, rows, case.parameters.get("pooling", "cls"))
    if case.family == "clip":
        return oracles.clip_text_vectors(directory, rows)
    if case.family == "gme_qwen2_vl":
        return oracles.gme_vectors(directory, [{"input_ids": torch.tensor([ids])} for ids in rows])
    return oracles.decoder_vectors(directory, rows)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def ask(served: Served, case: Case, items: Sequence[Item], **parameters: object) -> Answer:
    """One request, TEXT and IMAGE as the family takes them."""
    inputs = {"TEXT": np.array([[item.get("text", "").encode()] for item in items], dtype=np.object_)}
    if case.family in MULTIMODAL:
        width = max(1, *(len(item.get("images", ())) for item in items), 1)
        files = [[png(image) for image in item.get("images", ())] for item in items]
        inputs["IMAGE"] = np.array([row + [b""] * (width - len(row)) for row in files], dtype=np.object_)
    return infer(served, case, inputs, parameters)


def infer(served: Served, case: Case, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, object]) -> Answer:
    """Over HTTP for every second case, over gRPC for the others."""
    over_http = CASES.index(case) % 2 == 0
    module: Any = tritonclient.http if over_http else tritonclient.grpc
    client = module.InferenceServerClient(served.triton.http if over_http else served.triton.grpc)
    sent = []
    for name, values in inputs.items():
        kind = "BYTES" if values.dtype == np.object_ else "INT32"
        sent.append(module.InferInput(name, list(values.shape), kind))
        sent[-1].set_data_from_numpy(values)
    try:
        found = client.infer(case.name, sent, parameters=dict(parameters) or None)
    finally:
        client.close()
    tokens, dropped = (found.as_numpy(name)[:, 0].tolist() for name in ("TOKENS", "DROPPED"))
    return Answer(found.as_numpy("EMBEDDING"), tokens, dropped)


def assert_same(found: Answer, wanted: Answer) -> None:
    assert found.vectors.dtype == np.float32
    assert found.vectors.shape == wanted.vectors.shape
    ERRORS.extend(np.abs(found.vectors - wanted.vectors).max(1).tolist())
    assert np.abs(found.vectors - wanted.vectors).max(1).tolist() == pytest.approx([0] * len(wanted.vectors), abs=2e-5)
    assert (found.vectors * wanted.vectors).sum(1).min() >= 0.999999
    assert all(b is None or a == b for a, b in zip(found.tokens, wanted.tokens, strict=True))
    assert found.dropped == wanted.dropped


def row(answer: Answer, i: int) -> Answer:
    return Answer(answer.vectors[i : i + 1], answer.tokens[i : i + 1], answer.dropped[i : i + 1])


def test_every_family_has_six_cases() -> None:
    assert all(sum(case.family == family for case in CASES) >= 6 for family in FAMILIES)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [True, False])
def test_transformers_itself_goes_by_is_causal(causal: bool, attention: str, tmp_path: Path) -> None:
    """The oracle of GTE, against transformers under an explicit mask."""
    directory = write_decoder(tmp_path / "tiny", "qwen2", is_causal=causal)
    ids = torch.tensor([[5, 9, 7, 7, 31, 8]])
    network = Qwen2Model.from_pretrained(directory, attn_implementation=attention).eval()
    visible = torch.ones(6, 6).tril() if causal else torch.ones(6, 6)
    mask = torch.zeros(1, 1, 6, 6).masked_fill(visible == 0, -1e9)
    with torch.inference_mode():
        wanted = network(ids, attention_mask=mask).last_hidden_state[0, 3:]
    found = torch.stack(oracles.decoder_states(directory, [ids[0].tolist()]))[0, 3:]
    assert (found - wanted).abs().max() <= 2e-5


@for_each_case
def test_a_mixed_batch_of_32(served: Served, case: Case) -> None:
    items = items_of(case.family)
    assert len(items) == 32
    assert_same(ask(served, case, items), served.oracle(case))


@for_each_case
def test_each_row_alone(served: Served, case: Case) -> None:
    for i, item in enumerate(items_of(case.family)):
        assert_same(ask(served, case, [item]), row(served.oracle(case), i))


@for_each_case
def test_a_smaller_size_is_cut_and_normalised_again(served: Served, case: Case) -> None:
    whole = served.oracle(case)
    size = whole.vectors.shape[1] // 3
    cut = whole.vectors[:, :size]
    vectors = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    found = ask(served, case, items_of(case.family), dimensions=size)
    ERRORS.extend(np.abs(found.vectors - vectors).max(1).tolist())
    # What the cut leaves is short, and dividing by its length makes an error larger.
    assert np.abs(found.vectors - vectors).max() <= 2e-5 / np.linalg.norm(cut, axis=1).min()
    assert np.abs(np.linalg.norm(found.vectors.astype(np.float64), axis=1) - 1).max() <= 1e-6


@for_each_case
def test_an_instruction(served: Served, case: Case) -> None:
    instruction, items = "Find the cat: ", items_of(case.family)[:8]
    if case.family == "clip":
        with pytest.raises(InferenceServerException, match="takes no instruction"):
            ask(served, case, items, instruction=instruction)
        return
    if case.family == "gme_qwen2_vl":
        wanted = expected(case, served.directories[case.name], [{**item, "instruction": instruction} for item in items])
    else:
        wanted = expected(
            case, served.directories[case.name], items, PROMPTS[case.family].replace("{instruction}", instruction)
        )
    assert_same(ask(served, case, items, instruction=instruction), wanted)


@for_each_case
def test_a_named_prompt(served: Served, case: Case) -> None:
    items = items_of(case.family)[:4]
    if case.family == "clip":
        with pytest.raises(InferenceServerException, match="has no prompt_name 'query'"):
            ask(served, case, items, prompt_name="query")
        return
    prompts = json.loads((served.directories[case.name] / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts
    for name, prompt in prompts.items():
        if case.family == "gme_qwen2_vl":
            wanted = expected(case, served.directories[case.name], [{**item, "instruction": prompt} for item in items])
        else:
            wanted = expected(case, served.directories[case.name], items, prompt + "{text}")
        assert_same(ask(served, case, items, prompt_name=name), wanted)


@for_each_case
def test_token_ids(served: Served, case: Case) -> None:
    """Used as they are, up to the longest row that the model takes."""
    random, directory = np.random.default_rng(2), served.directories[case.name]
    lengths = [2, case.limit, 5, 9, case.limit - 1]
    rows = [random.integers(5, 50, length).tolist() for length in lengths]  # special in no vocabulary
    if case.family == "clip":  # pools the end-of-text token, wherever it is
        rows = [[*ids[:-1], oracles.ids_of(directory, ["a"])[0][-1]] for ids in rows]
    padded = np.full((len(rows), case.limit), -1, dtype=np.int32)
    for i, ids in enumerate(rows):
        padded[i, : len(ids)] = ids
    wanted = Answer(vectors_of(case, directory, rows), lengths, [0] * len(rows))
    assert_same(infer(served, case, {"INPUT_IDS": padded}, {}), wanted)
