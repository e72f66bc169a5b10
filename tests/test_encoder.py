"""Encoder, the layers every network is made of, and the head: hidden states of every token against transformers'
BertModel and XLMRobertaModel in float32.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_xlm_roberta
from sentence_transformers.sentence_transformer import modules
from test_ops import one_thread  # noqa: F401 - applies to every test here
from torch import Tensor, nn
from transformers import AutoModel, BertModel
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from conftest import serving, write_bert
from triton_embed.kernels import ops
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.checkpoint.config import Dense, ModelConfig
from triton_embed.python_backend.inputs.row import Row
from triton_embed.python_backend.networks import weights
from triton_embed.python_backend.networks.encoder import Encoder
from triton_embed.python_backend.networks.head import Head
from triton_embed.python_backend.networks.layers import (
    FusedLinear,
    LayerNorm,
    Linear,
    PatchEmbedding,
    PostLayerNorm,
    Projection,
    RMSNorm,
)
from triton_embed.python_backend.spec import EncoderSpec

LENGTHS = [(1,), (5,), (7, 7, 7), (1, 77, 2, 3, 3, 13, 1)]
# Odd sizes: a head of 3 values, one head, one layer, one token type, a vocabulary of 54.
SHAPES: dict[str, dict[str, object]] = {
    "three layers": {},
    "small heads": {"hidden_size": 36, "num_attention_heads": 12, "num_hidden_layers": 2, "hidden_act": "gelu_new"},
    "one head": {"num_attention_heads": 1, "num_hidden_layers": 1, "type_vocab_size": 1, "hidden_act": "relu"},
    "large epsilon": {"layer_norm_eps": 1e-2, "intermediate_size": 61, "hidden_act": "quick_gelu"},
    "xlm-roberta": {"pad_token_id": 3, "max_position_embeddings": 81},  # positions count from 4
}
Pair = tuple[Encoder, Any, ModelConfig]


def stir(directory: Path) -> BertModel:
    """Give biases and norms random values as well: transformers starts them at 0 and 1, which hides mistakes."""
    network = BertModel.from_pretrained(directory).eval()
    torch.manual_seed(1)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    network.save_pretrained(directory)
    return network.requires_grad_(False)


def rows_of(lengths: Sequence[int], vocabulary: int) -> list[Row]:
    random = np.random.default_rng(0)
    return [Row(random.integers(0, vocabulary, length, dtype=np.int32)) for length in lengths]


def hidden_states(network: Any, rows: Sequence[Row]) -> list[Tensor]:
    """transformers' last hidden states, one row at a time."""
    return [network(torch.from_numpy(row.ids.astype(np.int64))[None]).last_hidden_state[0] for row in rows]


def load(directory: Path, pooling: str) -> tuple[Encoder, ModelConfig]:
    config = ModelConfig.from_checkpoint(directory, serving(model_types=("bert", "xlm-roberta")), EncoderSpec())
    model = dataclasses.replace(config, pooling=pooling)
    with torch.device("meta"):
        network = Encoder(model, model.network_config, "cpu").eval()
    weights.load(network, Encoder.naming, directory, torch.float32, "cpu")
    return network, model


@pytest.fixture(scope="module", params=SHAPES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, sizes = tmp_path_factory.mktemp("encoder") / "tiny", SHAPES[request.param]
    if request.param == "xlm-roberta":
        return write_xlm_roberta(made, **sizes)
    stir(write_bert(made, **sizes))
    return made


@pytest.fixture(scope="module")
def pair(directory: Path) -> Pair:
    """(ours, which keeps every token, theirs) from the same file."""
    theirs = AutoModel.from_pretrained(directory, add_pooling_layer=False).eval().requires_grad_(False)
    ours, model = load(directory, "mean")
    return ours, theirs, model


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_hidden_states(lengths: tuple[int, ...], pair: Pair) -> None:
    ours, theirs, model = pair
    rows = rows_of(lengths, model.vocab_size)
    with torch.inference_mode():
        found, packed = ours(rows)
    expected = torch.cat(hidden_states(theirs, rows))
    assert packed.lengths[: len(rows)] == lengths
    assert found.shape == (packed.tokens, expected.shape[1])
    assert (found[: len(expected)] - expected).abs().max() <= 2e-5


@pytest.mark.parametrize(("pooling", "token"), [("cls", 0), ("last", -1)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_pooled_token_alone_is_computed_in_the_last_layer(
    lengths: tuple[int, ...], pooling: str, token: int, pair: Pair, directory: Path
) -> None:
    (_, theirs, model), (ours, _) = pair, load(directory, pooling)
    rows = rows_of(lengths, model.vocab_size)
    with torch.inference_mode():
        found, packed = ours(rows)
    expected = torch.stack([state[token] for state in hidden_states(theirs, rows)])
    assert set(packed.lengths) == {1}
    assert (found[: len(expected)] - expected).abs().max() <= 2e-5


def test_a_packed_weight_changes_nothing(pair: Pair) -> None:
    ours, _, model = pair
    rows = rows_of(LENGTHS[-1], model.vocab_size)
    with torch.inference_mode():
        before, _ = ours(rows)
        packed = [module for module in ours.modules() if isinstance(module, Linear)]
        plain = [module.weight for module in packed]
        for module in packed:
            module.pack()
        found, _ = ours(rows)
    for module, weight in zip(packed, plain, strict=True):
        assert module.weight.is_mkldnn
        module.weight = weight
    assert (found - before).abs().max() <= 2e-5


def test_every_layer_of_the_checkpoint_is_used(pair: Pair) -> None:
    ours, theirs, model = pair
    linears = [module for module in ours.modules() if isinstance(module, Linear)]
    theirs_without_pooler = [module for module in theirs.encoder.modules() if isinstance(module, nn.Linear)]
    assert sum(module.weight.numel() for module in linears) == sum(m.weight.numel() for m in theirs_without_pooler)
    assert len(ours.encoder["layer"]) == model.network_config.layers == theirs.config.num_hidden_layers


def given_the_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Random parameters, equal in both."""
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        setattr(ours, name, nn.Parameter(torch.randn(parameter.shape), requires_grad=False))
        setattr(theirs, name, getattr(ours, name))


def test_the_norm_layer_is_torchs_over_the_sum() -> None:
    theirs, x, y = nn.LayerNorm(12, eps=1e-3), torch.randn(5, 12), torch.randn(5, 12)
    pre, post = LayerNorm(12, 1e-3), PostLayerNorm(12, 1e-3)
    for ours in (pre, post):
        given_the_same(ours, theirs)
    for residual, expected in ((y, x + y), (None, x)):
        found, total = pre(x, residual)
        assert torch.equal(total, expected)
        assert torch.allclose(found, theirs(expected), atol=1e-6)
        for found in post(x, residual):
            assert torch.allclose(found, theirs(expected), atol=1e-6)


def test_the_rms_norm_layer_is_transformers_own_and_hands_on_the_sum() -> None:
    ours, theirs, x, y = RMSNorm(12, 1e-3), MistralRMSNorm(12, 1e-3), torch.randn(5, 12), torch.randn(5, 12)
    given_the_same(ours, theirs)
    for found, total, expected in ((*ours(x, y), x + y), (*ours(x), x)):
        assert torch.equal(total, expected)
        assert torch.allclose(found, theirs(expected), atol=1e-6)


@pytest.mark.parametrize("kernel", [(4, 4), (2, 3, 3)], ids=str)
def test_a_patch_embedding_is_torchs_convolution(kernel: tuple[int, ...]) -> None:
    convolution = {2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
    ours, theirs = PatchEmbedding(kernel, 7), convolution(3, 7, kernel, kernel, bias=False)
    given_the_same(ours, theirs)
    patches = torch.randn(5, 3, *kernel)
    ours.pack()
    assert torch.allclose(ours(patches.flatten(1)), theirs(patches).flatten(1), atol=1e-5)


def test_a_fused_layer_is_its_parts_side_by_side() -> None:
    parts = [nn.Linear(6, 4), nn.Linear(6, 2), nn.Linear(6, 2)]
    ours, x = FusedLinear(6, (4, 2, 2)), torch.randn(5, 6)
    for name in ("weight", "bias"):
        whole = torch.cat([getattr(part, name).detach() for part in parts])
        setattr(ours, name, nn.Parameter(whole, requires_grad=False))
    assert torch.allclose(ours(x), torch.cat([part(x) for part in parts], dim=1), atol=1e-6)


def test_a_projection_stays_as_it_was_loaded_in_fp32() -> None:
    projection = Projection(6, 4)
    before = projection.weight
    projection.pack()
    assert projection.weight is before
    assert projection.dtype == torch.float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = write_bert(tmp_path_factory.mktemp("head") / "tiny")
    return ModelConfig.from_checkpoint(directory, serving(), EncoderSpec())


@pytest.mark.parametrize("chain", [(), (7,), (20, 9)], ids=str)
@pytest.mark.parametrize("pooling", ops.POOLING_MODES)
def test_the_head_pools_projects_cuts_and_normalises(pooling: str, chain: tuple[int, ...], model: ModelConfig) -> None:
    lengths, sizes = (3, 1, 6), (12, *chain)
    dims = (sizes[-1], 5, 1)
    theirs = [modules.Dense(*pair, bias=bool(i)) for i, pair in enumerate(zip(sizes, chain, strict=False))]
    ours = Head(
        dataclasses.replace(
            model,
            pooling=pooling,
            dense=tuple(Dense(Path(), d.in_features, d.out_features, d.bias, "tanh") for d in theirs),
        )
    )
    for dense, layer in zip(ours.dense, theirs, strict=True):
        given_the_same(dense.linear, layer.linear)
    hidden = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = ours(hidden, Packed.from_lengths(lengths), dims)
    pool = modules.Pooling(12, pooling_mode={"last": "lasttoken"}.get(pooling, pooling))
    for vector, part, size in zip(found, hidden.split(lengths), dims, strict=True):
        whole = pool({"token_embeddings": part[None], "attention_mask": torch.ones(1, len(part))})
        for layer in theirs:
            whole = layer(whole)
        expected = nn.functional.normalize(whole["sentence_embedding"][0, :size], dim=0)
        assert torch.allclose(vector[:size], expected, atol=1e-6)
        assert not vector[size:].any()
