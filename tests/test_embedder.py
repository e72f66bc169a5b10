"""Vectors end to end, without a server: transformers for tiny checkpoints in every form a file may have and for any
mix of rows of every family, sentence-transformers for the real MiniLM and for Pooling and Dense modules.
Checkpoints that do not fit are caught by name.
"""

import ast
import json
import re
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import expected_answer, vectors_of
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from test_encoder import hidden_states, randomize_vectors, rows_of
from test_ops import one_thread  # noqa: F401 - applies to every test here
from test_vectors import items_of, png
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from conftest import MINILM, Family, serving, write_bert
from triton_embed.python_backend.errors import ConfigError, DeviceLostError
from triton_embed.python_backend.execution.embedder import Embedder
from triton_embed.python_backend.inputs.parameters import Item
from triton_embed.python_backend.inputs.row import Row
from triton_embed.python_backend.spec import EncoderSpec

Tiny = Callable[[str], Family]

MIXED = (1, 77, 2, 3, 3, 3, 13, 1, 5, 8, 21, 34, 55, 2, 4, 6, 1, 1, 9, 27, 61, 7, 7, 7, 7, 50, 2, 11, 16, 32, 64, 3)


def embedder(directory: Path, **operator: object) -> Embedder:
    return Embedder(EncoderSpec(), directory, serving(**{"threads": 1, **operator}))


def normalized(pooled: Sequence[Tensor]) -> np.ndarray:
    vectors = torch.stack(list(pooled)).double()
    return (vectors / vectors.norm(dim=1, keepdim=True)).numpy()


def bare(directory: Path) -> None:
    """Save a BertModel in one file in fp32."""
    randomize_vectors(directory)


def masked_lm(directory: Path) -> None:
    """Save a BertForMaskedLM: names begin with `bert.`, with a head and without a pooler."""
    torch.manual_seed(3)
    BertForMaskedLM(BertConfig.from_pretrained(directory)).save_pretrained(directory)
    stored = (directory / "model.safetensors").read_bytes()
    assert b"bert.encoder" in stored
    assert b"cls.predictions" in stored


def sharded(directory: Path) -> None:
    randomize_vectors(directory).save_pretrained(directory, max_shard_size="40KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    assert len(list(directory.glob("model-*.safetensors"))) > 3


def half(directory: Path) -> None:
    randomize_vectors(directory).to(torch.float16).save_pretrained(directory)


def brain(directory: Path) -> None:
    randomize_vectors(directory).to(torch.bfloat16).save_pretrained(directory)


FORMS = [
    # how it is stored, pooling, sizes
    (bare, "cls", {}),
    (bare, "mean", {"hidden_size": 36, "num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh"}),
    (bare, "mean", {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 61, "hidden_act": "silu"}),
    (bare, "cls", {"num_attention_heads": 20, "layer_norm_eps": 1e-3, "hidden_act": "relu"}),
    (masked_lm, "mean", {}),
    (masked_lm, "cls", {"hidden_size": 48, "type_vocab_size": 1}),
    (sharded, "cls", {}),
    (half, "mean", {}),
    (brain, "cls", {}),
]


@pytest.fixture(scope="module", params=range(len(FORMS)), ids=[f"{f.__name__} {p} {s}" for f, p, s in FORMS])
def form(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Embedder, list[Row], np.ndarray]:
    """Return our embedder, rows of ids, and transformers' vectors of them, computed one by one in float32."""
    store, pooling, sizes = FORMS[request.param]
    directory = write_bert(tmp_path_factory.mktemp("embedder") / "tiny", request.param, pooling, **sizes)
    store(directory)
    theirs = BertModel.from_pretrained(directory, add_pooling_layer=False, dtype=torch.float32).eval()
    rows = rows_of(MIXED, theirs.config.vocab_size)
    with torch.no_grad():
        states = hidden_states(theirs, rows)
    pooled = [state[0] if pooling == "cls" else state.mean(0) for state in states]
    return embedder(directory), rows, normalized(pooled)


def assert_same(actual: np.ndarray, expected_vectors: np.ndarray) -> None:
    assert actual.dtype == np.float32
    assert np.abs(actual - expected_vectors).max() <= 2e-5
    assert ((actual * expected_vectors).sum(1)).min() >= 0.999999


def test_mixed_batch_matches_transformers(form: tuple[Embedder, list[Row], np.ndarray]) -> None:
    ours, rows, expected_vectors = form
    assert len(rows) == 32
    assert_same(ours.embed(rows, [expected_vectors.shape[1]] * 32), expected_vectors)


@pytest.mark.parametrize("row", [0, 1, 3, 11])
def test_single_text_matches_transformers(row: int, form: tuple[Embedder, list[Row], np.ndarray]) -> None:
    ours, rows, expected_vectors = form
    assert_same(ours.embed([rows[row]], [expected_vectors.shape[1]]), expected_vectors[row : row + 1])


def test_rows_of_a_batch_may_have_different_dimensions(
    form: tuple[Embedder, list[Row], np.ndarray],
) -> None:
    ours, rows, expected_vectors = form
    dims = [1 + i for i in range(32)]
    for vector, size, full_vector in zip(ours.embed(rows, dims), dims, expected_vectors, strict=True):
        assert np.abs(vector[:size] - full_vector[:size] / np.linalg.norm(full_vector[:size])).max() <= 1e-4
        assert abs(np.linalg.norm(vector[:size].astype(np.float64)) - 1) <= 1e-6
        assert not vector[size:].any()


@dataclass
class Pool:
    """Rows of every kind a family takes, each with transformers' vector for it, computed alone."""

    ours: Family
    rows: list[Row]
    vectors: np.ndarray

    @classmethod
    def of(cls, name: str, ours: Family) -> "Pool":
        (case,) = [case for case in CASES if case.name == name]
        items = items_of(case.family)[:16]
        sent = [Item(i.get("text", ""), tuple(map(png, i.get("images", ())))) for i in items]
        rows, vectors = ours.rows(*sent), expected_answer(case, ours.directory, items).vectors
        # What a caller tokenised is the same row.
        typed = [i for i, row in enumerate(rows) if not row.images]
        rows += [ours.processor.row_from_ids(rows[i].ids, "end", i) for i in typed]
        vectors = np.concatenate([vectors, vectors[typed]])
        random = [row.ids for row in rows_of((1, 2, 9, 30, 66), ours.model.vocab_size - 20)]
        if case.family == "clip":
            random = [np.append(ids, ours.model.vocab_size - 1) for ids in random]  # the end of a text
        rows += [ours.processor.row_from_ids(ids.astype(np.int32), "none", i) for i, ids in enumerate(random)]
        vectors = np.concatenate([vectors, vectors_of(ours.directory, [ids.tolist() for ids in random])])
        return cls(ours, rows, vectors)


MIXABLE = (
    "bge-bert-cls",
    "bge-e5-mean",
    "e5_mistral-mistral-window",
    "e5_mistral-llama-dynamic",
    "gte_qwen2-bidirectional",
    "qwen3_embedding-bare",
    "clip-openai",
    "gme_qwen2_vl-hub",
)


@pytest.fixture(scope="module", params=MIXABLE)
def pool(request: pytest.FixtureRequest, tiny: Tiny) -> Pool:
    return Pool.of(request.param, tiny(request.param))


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_any_batch_equals_its_rows_alone(pool: Pool, data: st.DataObject) -> None:
    """Check the order of the vectors, and that truncation precedes normalization."""
    full = pool.vectors.shape[1]
    row, size = st.integers(0, len(pool.rows) - 1), st.integers(1, full) | st.just(full)
    picked = data.draw(st.lists(st.tuples(row, size), min_size=1, max_size=12))
    rows, dims = [pool.rows[i] for i, _ in picked], [size for _, size in picked]
    together = pool.ours.embedder.embed(rows, dims)
    assert together.shape == (len(rows), full)
    for vector, (i, size) in zip(together, picked, strict=True):
        cut = torch.from_numpy(pool.vectors[i][:size])
        expected_vectors = nn.functional.normalize(cut, dim=0).numpy()
        (alone,) = pool.ours.embedder.embed([pool.rows[i]], [size])
        for actual in (vector, alone):
            # What the cut leaves is short, and dividing by it makes an error larger.
            assert np.abs(actual[:size] - expected_vectors).max() <= 2e-5 / float(cut.norm())
            assert abs(np.linalg.norm(actual[:size].astype(np.float64)) - 1) <= 1e-6
            assert not actual[size:].any()


TEXTS = ["the cat sat", "hello world, the dog!", "x", "a long text about a dog and a cat " * 3, "3.14"]
# Pooling mode and Dense layers of (size, bias, activation).
CHAINS: list[tuple[str, list[tuple[int, bool, nn.Module | None]]]] = [
    ("max", [(24, True, nn.Tanh())]),
    ("mean", [(24, False, nn.Tanh())]),
    ("cls", [(80, True, None)]),
    ("lasttoken", [(33, False, None)]),
    ("mean", [(24, True, nn.Tanh()), (30, False, None)]),
    ("max", [(70, True, nn.GELU()), (5, True, nn.ReLU()), (44, True, nn.SiLU())]),
    ("max", []),
    ("lasttoken", []),
]


@pytest.fixture(scope="module")
def plain_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_bert(tmp_path_factory.mktemp("modules") / "tiny")
    randomize_vectors(directory)
    return directory


def write_modules(directory: Path, bert: Path, mode: str, chain: Sequence[tuple[int, bool, nn.Module | None]]) -> Path:
    """Save a model of sentence-transformers' modules around `bert`."""
    torch.manual_seed(0)
    sizes = [60, *(size for size, _, _ in chain)]
    dense = [
        modules.Dense(inputs, size, bias=bias, activation_function=activation)
        for inputs, (size, bias, activation) in zip(sizes, chain, strict=False)
    ]
    chained = [modules.Transformer(str(bert)), modules.Pooling(60, mode), *dense, modules.Normalize()]
    SentenceTransformer(modules=chained, device="cpu").save(str(directory))
    return directory


@pytest.mark.parametrize(("mode", "chain"), CHAINS, ids=[f"{m} {[c[0] for c in chain]}" for m, chain in CHAINS])
def test_modules_match_sentence_transformers(
    mode: str, chain: list[tuple[int, bool, nn.Module | None]], plain_bert: Path, tmp_path: Path
) -> None:
    directory = write_modules(tmp_path / "made", plain_bert, mode, chain)
    theirs = SentenceTransformer(str(directory), device="cpu")
    ours = Family("bge", directory, pooling={"lasttoken": "last"}.get(mode, mode))
    full = chain[-1][0] if chain else 60
    assert ours.model.dimensions == full
    rows, dims = ours.rows(*map(Item, TEXTS)), [full, 1, full // 2, 3, full - 1]
    actual = ours.embedder.embed(rows, [full] * len(rows))
    assert np.abs(actual - theirs.encode(TEXTS)).max() <= 2e-5
    cut = ours.embedder.embed(rows, dims)
    for text, vector, size in zip(TEXTS, cut, dims, strict=True):
        expected_vectors = theirs.encode(text, truncate_dim=size, normalize_embeddings=True)
        assert np.abs(vector[:size] - expected_vectors).max() <= 1e-4
        assert not vector[size:].any()


def change(directory: Path, file: str, **values: object) -> None:
    """Set keys of a JSON file; None removes one."""
    declared = {**json.loads((directory / file).read_text()), **values}
    (directory / file).write_text(json.dumps({key: value for key, value in declared.items() if value is not None}))


def retensor(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the tensors of a single file."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def dropping(name: str) -> Callable[[Path], None]:
    return lambda directory: retensor(directory, lambda tensors: tensors.pop(name))


def adding(name: str) -> Callable[[Path], None]:
    return lambda directory: retensor(directory, lambda tensors: tensors.update({name: torch.ones(3)}))


def reshaping(name: str) -> Callable[[Path], None]:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    return lambda directory: retensor(directory, cut)


def setting(file: str, **values: object) -> Callable[[Path], None]:
    return lambda directory: change(directory, file, **values)


def removing(*names: str) -> Callable[[Path], None]:
    def remove(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return remove


def shortening(name: str, size: int) -> Callable[[Path], None]:
    """Keep the first bytes of a file, or all but the last."""
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size]) and None


WEIGHTS = "model.safetensors"
IMAGES = "preprocessor_config.json"
# checkpoint, change, part of the message
BAD: list[tuple[str, Callable[[Path], None], str]] = [
    ("bge-bert-cls", dropping("embeddings.LayerNorm.bias"), "tensor 'embeddings.LayerNorm.bias' is missing"),
    ("bge-bert-cls", dropping("encoder.layer.2.attention.self.key.bias"), "2.attention.self.key.bias' is missing"),
    ("e5_mistral-mistral-window", dropping("layers.0.mlp.up_proj.weight"), "'layers.0.mlp.up_proj.weight' is missing"),
    ("e5_mistral-mistral-window", dropping("norm.weight"), "tensor 'norm.weight' is missing"),
    ("gte_qwen2-bidirectional", dropping("layers.1.self_attn.q_proj.bias"), "q_proj.bias' is missing"),
    ("qwen3_embedding-bare", dropping("layers.2.self_attn.k_norm.weight"), "k_norm.weight' is missing"),
    ("clip-openai", dropping("visual_projection.weight"), "tensor 'visual_projection.weight' is missing"),
    ("clip-openai", dropping("vision_model.embeddings.class_embedding"), "class_embedding' is missing"),
    ("gme_qwen2_vl-hub", dropping("visual.merger.mlp.0.bias"), "tensor 'visual.merger.mlp.0.bias' is missing"),
    ("bge-bert-cls", adding("encoder.layer.0.adapter.weight"), "'encoder.layer.0.adapter.weight' is not part of this"),
    ("e5_mistral-mistral-window", adding("layers.0.self_attn.q_proj.bias"), "q_proj.bias' is not part of this network"),
    ("e5_mistral-mistral-window", adding("layers.1.self_attn.q_norm.weight"), "q_norm.weight' is not part of this"),
    ("clip-openai", adding("vision_model.head.weight"), "'vision_model.head.weight' is not part of this network"),
    ("gme_qwen2_vl-hub", adding("visual.patch_embed.proj.bias"), "'visual.patch_embed.proj.bias' is not part of this"),
    ("bge-bert-cls", reshaping("encoder.layer.1.intermediate.dense.weight"), "has shape [91, 60], config.json"),
    ("gte_qwen2-bidirectional", reshaping("layers.0.self_attn.v_proj.bias"), "v_proj.bias' has shape [19], config"),
    ("qwen3_embedding-bare", reshaping("embed_tokens.weight"), "tensor 'embed_tokens.weight' has shape"),
    ("clip-openai", reshaping("vision_model.embeddings.position_embedding.weight"), "has shape [36, 40], config.json"),
    ("gme_qwen2_vl-hub", reshaping("visual.patch_embed.proj.weight"), "proj.weight' has shape [63, 3, 2, 14, 14]"),
    ("clip-openai", shortening(WEIGHTS, -100), f"{WEIGHTS} cannot be read"),
    ("gme_qwen2_vl-hub", shortening(WEIGHTS, 1000), f"{WEIGHTS} cannot be read"),
    ("bge-bert-cls", shortening(WEIGHTS, 0), f"{WEIGHTS} cannot be read"),
    ("bge-bert-cls", removing(WEIGHTS), "has no *.safetensors file"),
    ("bge-m3-sharded-bf16", lambda d: max(d.glob("*.safetensors")).unlink(), "index.json names "),
    ("bge-bert-cls", setting("config.json", num_hidden_layers=2), "'encoder.layer.2."),
    ("bge-bert-cls", setting("config.json", num_hidden_layers=4), "'encoder.layer.3.attention.self.query.weight' is"),
    ("bge-bert-cls", setting("config.json", vocab_size=200), "word_embeddings.weight' has shape"),
    ("e5_mistral-mistral-window", setting("config.json", num_key_value_heads=3), "k_proj.weight' has shape [32, 52]"),
    ("e5_mistral-mistral-window", setting("config.json", head_dim=8), "q_proj.weight' has shape [96, 52]"),
    ("gte_qwen2-bidirectional", setting("config.json", hidden_size=72), "has shape"),
    ("clip-openai", setting("config.json", projection_dim=30), "projection.weight' has shape [28, "),
    ("bge-bert-cls", setting("config.json", model_type="t5"), "model_type is 't5'; bge/config.pbtxt serves bert"),
    ("bge-bert-cls", removing("config.json"), "config.json is missing"),
    ("bge-bert-cls", shortening("config.json", -9), "config.json is not valid JSON"),
    ("bge-bert-cls", setting("1_Pooling/config.json", pooling_mode_cls_token=False, pooling_mode_mean_tokens=True),
     "1_Pooling/config.json says pooling 'mean', bge/config.pbtxt says 'cls'"),
    ("qwen3_embedding-bare", setting("1_Pooling/config.json", pooling_mode_mean_tokens=True),
     "1_Pooling/config.json: pooling 'mean+last' is not implemented; use one of cls, mean, last, max"),
    ("bge-bert-cls", removing("tokenizer.json"), "has no tokenizer: none of tokenizer.json, vocab.txt"),
    ("clip-openai", removing("tokenizer.json"), "has no tokenizer: none of tokenizer.json, vocab.txt"),
    ("e5_mistral-mistral-window", removing("tokenizer_config.json"), "tokenizer_config.json is missing"),
    ("clip-openai", removing(IMAGES), f"{IMAGES} is missing"),
    ("gme_qwen2_vl-hub", removing(IMAGES), f"{IMAGES} is missing"),
    ("clip-openai", setting(IMAGES, crop_size=32), "crop_size is (32, 32), config.json says image_size 48"),
    ("clip-openai", setting(IMAGES, image_mean=[0.5, 0.5]),
     f"{IMAGES}: image_mean is [0.5, 0.5]; must be three finite numbers"),
    ("gme_qwen2_vl-hub", setting(IMAGES, patch_size=16), "patch_size is 16, config.json says 14"),
    ("gme_qwen2_vl-hub", setting(IMAGES, merge_size=1), "merge_size is 1, config.json says 2"),
    ("gme_qwen2_vl-hub", setting(IMAGES, temporal_patch_size=1), "temporal_patch_size is 1, config.json says 2"),
    ("gte_qwen2-bidirectional", setting("config.json", is_causal=None), "config.json: 'is_causal' is missing"),
    ("qwen3_embedding-bare", setting("config.json", is_causal=False), "is_causal is False; the family requires True"),
    ("e5_mistral-mistral-window", setting("config.json", is_causal=False),
     "is_causal is False; the family requires True"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "words"), BAD, ids=[f"{name} {words}" for name, _, words in BAD])
def test_mismatched_checkpoint_is_rejected_by_name(
    name: str, damage: Callable[[Path], None], words: str, tiny: Tiny, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny(name).directory, tmp_path / name)
    family, parameters = next((case.family, case.parameters) for case in CASES if case.name == name)
    Family(family, directory, **parameters).embedder  # noqa: B018 - good until it is spoilt
    damage(directory)
    with pytest.raises(ConfigError) as caught:
        Family(family, directory, **parameters).embedder  # noqa: B018
    assert str(directory) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"activation_function": "torch.nn.modules.activation.Hardswish"}, "activation_function is 'torch.nn"),
        ({"in_features": 59}, "in_features is 59; the previous module outputs 60"),
        ({"out_features": 23}, "tensor 'linear.weight' has shape [60, 60], config.json requires [23, 60]"),
        ({"bias": False}, "tensor 'linear.bias' is not part of this network"),
        ({"use_residual": True}, "use_residual is True"),
        ({"module_input_name": "token_embeddings"}, "module_input_name is 'token_embeddings'"),
        ({"module_output_name": "projected"}, "module_output_name is 'projected'"),
    ],
    ids=["activation", "inputs", "outputs", "bias", "residual", "input", "output"],
)
def test_mismatched_dense_module_is_rejected_by_name(
    values: dict[str, object], words: str, plain_bert: Path, tmp_path: Path
) -> None:
    directory = write_modules(tmp_path / "made", plain_bert, "cls", [(60, True, None)])
    change(directory, "2_Dense/config.json", **values)
    with pytest.raises(ConfigError) as caught:
        Family("bge", directory).embedder  # noqa: B018
    assert str(directory / "2_Dense") in str(caught.value)
    assert words in str(caught.value)


def docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def english() -> list[str]:
    """Return 200 sentences of 4 to 60 words from the documentation of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    actual: dict[str, None] = {}
    for name in ("argparse", "threading", "random", "pathlib", "statistics", "logging/__init__", "subprocess"):
        for text in docstrings((library / f"{name}.py").read_text()):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split())):
                if 4 <= len(sentence.split()) <= 60:
                    actual.setdefault(sentence)
    return list(actual)[:200]


@pytest.fixture(scope="module")
def minilm() -> tuple[list[str], np.ndarray]:
    """Return sentences and sentence-transformers' vectors of them."""
    sentences = english()
    assert len(sentences) == 200
    theirs = SentenceTransformer(str(MINILM), device="cpu")
    return sentences, theirs.encode(sentences, batch_size=32, show_progress_bar=False)


def embed_texts(sentences: Sequence[str], **parameters: str) -> np.ndarray:
    ours = Family("minilm", MINILM, **parameters)
    rows = ours.rows(*map(Item, sentences))
    parts = [ours.embedder.embed(rows[i : i + 32], [384] * len(rows[i : i + 32])) for i in range(0, len(rows), 32)]
    return np.concatenate(parts)


def test_minilm_matches_sentence_transformers(minilm: tuple[list[str], np.ndarray]) -> None:
    sentences, expected_vectors = minilm
    actual = embed_texts(sentences, pooling="mean")
    assert ((actual.astype(np.float64) * expected_vectors).sum(1)).min() >= 0.99999
    assert np.abs(np.linalg.norm(actual.astype(np.float64), axis=1) - 1).max() <= 1e-6
    assert np.abs(actual - expected_vectors).max() <= 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_minilm_in_16_bits_stays_close(dtype: str, minilm: tuple[list[str], np.ndarray]) -> None:
    sentences, expected_vectors = minilm
    assert embedder(MINILM, dtype=dtype).dtype == getattr(torch, dtype)
    actual = embed_texts(sentences[:32], dtype=dtype)
    assert actual.dtype == np.float32
    assert ((actual * expected_vectors[:32]).sum(1)).min() >= 0.9995
    assert np.abs(np.linalg.norm(actual.astype(np.float64), axis=1) - 1).max() <= 1e-6


def test_long_text_is_truncated_as_in_sentence_transformers(minilm: tuple[list[str], np.ndarray]) -> None:
    long = " ".join(minilm[0][:40])
    theirs = SentenceTransformer(str(MINILM), device="cpu")
    assert len(theirs.tokenizer.tokenize(long)) > theirs.max_seq_length
    actual = embed_texts([long])
    assert (actual * theirs.encode([long], show_progress_bar=False)).sum() >= 0.99999


def test_missing_gpu_is_reported_before_loading(bge_tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny: torch .* finds no GPU; set the parameter kernels to reference"):
        embedder(bge_tiny, device="cuda:0")


def test_kernels_setting_selects_the_backend_per_model(bge_tiny: Path) -> None:
    plain, compiled = embedder(bge_tiny, kernels="reference"), embedder(bge_tiny)
    assert (plain.kernels, compiled.kernels) == ("reference", "cpu")
    for model in (plain, compiled):  # two models of one process keep their own backends
        assert {module._ops.name for module in model._network.modules() if hasattr(module, "_ops")} == {model.kernels}


def test_threads_setting_is_applied(bge_tiny: Path) -> None:
    for threads in (2, 1):
        embedder(bge_tiny, threads=threads)
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC"),
            "bge: Failed to find C compiler.*install gcc",
        ),
        (
            AssertionError("libcuda.so cannot found!\nPossible files"),
            "bge: libcuda.so cannot found! Possible.*--gpus all",
        ),
        (PermissionError(13, "Permission denied", "/srv/.triton"), "bge: .*/srv/.triton.*set TRITON_CACHE_DIR"),
        (OSError(30, "Read-only file system", "/x"), "bge: .*Read-only.*set TRITON_CACHE_DIR"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "bge: CUDA out of memory.*max_batch_tokens"),
    ],
    ids=["no compiler", "no driver", "cache of another user", "read-only cache", "no memory"],
)
def test_error_of_the_surroundings_says_what_to_do(error: Exception, message: str) -> None:
    model = object.__new__(Embedder)
    model.kernels = "triton"
    with pytest.raises(ConfigError, match=message), model._explain(serving("bge")):
        raise error
    with pytest.raises(RuntimeError, match="unknown"), model._explain(serving("bge")):
        raise RuntimeError("unknown")


def test_pass_without_memory_is_halved(bge_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(bge_tiny)
    rows = [Row(np.arange(3, 4 + i, dtype=np.int32)) for i in range(7)]
    dims = [5, 60, 7, 8, 60, 9, 60]
    expected, computed, forward = model.embed(rows, dims), [], model._forward

    def limited(rows: Sequence[Row]) -> object:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        computed.append(len(rows))
        return forward(rows)

    monkeypatch.setattr(model, "_forward", limited)
    result = model.embed(rows, dims)
    assert computed == [1, 2, 2, 2]
    for i, size in enumerate(dims):
        np.testing.assert_allclose(result[i, :size], expected[i, :size], atol=1e-6)


def test_row_without_memory_fails_alone(bge_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(bge_tiny)

    def fails(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "_forward", fails)
    with pytest.raises(torch.OutOfMemoryError):
        model.embed([Row(np.array([3], dtype=np.int32))], [60])


def test_error_of_the_device_is_reported_as_its_loss(bge_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(bge_tiny)

    def fails(_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    monkeypatch.setattr(model, "_forward", fails)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        model.embed([Row(np.array([3], dtype=np.int32))] * 2, [60, 60])


def test_spare_core_lowers_the_thread_count(bge_tiny: Path) -> None:
    """Leave one core of a large pass, all but one of a small pass; an interrupted pass keeps its threads."""
    ours = embedder(bge_tiny, threads=4)
    few, many = rows_of((5, 9), 80), rows_of((60,) * 5, 80)
    seen: list[int] = []

    def threads(rows: list[Row], spare: bool) -> set[int]:
        seen.clear()
        ours.embed(rows, [60] * len(rows), lambda: seen.append(torch.get_num_threads()), spare)
        return set(seen)

    assert threads(few, spare=True) == {1}
    assert threads(few, spare=False) == {4}
    assert threads(many, spare=True) == {3}

    inner: list[int] = []

    def interrupt() -> None:
        seen.append(torch.get_num_threads())
        ours.embed(few, [60] * 2, lambda: inner.append(torch.get_num_threads()), spare_core=True)

    seen.clear()
    ours.embed(many, [60] * 5, interrupt)
    assert (set(seen), set(inner)) == ({4}, {1})
    chances = len(seen)
    assert chances > 8  # of a tiny network of two layers
    ours.embed(many, [60] * 5, interrupt)
    assert len(seen) == 2 * chances
