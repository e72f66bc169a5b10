"""The encoder, the layers that all networks use, and the head.

The hidden states of every token are compared with transformers' BertModel and XLMRobertaModel in float32.
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
from triton_embed.kernels.ops import POOLING_MODES, Ops
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

OPS = Ops.on("cpu", torch.float32)
LENGTHS = [(1,), (5,), (7, 7, 7), (1, 77, 2, 3, 3, 13, 1)]
# Odd sizes: heads of 3 values, one head, one layer, one token type.
SHAPES: dict[str, dict[str, object]] = {
    "three layers": {},
    "small heads": {"hidden_size": 36, "num_attention_heads": 12, "num_hidden_layers": 2, "hidden_act": "gelu_new"},
    "one head": {"num_attention_heads": 1, "num_hidden_layers": 1, "type_vocab_size": 1, "hidden_act": "relu"},
    "large epsilon": {"layer_norm_eps": 1e-2, "intermediate_size": 61, "hidden_act": "quick_gelu"},
    "xlm-roberta": {"pad_token_id": 3, "max_position_embeddings": 81},  # positions count from 4
}
Pair = tuple[Encoder, Any, ModelConfig]


def randomize_vectors(directory: Path) -> BertModel:
    """Add noise to biases and norms: transformers initializes them to 0 and 1, which hides mistakes."""
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
    """Return the last hidden states of transformers, computed one row at a time."""
    return [network(torch.from_numpy(row.ids.astype(np.int64))[None]).last_hidden_state[0] for row in rows]


def load(directory: Path, pooling: str) -> tuple[Encoder, ModelConfig]:
    config = ModelConfig.from_checkpoint(directory, serving(model_types=("bert", "xlm-roberta")), EncoderSpec())
    model = dataclasses.replace(config, pooling=pooling)
    with torch.device("meta"):
        network = Encoder(OPS, model, model.network_config, "cpu").eval()
    weights.load(network, Encoder.naming, directory, torch.float32, "cpu")
    return network, model


@pytest.fixture(scope="module", params=SHAPES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, sizes = tmp_path_factory.mktemp("encoder") / "tiny", SHAPES[request.param]
    if request.param == "xlm-roberta":
        return write_xlm_roberta(path, **sizes)
    randomize_vectors(write_bert(path, **sizes))
    return path


@pytest.fixture(scope="module")
def pair(directory: Path) -> Pair:
    """Load the same file as (our encoder, which keeps every token, transformers', our config)."""
    theirs = AutoModel.from_pretrained(directory, add_pooling_layer=False).eval().requires_grad_(False)
    ours, model = load(directory, "mean")
    return ours, theirs, model


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_hidden_states_of_all_tokens(lengths: tuple[int, ...], pair: Pair) -> None:
    ours, theirs, model = pair
    rows = rows_of(lengths, model.vocab_size)
    with torch.inference_mode():
        states, packed = ours(rows)
    expected = torch.cat(hidden_states(theirs, rows))
    assert packed.lengths[: len(rows)] == lengths
    assert states.shape == (packed.tokens, expected.shape[1])
    assert (states[: len(expected)] - expected).abs().max() <= 2e-5


@pytest.mark.parametrize(("pooling", "token"), [("cls", 0), ("last", -1)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_last_layer_computes_only_the_pooled_token(
    lengths: tuple[int, ...], pooling: str, token: int, pair: Pair, directory: Path
) -> None:
    (_, theirs, model), (ours, _) = pair, load(directory, pooling)
    rows = rows_of(lengths, model.vocab_size)
    with torch.inference_mode():
        states, packed = ours(rows)
    expected = torch.stack([state[token] for state in hidden_states(theirs, rows)])
    assert set(packed.lengths) == {1}
    assert (states[: len(expected)] - expected).abs().max() <= 2e-5


def test_packing_weights_keeps_hidden_states(pair: Pair) -> None:
    ours, _, model = pair
    rows = rows_of(LENGTHS[-1], model.vocab_size)
    with torch.inference_mode():
        before, _ = ours(rows)
        packed = [module for module in ours.modules() if isinstance(module, Linear)]
        plain = [module.weight for module in packed]
        for module in packed:
            module.pack()
        after, _ = ours(rows)
    for module, weight in zip(packed, plain, strict=True):
        assert module.weight.is_mkldnn
        module.weight = weight
    assert (after - before).abs().max() <= 2e-5


def test_all_layers_of_the_checkpoint_are_used(pair: Pair) -> None:
    ours, theirs, model = pair
    linears = [module for module in ours.modules() if isinstance(module, Linear)]
    theirs_without_pooler = [module for module in theirs.encoder.modules() if isinstance(module, nn.Linear)]
    assert sum(module.weight.numel() for module in linears) == sum(m.weight.numel() for m in theirs_without_pooler)
    assert len(ours.encoder["layer"]) == model.network_config.layers == theirs.config.num_hidden_layers


def set_equal_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    """Set random parameters that are equal in both."""
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        setattr(ours, name, nn.Parameter(torch.randn(parameter.shape), requires_grad=False))
        setattr(theirs, name, getattr(ours, name))


def test_layer_norm_equals_torch_on_the_sum() -> None:
    theirs, x, y = nn.LayerNorm(12, eps=1e-3), torch.randn(5, 12), torch.randn(5, 12)
    pre, post = LayerNorm(OPS, 12, 1e-3), PostLayerNorm(OPS, 12, 1e-3)
    for ours in (pre, post):
        set_equal_parameters(ours, theirs)
    for residual, expected in ((y, x + y), (None, x)):
        normed, total = pre(x, residual)
        assert torch.equal(total, expected)
        assert torch.allclose(normed, theirs(expected), atol=1e-6)
        for normed in post(x, residual):
            assert torch.allclose(normed, theirs(expected), atol=1e-6)


def test_rms_norm_equals_transformers_and_returns_the_sum() -> None:
    ours, theirs, x, y = RMSNorm(OPS, 12, 1e-3), MistralRMSNorm(12, 1e-3), torch.randn(5, 12), torch.randn(5, 12)
    set_equal_parameters(ours, theirs)
    for normed, total, expected in ((*ours(x, y), x + y), (*ours(x), x)):
        assert torch.equal(total, expected)
        assert torch.allclose(normed, theirs(expected), atol=1e-6)


@pytest.mark.parametrize("kernel", [(4, 4), (2, 3, 3)], ids=str)
def test_patch_embedding_equals_torch_convolution(kernel: tuple[int, ...]) -> None:
    convolution = {2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
    ours, theirs = PatchEmbedding(OPS, kernel, 7), convolution(3, 7, kernel, kernel, bias=False)
    set_equal_parameters(ours, theirs)
    patches = torch.randn(5, 3, *kernel)
    ours.pack()
    assert torch.allclose(ours(patches.flatten(1)), theirs(patches).flatten(1), atol=1e-5)


def test_fused_linear_concatenates_its_parts() -> None:
    parts = [nn.Linear(6, 4), nn.Linear(6, 2), nn.Linear(6, 2)]
    ours, x = FusedLinear(OPS, 6, (4, 2, 2)), torch.randn(5, 6)
    for name in ("weight", "bias"):
        fused = torch.cat([getattr(part, name).detach() for part in parts])
        setattr(ours, name, nn.Parameter(fused, requires_grad=False))
    assert torch.allclose(ours(x), torch.cat([part(x) for part in parts], dim=1), atol=1e-6)


def test_packing_a_projection_keeps_it_in_fp32() -> None:
    projection = Projection(OPS, 6, 4)
    before = projection.weight
    projection.pack()
    assert projection.weight is before
    assert projection.dtype == torch.float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = write_bert(tmp_path_factory.mktemp("head") / "tiny")
    return ModelConfig.from_checkpoint(directory, serving(), EncoderSpec())


@pytest.mark.parametrize("chain", [(), (7,), (20, 9)], ids=str)
@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_head_pools_projects_truncates_and_normalizes(pooling: str, chain: tuple[int, ...], model: ModelConfig) -> None:
    lengths, sizes = (3, 1, 6), (12, *chain)
    dims = (sizes[-1], 5, 1)
    theirs = [modules.Dense(*pair, bias=bool(i)) for i, pair in enumerate(zip(sizes, chain, strict=False))]
    ours = Head(
        OPS,
        dataclasses.replace(
            model,
            pooling=pooling,
            dense=tuple(Dense(Path(), d.in_features, d.out_features, d.bias, "tanh") for d in theirs),
        ),
    )
    for dense, layer in zip(ours.dense, theirs, strict=True):
        set_equal_parameters(dense.linear, layer.linear)
    hidden = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vectors = ours(hidden, Packed.from_lengths(lengths), dims)
    pool = modules.Pooling(12, pooling_mode={"last": "lasttoken"}.get(pooling, pooling))
    for vector, part, size in zip(vectors, hidden.split(lengths), dims, strict=True):
        features = pool({"token_embeddings": part[None], "attention_mask": torch.ones(1, len(part))})
        for layer in theirs:
            features = layer(features)
        expected = nn.functional.normalize(features["sentence_embedding"][0, :size], dim=0)
        assert torch.allclose(vector[:size], expected, atol=1e-6)
        assert not vector[size:].any()
