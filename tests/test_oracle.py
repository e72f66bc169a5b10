"""transformers and sentence-transformers as `verify` asks them, against the tests' own way of asking."""

import io
import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import psutil
import pytest
from checkpoints import CASES, Case
from PIL import Image
from safetensors.torch import load_file, save_file
from test_model_info import INFO

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
ENDS = {"e5_mistral": "</s>", "gte_qwen2": "<|endoftext|>"}
TOKENS = (4, 16)


def facts(directory: Path, pooling: str = "last", limit: int = 100, positions: str = "mrope") -> CheckpointFacts:
    family = json.loads((directory / "config.json").read_text())["model_type"]
    info = replace(INFO, family=family, pooling=pooling, max_model_len=limit)
    return CheckpointFacts(directory, info, positions, TOKENS)


def case(name: str) -> Case:
    return next(one for one in CASES if one.name == name)


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() < 1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "e5_mistral-mistral-window",
        "e5_mistral-llama-dynamic",
        "gte_qwen2-bidirectional",
        "gte_qwen2-causal-fp16",
        "qwen3_embedding-tied-bf16",
    ],
)
def test_decoders_by_their_last_token(tmp_path: Path, name: str) -> None:
    chosen = case(name)
    directory = chosen.write(tmp_path / "checkpoint")
    rows = oracles.ids_of(directory, TEXTS, ENDS.get(chosen.family, ""), chosen.limit)
    assert max(map(len, rows)) == chosen.limit  # one is cut, and keeps its end
    found = compute(facts(directory, limit=chosen.limit), TEXTS, [])
    assert found.library.startswith("transformers 5.")
    assert same(found.texts, oracles.decoder_vectors(directory, rows))
    assert found.images.size == 0


@pytest.mark.parametrize("name", ["bge-e5-mean", "bge-m3", "bge-bert-mean"])
@pytest.mark.parametrize("modules", [True, False])
def test_encoders_by_sentence_transformers_or_by_their_pooling(tmp_path: Path, name: str, modules: bool) -> None:
    chosen = case(name)
    directory = chosen.write(tmp_path / "checkpoint")
    if not modules:
        (directory / "modules.json").unlink(missing_ok=True)
    listed = (directory / "modules.json").is_file()
    assert listed == (modules and name != "bge-bert-mean")
    pooling = chosen.parameters["pooling"]
    texts = [text for text in TEXTS if len(text) < 60]
    wanted = oracles.encoder_vectors(directory, oracles.ids_of(directory, texts), pooling)
    found = compute(facts(directory, pooling), texts, [])
    assert found.library.startswith("sentence-transformers" if listed else "transformers")
    assert same(found.texts, wanted)


def test_a_default_prompt_is_not_put_before_texts(tmp_path: Path) -> None:
    directory = case("bge-m3").write(tmp_path / "checkpoint")
    plain = compute(facts(directory, "cls"), ["a cat"], []).texts
    file = directory / "config_sentence_transformers.json"
    stated = json.loads(file.read_text()) | {"prompts": {"query": "a dog: "}, "default_prompt_name": "query"}
    file.write_text(json.dumps(stated))
    assert same(compute(facts(directory, "cls"), ["a cat"], []).texts, plain)


def test_clip_by_both_towers(tmp_path: Path) -> None:
    chosen = case("clip-short-fp16")
    directory = chosen.write(tmp_path / "checkpoint")
    files = list(samples.images())
    found = compute(facts(directory, limit=chosen.limit), TEXTS, files)
    rows = oracles.ids_of(directory, TEXTS, limit=chosen.limit)
    assert same(found.texts, oracles.clip_text_vectors(directory, rows))
    assert same(found.images, oracles.clip_image_vectors(directory, [Image.open(io.BytesIO(one)) for one in files]))


@pytest.mark.parametrize("name", ["gme_qwen2_vl-hub", "gme_qwen2_vl-hub-sequential"])
def test_gme_in_its_template(tmp_path: Path, name: str) -> None:
    chosen = case(name)
    directory = chosen.write(tmp_path / "checkpoint")
    files = list(samples.images())
    positions = chosen.parameters["image_positions"]
    found = compute(facts(directory, limit=chosen.limit, positions=positions), TEXTS[:3], files)
    items = [{"text": text} for text in TEXTS[:3]] + [{"images": [Image.open(io.BytesIO(one))]} for one in files]
    wanted = oracles.gme_vectors(directory, oracles.gme_inputs(directory, items, *TOKENS), positions)
    assert same(found.texts, wanted[:3])
    assert same(found.images, wanted[3:])
    other = {"mrope": "sequential", "sequential": "mrope"}[positions]
    assert not same(compute(facts(directory, positions=other), TEXTS[:1], files).images, wanted[3:])


def test_a_missing_tensor_is_not_made_up(tmp_path: Path) -> None:
    directory = case("qwen3_embedding-bare").write(tmp_path / "checkpoint")
    tensors = load_file(directory / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(OracleError, match=r"transformers finds no layers\.1\.mlp\.up_proj\.weight"):
        compute(facts(directory), TEXTS, [])


def test_too_little_memory_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = case("qwen3_embedding-tied-bf16").write(tmp_path / "checkpoint")
    size = 2 * (directory / "model.safetensors").stat().st_size  # bfloat16 in the file
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(size - 1))
    with pytest.raises(OracleError, match=r"in float32 it takes .* GB of memory"):
        compute(facts(directory), TEXTS, [])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(size + 1))
    assert len(compute(facts(directory), TEXTS, []).texts) == len(TEXTS)


@pytest.mark.parametrize("lacking", ["torch", "transformers"])
def test_a_library_that_is_not_installed_is_named(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "find_spec", lambda name: None if name == lacking else object())
    with pytest.raises(OracleError, match=f"^{lacking} is not installed$"):
        compute(facts(MINILM, "mean"), TEXTS, [])


def test_without_sentence_transformers_dense_cannot_be_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = case("bge-m3").write(tmp_path / "checkpoint")
    monkeypatch.setattr(oracle, "find_spec", lambda name: None if name == "sentence_transformers" else object())
    plain = compute(facts(directory, "cls"), TEXTS[:3], [])
    assert plain.library.startswith("transformers")
    modules = json.loads((directory / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (directory / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(OracleError, match="Dense"):
        compute(facts(directory, "cls"), TEXTS, [])


def test_another_network_cannot_be_judged() -> None:
    strange = facts(MINILM)
    info = replace(strange.info, family="mamba")
    with pytest.raises(OracleError, match="'mamba'"):
        compute(CheckpointFacts(MINILM, info, "mrope", TOKENS), TEXTS, [])
