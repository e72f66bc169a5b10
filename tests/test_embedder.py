"""Vectors end to end, without a server: transformers for tiny checkpoints in every form a file may have,
sentence-transformers for the real MiniLM.
"""

import ast
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from test_encoder import hidden_states, rows_of, stir
from test_ops import one_thread  # noqa: F401 - applies to every test here
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

from conftest import MINILM, serving, write_bert
from triton_embed.python_backend.embedder import Embedder
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.spec import EncoderSpec

MIXED = (1, 77, 2, 3, 3, 3, 13, 1, 5, 8, 21, 34, 55, 2, 4, 6, 1, 1, 9, 27, 61, 7, 7, 7, 7, 50, 2, 11, 16, 32, 64, 3)


def embedder(directory: Path, **operator: object) -> Embedder:
    return Embedder(EncoderSpec(), directory, serving(**{"threads": 1, **operator}))


def normalised(pooled: Sequence[Tensor]) -> np.ndarray:
    vectors = torch.stack(list(pooled)).double()
    return (vectors / vectors.norm(dim=1, keepdim=True)).numpy()


def bare(directory: Path) -> None:
    """BertModel.save_pretrained, one file, fp32."""
    stir(directory)


def masked_lm(directory: Path) -> None:
    """Every name begins with `bert.`, a head lies beside it, and there is no pooler."""
    torch.manual_seed(3)
    BertForMaskedLM(BertConfig.from_pretrained(directory)).save_pretrained(directory)
    stored = (directory / "model.safetensors").read_bytes()
    assert b"bert.encoder" in stored
    assert b"cls.predictions" in stored


def sharded(directory: Path) -> None:
    stir(directory).save_pretrained(directory, max_shard_size="40KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    assert len(list(directory.glob("model-*.safetensors"))) > 3


def half(directory: Path) -> None:
    stir(directory).to(torch.float16).save_pretrained(directory)


def brain(directory: Path) -> None:
    stir(directory).to(torch.bfloat16).save_pretrained(directory)


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
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Embedder, list[np.ndarray], np.ndarray]:
    """(ours, rows of ids, transformers' vectors for them, computed one at a time in float32)."""
    store, pooling, sizes = FORMS[request.param]
    directory = write_bert(tmp_path_factory.mktemp("embedder") / "tiny", request.param, pooling, **sizes)
    store(directory)
    theirs = BertModel.from_pretrained(directory, add_pooling_layer=False, dtype=torch.float32).eval()
    rows = rows_of(MIXED, theirs.config.vocab_size)
    with torch.no_grad():
        states = hidden_states(theirs, rows)
    pooled = [state[0] if pooling == "cls" else state.mean(0) for state in states]
    return embedder(directory), rows, normalised(pooled)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 2e-5
    assert ((found * expected).sum(1)).min() >= 0.999999


def test_a_mixed_batch_of_32(tiny: tuple[Embedder, list[np.ndarray], np.ndarray]) -> None:
    ours, rows, expected = tiny
    assert len(rows) == 32
    assert_same(ours.embed(rows, [expected.shape[1]] * 32), expected)


@pytest.mark.parametrize("row", [0, 1, 3, 11])
def test_a_text_alone(row: int, tiny: tuple[Embedder, list[np.ndarray], np.ndarray]) -> None:
    ours, rows, expected = tiny
    assert_same(ours.embed([rows[row]], [expected.shape[1]]), expected[row : row + 1])


def test_rows_of_one_batch_may_ask_for_different_sizes(
    tiny: tuple[Embedder, list[np.ndarray], np.ndarray],
) -> None:
    ours, rows, expected = tiny
    dims = [1 + i for i in range(32)]
    for vector, size, whole in zip(ours.embed(rows, dims), dims, expected, strict=True):
        assert np.abs(vector[:size] - whole[:size] / np.linalg.norm(whole[:size])).max() <= 1e-4
        assert abs(np.linalg.norm(vector[:size].astype(np.float64)) - 1) <= 1e-6
        assert not vector[size:].any()


def test_a_tensor_that_the_config_does_not_promise(tmp_path: Path) -> None:
    """A config.json of two layers over the weights of three."""
    write_bert(tmp_path / "tiny")
    file = tmp_path / "tiny" / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(ConfigError, match=r"model\.safetensors: tensor 'encoder\.layer\.2\..* is not part of this"):
        embedder(tmp_path / "tiny")


def docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def english() -> list[str]:
    """200 sentences from the standard library's own documentation, 4 to 60 words long."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for name in ("argparse", "threading", "random", "pathlib", "statistics", "logging/__init__", "subprocess"):
        for text in docstrings((library / f"{name}.py").read_text()):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split())):
                if 4 <= len(sentence.split()) <= 60:
                    found.setdefault(sentence)
    return list(found)[:200]


@pytest.fixture(scope="module")
def minilm() -> tuple[list[str], np.ndarray]:
    """(sentences, sentence-transformers' vectors)."""
    sentences = english()
    assert len(sentences) == 200
    theirs = SentenceTransformer(str(MINILM), device="cpu")
    return sentences, theirs.encode(sentences, batch_size=32, show_progress_bar=False)


def embed_texts(ours: Embedder, sentences: Sequence[str], size: int = 384) -> np.ndarray:
    rows = [ours.tokenizer.cut_text(ids, "end", 0).ids for ids in ours.tokenizer.encode(sentences)]
    parts = [ours.embed(rows[i : i + 32], [size] * len(rows[i : i + 32])) for i in range(0, len(rows), 32)]
    return np.concatenate(parts)


def test_the_real_minilm_is_sentence_transformers_own(minilm: tuple[list[str], np.ndarray]) -> None:
    sentences, expected = minilm
    found = embed_texts(embedder(MINILM, pooling="mean"), sentences)
    assert ((found.astype(np.float64) * expected).sum(1)).min() >= 0.99999
    assert np.abs(np.linalg.norm(found.astype(np.float64), axis=1) - 1).max() <= 1e-6
    assert np.abs(found - expected).max() <= 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_real_minilm_in_half_the_memory(dtype: str, minilm: tuple[list[str], np.ndarray]) -> None:
    sentences, expected = minilm
    ours = embedder(MINILM, dtype=dtype)
    assert ours.dtype == getattr(torch, dtype)
    found = embed_texts(ours, sentences[:32])
    assert found.dtype == np.float32
    assert ((found * expected[:32]).sum(1)).min() >= 0.9995
    assert np.abs(np.linalg.norm(found.astype(np.float64), axis=1) - 1).max() <= 1e-6


def test_a_long_text_is_cut_where_sentence_transformers_cuts_it(minilm: tuple[list[str], np.ndarray]) -> None:
    long = " ".join(minilm[0][:40])
    theirs = SentenceTransformer(str(MINILM), device="cpu")
    assert len(theirs.tokenizer.tokenize(long)) > theirs.max_seq_length
    found = embed_texts(embedder(MINILM), [long])
    assert (found * theirs.encode([long], show_progress_bar=False)).sum() >= 0.99999


def test_the_operator_decides_on_threads(bge_tiny: Path) -> None:
    for threads in (2, 1):
        embedder(bge_tiny, threads=threads)
        assert torch.get_num_threads() == threads
