"""The oracle of `verify` and the tests, against sentence-transformers and against other ways to call transformers."""

import io
import json
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from checkpoints import CASES, Case
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from test_model_info import INFO
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from conftest import MINILM
from triton_embed.gateway.verify import oracle, samples
from triton_embed.gateway.verify.oracle import CheckpointFacts, OracleError, compute

TEXTS = [
    "a",
    "Hello world",
    "你好，世界 👍",
    "the quick brown fox jumps over " * 8 + "again",
    "qwertyuiop zxcvbnm 12345 qwertz",
]
TOKENS = (4, 16)
# gme_inference.py of https://huggingface.co/Alibaba-NLP/gme-Qwen2-VL-2B-Instruct
GME_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nUSER<|im_end|>\n"
    "<|im_start|>assistant\n<|endoftext|>"
)
LAST_TOKENS = {  # the token that the official code of each model puts last
    "e5_mistral-mistral-window": "</s>",
    "e5_mistral-llama3": "</s>",
    "gte_qwen2-bidirectional": "<|endoftext|>",
    "gte_qwen2-causal-fp16": "<|endoftext|>",
    "qwen3_embedding-tied-bf16": "<|endoftext|>",
}


def facts(directory: Path, pooling: str = "last", limit: int = 100, positions: str = "mrope") -> CheckpointFacts:
    family = json.loads((directory / "config.json").read_text())["model_type"]
    info = replace(INFO, family=family, pooling=pooling, max_model_len=limit)
    return CheckpointFacts(directory, info, positions, TOKENS)


def find_case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() < 1e-6)


def encode(directory: Path, texts: Sequence[str]) -> np.ndarray:
    """Return the vectors of sentence-transformers, which reads pooling and tokenizer from the checkpoint."""
    network = SentenceTransformer(str(directory), device="cpu", model_kwargs={"dtype": torch.float32})
    network.tokenizer.pad_token = network.tokenizer.pad_token or network.tokenizer.eos_token  # Llama has none
    return network.encode(list(texts), prompt="", batch_size=1, normalize_embeddings=True)


@pytest.mark.parametrize("name", LAST_TOKENS)
def test_decoder_vectors_equal_sentence_transformers(tmp_path: Path, name: str) -> None:
    """Compare short texts. sentence-transformers does not append the last token, so it is part of the text."""
    case = find_case(name)
    directory = case.write(tmp_path / "checkpoint")
    texts = [text for text in TEXTS if len(text) < 60]
    result = compute(facts(directory, limit=case.limit), texts, [])
    assert result.library.startswith("transformers 5.")
    assert result.images.size == 0
    end = "" if case.family == "qwen3_embedding" else LAST_TOKENS[name]  # Qwen3's tokenizer appends it
    assert same(result.texts, encode(directory, [text + end for text in texts]))


@pytest.mark.parametrize("name", LAST_TOKENS)
def test_truncated_text_keeps_its_last_token(tmp_path: Path, name: str) -> None:
    case = find_case(name)
    directory = case.write(tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    last = tokenizer.convert_tokens_to_ids(LAST_TOKENS[name])
    full, rows = oracle.token_ids(directory, TEXTS), oracle.token_ids(directory, TEXTS, case.limit)
    assert max(map(len, full)) > max(map(len, rows)) == case.limit
    for uncut, ids in zip(full, rows, strict=True):
        assert (uncut[-1], ids[-1]) == (last, last)
        assert ids[:-1] == uncut[: len(ids) - 1]
        assert last not in ids[:-1]
    plain = oracle.token_ids(directory, TEXTS, append_end=False)
    assert plain == [tokenizer(text)["input_ids"] for text in TEXTS]
    vectors = oracle.pooled_vectors(directory, rows, "last")
    assert same(compute(facts(directory, limit=case.limit), TEXTS, []).texts, vectors)


def test_vectors_do_not_depend_on_longer_rows(tmp_path: Path) -> None:
    """Check dynamic RoPE, for which transformers keeps the length of the longest row."""
    directory = find_case("e5_mistral-llama-dynamic").write(tmp_path / "checkpoint")
    rows = oracle.token_ids(directory, ["the cat " * 40, "the cat " * 9, "a", "the dog " * 20])
    alone = [oracle.pooled_vectors(directory, [row], "last") for row in rows]
    assert same(oracle.pooled_vectors(directory, rows, "last"), np.concatenate(alone))


@pytest.mark.parametrize("name", ["bge-e5-mean", "bge-m3", "bge-bert-mean"])
@pytest.mark.parametrize("modules", [True, False])
def test_encoder_vectors_equal_sentence_transformers(tmp_path: Path, name: str, modules: bool) -> None:
    case = find_case(name)
    directory = case.write(tmp_path / "checkpoint")
    pooling, texts = case.parameters["pooling"], [text for text in TEXTS if len(text) < 60]
    if name == "bge-bert-mean":
        pool = Pooling(36, pooling_mode=pooling)
        network = SentenceTransformer(modules=[Transformer(str(directory)), pool], device="cpu")
        theirs = network.encode(texts, prompt="", batch_size=1, normalize_embeddings=True)
    else:
        theirs = encode(directory, texts)
    if not modules:
        (directory / "modules.json").unlink(missing_ok=True)
    has_modules = (directory / "modules.json").is_file()
    assert has_modules == (modules and name != "bge-bert-mean")
    result = compute(facts(directory, pooling), texts, [])
    assert result.library.startswith("sentence-transformers" if has_modules else "transformers")
    assert same(result.texts, theirs)
    assert same(oracle.pooled_vectors(directory, oracle.token_ids(directory, texts), pooling), theirs)


def test_default_prompt_is_not_applied(tmp_path: Path) -> None:
    directory = find_case("bge-m3").write(tmp_path / "checkpoint")
    plain = compute(facts(directory, "cls"), ["a cat"], []).texts
    file = directory / "config_sentence_transformers.json"
    config = json.loads(file.read_text()) | {"prompts": {"query": "a dog: "}, "default_prompt_name": "query"}
    file.write_text(json.dumps(config))
    assert same(compute(facts(directory, "cls"), ["a cat"], []).texts, plain)


def test_clip_vectors_equal_one_padded_pass(tmp_path: Path) -> None:
    """Compare with one pass of CLIPModel over a padded batch of texts and all images."""
    case = find_case("clip-short-fp16")
    directory = case.write(tmp_path / "checkpoint")
    files = list(samples.images())
    result = compute(facts(directory, limit=case.limit), TEXTS, files)
    network = CLIPModel.from_pretrained(directory, dtype=torch.float32).eval()
    inputs = AutoTokenizer.from_pretrained(directory)(
        TEXTS, padding=True, truncation=True, max_length=case.limit, return_tensors="pt"
    )
    images = [Image.open(io.BytesIO(file)) for file in files]
    inputs |= CLIPImageProcessorPil.from_pretrained(directory)(images, return_tensors="pt")
    with torch.inference_mode():
        outputs = network(**inputs)
    assert same(result.texts, outputs.text_embeds.numpy())
    assert same(result.images, outputs.image_embeds.numpy())


@pytest.mark.parametrize("name", ["gme_qwen2_vl-hub", "gme_qwen2_vl-hub-sequential"])
def test_gme_vectors_equal_one_left_padded_pass(tmp_path: Path, name: str) -> None:
    """Compare with one pass over texts and images that are padded on the left, as GME's own code does."""
    case = find_case(name)
    directory = case.write(tmp_path / "checkpoint")
    files = list(samples.images())
    positions = case.parameters["image_positions"]
    result = compute(facts(directory, limit=case.limit, positions=positions), TEXTS[:3], files)
    processor = Qwen2VLImageProcessorPil.from_pretrained(directory, min_pixels=4 * 784, max_pixels=16 * 784)
    pixels = processor([Image.open(io.BytesIO(file)) for file in files], return_tensors="pt")
    image_tokens = [int(grid.prod()) // 4 for grid in pixels["image_grid_thw"]]
    users = [*TEXTS[:3], *(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in image_tokens)]
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    inputs = dict(tokenizer([GME_CHAT.replace("USER", user) for user in users], padding=True, return_tensors="pt"))
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    if positions == "sequential":
        counts = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = counts.expand(3, *counts.shape)
    network = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval().model
    with torch.inference_mode():
        last = network(**inputs, **pixels).last_hidden_state[:, -1]
    theirs = torch.nn.functional.normalize(last, dim=1).numpy()
    assert same(result.texts, theirs[:3])
    assert same(result.images, theirs[3:])
    other = {"mrope": "sequential", "sequential": "mrope"}[positions]
    assert not same(compute(facts(directory, positions=other), TEXTS[:1], files).images, theirs[3:])


def test_gme_template_contains_instruction_images_and_text() -> None:
    image = Image.new("RGB", (2, 2))
    expected = GME_CHAT.replace("You are a helpful assistant.", "Find it.").replace(
        "USER", "<|vision_start|><|image_pad|><|vision_end|>" * 2 + "a cat"
    )
    assert oracle.gme_text({"text": "a cat", "images": [image, image], "instruction": "Find it."}) == expected
    assert oracle.gme_text({"text": "{a} cat"}) == GME_CHAT.replace("USER", "{a} cat")


def test_missing_tensor_is_an_error(tmp_path: Path) -> None:
    directory = find_case("qwen3_embedding-bare").write(tmp_path / "checkpoint")
    tensors = load_file(directory / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(OracleError, match=r"transformers finds no layers\.1\.mlp\.up_proj\.weight"):
        compute(facts(directory), TEXTS, [])


def test_too_little_memory_is_an_error_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = find_case("qwen3_embedding-tied-bf16").write(tmp_path / "checkpoint")
    size = 2 * (directory / "model.safetensors").stat().st_size  # bfloat16 in the file
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(size - 1))
    with pytest.raises(OracleError, match=r"in float32 it takes .* GB of memory"):
        compute(facts(directory), TEXTS, [])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(size + 1))
    assert len(compute(facts(directory), TEXTS, []).texts) == len(TEXTS)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_missing_library_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(OracleError, match=f"^{missing} is not installed$"):
        compute(facts(MINILM, "mean"), TEXTS, [])


def test_dense_needs_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = find_case("bge-m3").write(tmp_path / "checkpoint")
    monkeypatch.setattr(oracle, "find_spec", lambda name: None if name == "sentence_transformers" else object())
    plain = compute(facts(directory, "cls"), TEXTS[:3], [])
    assert plain.library.startswith("transformers")
    modules = json.loads((directory / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (directory / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(OracleError, match="Dense"):
        compute(facts(directory, "cls"), TEXTS, [])


def test_unknown_model_type_is_an_error() -> None:
    info = replace(facts(MINILM).info, family="mamba")
    with pytest.raises(OracleError, match="'mamba'"):
        compute(CheckpointFacts(MINILM, info, "mrope", TOKENS), TEXTS, [])
