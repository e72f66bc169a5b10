"""Encoder, its layers and its head: hidden states of every token against transformers' BertModel in float32."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from test_ops import one_thread  # noqa: F401 - applies to every test here
from torch import Tensor, nn
from transformers import BertModel

from conftest import serving, write_bert
from triton_embed.kernels import ops
from triton_embed.python_backend import head, weights
from triton_embed.python_backend.batch import Batch
from triton_embed.python_backend.config import ModelConfig
from triton_embed.python_backend.encoder import Encoder
from triton_embed.python_backend.layers import AddLayerNorm, Linear

LENGTHS = [(1,), (5,), (7, 7, 7), (1, 77, 2, 3, 3, 13, 1)]
# Odd sizes: a head of 3 values, one head, one layer, one token type, a vocabulary of 54.
SHAPES: dict[str, dict[str, object]] = {
    "three layers": {},
    "small heads": {"hidden_size": 36, "num_attention_heads": 12, "num_hidden_layers": 2, "hidden_act": "gelu_new"},
    "one head": {"num_attention_heads": 1, "num_hidden_layers": 1, "type_vocab_size": 1, "hidden_act": "relu"},
    "large epsilon": {"layer_norm_eps": 1e-2, "intermediate_size": 61, "hidden_act": "quick_gelu"},
}


def stir(directory: Path) -> BertModel:
    """Give biases and norms random values as well: transformers starts them at 0 and 1, which hides mistakes."""
    network = BertModel.from_pretrained(directory).eval()
    torch.manual_seed(1)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    network.save_pretrained(directory)
    return network.requires_grad_(False)


def rows_of(lengths: Sequence[int], vocabulary: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, vocabulary, length, dtype=np.int32) for length in lengths]


def hidden_states(network: BertModel, rows: Sequence[np.ndarray]) -> list[Tensor]:
    """transformers' last hidden states, one row at a time."""
    return [network(torch.from_numpy(row.astype(np.int64))[None]).last_hidden_state[0] for row in rows]


@pytest.fixture(scope="module", params=SHAPES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Encoder, BertModel, ModelConfig]:
    """(ours, theirs) from the same file."""
    directory = write_bert(tmp_path_factory.mktemp("encoder") / "tiny", **SHAPES[request.param])
    theirs, model = stir(directory), ModelConfig.from_checkpoint(directory, serving())
    with torch.device("meta"):
        ours = Encoder(model).eval()
    weights.load(
        ours,
        directory,
        prefixes=Encoder.prefixes,
        fused=Encoder.fused,
        ignored=Encoder.ignored,
        dtype=torch.float32,
        device="cpu",
    )
    return ours, theirs, model


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_hidden_states(lengths: tuple[int, ...], pair: tuple[Encoder, BertModel, ModelConfig]) -> None:
    ours, theirs, model = pair
    rows = rows_of(lengths, model.vocab_size)
    with torch.inference_mode():
        found = ours(Batch.pack(rows, [1] * len(rows), "cpu"))
    expected = torch.cat(hidden_states(theirs, rows))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-5


def test_a_packed_weight_changes_nothing(pair: tuple[Encoder, BertModel, ModelConfig]) -> None:
    ours, _, model = pair
    batch = Batch.pack(rows_of(LENGTHS[-1], model.vocab_size), [1] * 7, "cpu")
    with torch.inference_mode():
        before = ours(batch)
        packed = [module for module in ours.modules() if isinstance(module, Linear)]
        plain = [module.weight for module in packed]
        for module in packed:
            module.pack()
        found = ours(batch)
    for module, weight in zip(packed, plain, strict=True):
        assert module.weight.is_mkldnn
        module.weight = weight
    assert (found - before).abs().max() <= 2e-5


def test_every_layer_of_the_checkpoint_is_used(pair: tuple[Encoder, BertModel, ModelConfig]) -> None:
    ours, theirs, model = pair
    linears = [module for module in ours.modules() if isinstance(module, Linear)]
    theirs_without_pooler = [module for module in theirs.encoder.modules() if isinstance(module, nn.Linear)]
    assert sum(module.weight.numel() for module in linears) == sum(m.weight.numel() for m in theirs_without_pooler)
    assert len(ours.encoder["layer"]) == model.layers == theirs.config.num_hidden_layers


def test_the_norm_layer_is_torchs_over_the_sum() -> None:
    torch.manual_seed(0)
    ours, theirs, x, y = AddLayerNorm(12, 1e-3), nn.LayerNorm(12, eps=1e-3), torch.randn(5, 12), torch.randn(5, 12)
    for name in ("weight", "bias"):
        setattr(ours, name, nn.Parameter(torch.randn(12)))
        setattr(theirs, name, getattr(ours, name))
    assert torch.allclose(ours(x, y), theirs(x + y), atol=1e-6)


@pytest.mark.parametrize("pooling", ops.POOLING_MODES)
def test_the_head_pools_cuts_and_normalises(pooling: str) -> None:
    lengths, dims = (3, 1, 6), (12, 5, 1)
    hidden = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    rows = [np.zeros(length, dtype=np.int32) for length in lengths]
    found = head.embed(hidden, Batch.pack(rows, dims, "cpu"), pooling)
    pool = Pooling(12, pooling_mode={"last": "lasttoken"}.get(pooling, pooling))
    for vector, part, size in zip(found, hidden.split(lengths), dims, strict=True):
        whole = pool({"token_embeddings": part[None], "attention_mask": torch.ones(1, len(part))})
        expected = nn.functional.normalize(whole["sentence_embedding"][0, :size], dim=0)
        assert torch.allclose(vector[:size], expected, atol=1e-6)
        assert not vector[size:].any()
