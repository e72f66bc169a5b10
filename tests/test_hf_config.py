"""Tests of the network configurations: every key of config.json, as transformers writes it and as in older files.

The expected values come from transformers' modules, built from the same config.json on the meta device. Every error
names file, key and value. Configs of CLIP and Qwen2-VL omit most keys: their classes have the defaults.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2VLModel,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers import Qwen2VLConfig as HfQwen2VLConfig
from transformers.activations import ACT2FN
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaEmbeddings

from triton_embed.kernels.ops import Ops
from triton_embed.python_backend.checkpoint.class_defaults import read_with_defaults
from triton_embed.python_backend.checkpoint.hf_config import (
    ClipConfig,
    DecoderConfig,
    EncoderConfig,
    Qwen2VLConfig,
    RopeConfig,
    TowerConfig,
)
from triton_embed.python_backend.checkpoint.json_file import JsonFile
from triton_embed.python_backend.errors import ConfigError

ops = Ops.on("cpu", torch.float32)

Values = Mapping[str, Any]
FILE = Path("/checkpoint/config.json")

# activation names in transformers -> names in kernels.ops
ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


def config_file(values: Values) -> JsonFile:
    """Create a config.json with these values, converted to JSON and back."""
    file = JsonFile(FILE)
    file.values = json.loads(json.dumps(values))
    return file


def changed(values: Values, changes: Values) -> dict[str, Any]:
    """Return a copy with some values changed.

    A key such as `vision_config.depth` changes a nested value; the value None removes the key.
    """
    copy = json.loads(json.dumps(values))
    for key, value in changes.items():
        *parents, last = key.split(".")
        parent = copy
        for name in parents:
            parent = parent[name]
        if value is None:
            parent.pop(last, None)
        else:
            parent[last] = value
    return dict(copy)


def read_by_transformers(values: Values) -> PreTrainedConfig:
    return AutoConfig.for_model(values["model_type"]).from_dict(json.loads(json.dumps(values)))


def build_on_meta(build: Callable[[PreTrainedConfig], torch.nn.Module], config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return build(config)


def error_message(read: Callable[[JsonFile], object], values: Values) -> str:
    with pytest.raises(ConfigError) as error:
        read(config_file(values))
    message = str(error.value)
    assert message.startswith(f"{FILE}: ")
    return message


BERT = BertConfig(
    vocab_size=97,
    hidden_size=60,
    num_hidden_layers=3,
    num_attention_heads=6,
    intermediate_size=92,
    max_position_embeddings=77,
    type_vocab_size=3,
    layer_norm_eps=1e-7,
    hidden_act="gelu_new",
).to_dict()
ROBERTA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 61,
    "max_position_embeddings": 50,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 3,
}
BGE_M3 = {
    "architectures": ["XLMRobertaModel"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "classifier_dropout": None,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 8194,
    "model_type": "xlm-roberta",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "output_past": True,
    "pad_token_id": 1,
    "position_embedding_type": "absolute",
    "torch_dtype": "float32",
    "type_vocab_size": 1,
    "use_cache": True,
    "vocab_size": 250002,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": RobertaConfig(**ROBERTA).to_dict(),
    "xlm-roberta": XLMRobertaConfig(**ROBERTA).to_dict(),
    "bge-m3": BGE_M3,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_config_equals_that_of_transformers(name: str) -> None:
    config = read_by_transformers(changed(ENCODERS[name], {"num_hidden_layers": 3}))
    theirs = build_on_meta(AutoModel.from_config, config)
    layer, embeddings = theirs.encoder.layer[0], theirs.embeddings
    encoder = EncoderConfig.read(config_file(changed(ENCODERS[name], {"num_hidden_layers": 3})))
    first = 0 if name == "bert" else _first_position(config)
    assert encoder == EncoderConfig(
        vocab_size=embeddings.word_embeddings.num_embeddings,
        hidden_size=embeddings.word_embeddings.embedding_dim,
        layers=len(theirs.encoder.layer),
        heads=layer.attention.self.num_attention_heads,
        intermediate_size=layer.intermediate.dense.out_features,
        positions=embeddings.position_embeddings.num_embeddings,
        first_position=first,
        token_types=embeddings.token_type_embeddings.num_embeddings,
        norm_eps=layer.output.LayerNorm.eps,
        activation=ACTIVATIONS[config.hidden_act],
    )
    assert encoder.max_tokens == embeddings.position_embeddings.num_embeddings - first


def _first_position(config: PreTrainedConfig) -> int:
    """Return the position id that transformers assigns to the first token of a text."""
    ids = torch.full((1, 5), config.pad_token_id + 7)
    return int(XLMRobertaEmbeddings.create_position_ids_from_input_ids(ids, config.pad_token_id)[0, 0])


def test_bge_m3_length_equals_that_of_its_model_card() -> None:
    assert EncoderConfig.read(config_file(BGE_M3)).max_tokens == 8192


@pytest.mark.parametrize("theirs", ACTIVATIONS)
def test_activation_equals_that_of_transformers(theirs: str) -> None:
    ours = EncoderConfig.read(config_file({**BERT, "hidden_act": theirs})).activation
    assert ours == ACTIVATIONS[theirs]
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(ops.activation(x, ours), ACT2FN[theirs](x), rtol=1e-12, atol=1e-12)


ENCODER_REJECTED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    # name: file, changes, fragments of the error message in addition to the file name
    "relative positions": (
        "bert",
        {"position_embedding_type": "relative_key"},
        ["position_embedding_type", "'relative_key'", "absolute"],
    ),
    "an unknown activation": ("bert", {"hidden_act": "mish"}, ["hidden_act", "'mish'", "gelu_new"]),
    "an activation that is a list": ("bert", {"hidden_act": ["gelu"]}, ["hidden_act", "['gelu']", "str"]),
    "heads that do not divide": ("bert", {"num_attention_heads": 7}, ["hidden_size 60", "num_attention_heads 7"]),
    "no heads": ("bert", {"num_attention_heads": 0}, ["num_attention_heads is 0"]),
    "a size that is a string": ("bert", {"hidden_size": "60"}, ["hidden_size is '60'"]),
    "an epsilon that is a string": ("bert", {"layer_norm_eps": "1e-12"}, ["layer_norm_eps is '1e-12'"]),
    "an epsilon below 0": ("bert", {"layer_norm_eps": -1e-12}, ["layer_norm_eps is -1e-12"]),
    "no padding id in a model whose positions start after it": (
        "xlm-roberta",
        {"pad_token_id": None},
        ["'pad_token_id' is missing"],
    ),
    "no model type": ("bert", {"model_type": None}, ["'model_type' is missing"]),
    **{
        f"no {key}": ("bert", {key: None}, [f"'{key}' is missing"])
        for key in (
            "hidden_act",
            "hidden_size",
            "num_attention_heads",
            "max_position_embeddings",
            "vocab_size",
            "num_hidden_layers",
            "intermediate_size",
            "type_vocab_size",
            "layer_norm_eps",
        )
    },
}


@pytest.mark.parametrize("case", ENCODER_REJECTED)
def test_invalid_encoder_config_is_rejected(case: str) -> None:
    name, changes, fragments = ENCODER_REJECTED[case]
    message = error_message(EncoderConfig.read, changed(ENCODERS[name], changes))
    assert [fragment for fragment in fragments if fragment not in message] == []


def test_bert_does_not_need_a_padding_id() -> None:
    assert EncoderConfig.read(config_file(changed(BERT, {"pad_token_id": None}))).first_position == 0


SIZES = {
    "vocab_size": 103,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 76,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-4,
}
ROPE = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
# Properties of the weights, as in the specs of the families.
SPECS = {
    "llama": {"causal": True, "qk_norm": False, "qkv_bias": False},
    "mistral": {"causal": True, "qk_norm": False, "qkv_bias": False},
    "qwen2": {"causal": None, "qk_norm": False, "qkv_bias": True},
    "qwen3": {"causal": True, "qk_norm": True, "qkv_bias": False},
}
MISTRAL = MistralConfig(**SIZES, head_dim=16, sliding_window=7, rope_parameters=ROPE).to_dict()
LLAMA = LlamaConfig(**SIZES, rope_parameters=YARN).to_dict()
QWEN2 = Qwen2Config(**SIZES, rope_parameters=ROPE, is_causal=True).to_dict()
QWEN3 = Qwen3Config(**SIZES, head_dim=16, rope_parameters=ROPE).to_dict()
# Copies of files on the Hugging Face Hub, written by transformers 4.
E5_MISTRAL = {
    "architectures": ["MistralModel"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": False,
    "vocab_size": 32000,
}
GTE_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "is_causal": False,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151646,
}
QWEN3_EMBEDDING = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151669,
}
LLAMA_3 = {
    **{key: value for key, value in E5_MISTRAL.items() if key not in {"sliding_window", "architectures"}},
    "attention_bias": False,
    "mlp_bias": False,
    "model_type": "llama",
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
}
DECODERS: dict[str, dict[str, Any]] = {
    "mistral": MISTRAL,
    "mistral without a window": {**MISTRAL, "sliding_window": None},
    "llama": LLAMA,
    "llama with attention bias": changed(LLAMA, {"attention_bias": True}),
    "llama with attention and MLP bias": changed(LLAMA, {"attention_bias": True, "mlp_bias": True}),
    "llama with MLP bias": changed(LLAMA, {"mlp_bias": True}),
    "llama with a head_dim": changed(LLAMA, {"head_dim": 14}),
    "llama without a head_dim": changed(LLAMA, {"head_dim": None}),
    "llama with an ignored window": changed(
        LLAMA, {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}
    ),
    "qwen2": QWEN2,
    "qwen2, bidirectional": changed(QWEN2, {"is_causal": False}),
    "qwen3": QWEN3,
    "qwen3 with attention bias": changed(QWEN3, {"attention_bias": True}),
    "e5-mistral": E5_MISTRAL,
    "gte-qwen2": GTE_QWEN2,
    "gte-qwen2 with null scaling": {**GTE_QWEN2, "rope_scaling": None},
    "qwen3-embedding": QWEN3_EMBEDDING,
    "llama 3": LLAMA_3,
    "llama with linear scaling": {**LLAMA_3, "rope_scaling": {"type": "linear", "factor": 2}},
}


def read_decoder(file: JsonFile) -> DecoderConfig:
    return DecoderConfig.read(file, **SPECS[file.values.get("model_type", "llama")])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_config_equals_that_of_transformers(name: str) -> None:
    values = changed(DECODERS[name], {"num_hidden_layers": 3})
    config = read_by_transformers(values)
    theirs = build_on_meta(AutoModel.from_config, config)
    layer, rope = theirs.layers[0], config.rope_parameters
    attention = layer.self_attn
    decoder = read_decoder(config_file(values))
    numbers = {key: float(value) for key, value in rope.items() if not isinstance(value, str)}
    assert decoder == DecoderConfig(
        vocab_size=theirs.embed_tokens.num_embeddings,
        hidden_size=theirs.embed_tokens.embedding_dim,
        layers=len(theirs.layers),
        heads=attention.q_proj.out_features // attention.head_dim,
        kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_dim=attention.head_dim,
        intermediate_size=layer.mlp.gate_proj.out_features,
        norm_eps=theirs.norm.variance_epsilon,
        causal=getattr(config, "is_causal", attention.is_causal),
        windows=_windows_of(theirs),
        rope=RopeConfig(
            theta=rope["rope_theta"],
            head_dim=attention.head_dim,
            positions=config.max_position_embeddings,
            kind=rope["rope_type"],
            # transformers may or may not store rope_theta next to the scaling numbers.
            scaling={key: numbers[key] for key in numbers if key != "rope_theta" or key in decoder.rope.scaling},
            sections=(attention.head_dim // 2,),
        ),
        qk_norm=hasattr(attention, "q_norm"),
        qkv_bias=attention.q_proj.bias is not None,
        output_bias=attention.o_proj.bias is not None,
        mlp_bias=layer.mlp.gate_proj.bias is not None,
    )
    assert decoder.max_tokens == config.max_position_embeddings


def _windows_of(theirs: Any) -> tuple[int | None, ...]:
    """Return the window of each layer; Mistral's layers read it from the config, Llama's layers have none."""
    if theirs.config.model_type == "mistral":
        return (theirs.config.sliding_window,) * len(theirs.layers)
    return tuple(getattr(layer.self_attn, "sliding_window", None) for layer in theirs.layers)


SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS: list[dict[str, Any]] = [
    {"use_sliding_window": False, "sliding_window": 5},
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4},
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 28},
    {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING, FULL, FULL, SLIDING]},
    {"use_sliding_window": True, "sliding_window": 5, "layer_types": [FULL] * 4, "max_window_layers": 0},
    {"use_sliding_window": False, "sliding_window": 5, "layer_types": [SLIDING] * 4},
    {"use_sliding_window": None, "sliding_window": 5, "max_window_layers": 0},
]


@pytest.mark.parametrize("file_format", ["by transformers", "as on the Hub"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_qwen_windows_per_layer_equal_those_of_transformers(
    window: dict[str, Any], model_type: str, file_format: str
) -> None:
    values = {**changed(DECODERS[model_type], {"layer_types": None, "num_hidden_layers": 4}), **window}
    if window["use_sliding_window"] is None:
        del values["use_sliding_window"]
    config = read_by_transformers(values)
    theirs = build_on_meta(AutoModel.from_config, config)
    decoder = read_decoder(config_file(config.to_dict() if file_format == "by transformers" else values))
    assert decoder.windows == _windows_of(theirs)


@pytest.mark.parametrize("window", [1, 7, 10_000, None])
def test_mistral_window_applies_to_every_layer(window: int | None) -> None:
    values = {**MISTRAL, "sliding_window": window, "max_window_layers": 2, "use_sliding_window": False}
    assert read_decoder(config_file(values)).windows == (window,) * 3
    assert read_by_transformers(values).sliding_window == window


def test_head_dim_defaults_to_hidden_size_per_head_except_in_qwen3() -> None:
    for name in ("mistral", "llama", "qwen2"):
        assert read_decoder(config_file(changed(DECODERS[name], {"head_dim": None}))).head_dim == 60 // 6
    theirs = Qwen3Config(**SIZES)
    assert theirs.head_dim != theirs.hidden_size // theirs.num_attention_heads  # so Qwen3 requires head_dim


@pytest.mark.parametrize("factor", [1, 2.5, 4])
def test_dynamic_scaling_extends_the_trained_length(factor: float) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": factor}
    assert read_decoder(config_file({**LLAMA, "rope_parameters": rope})).max_tokens == int(128 * factor)


DECODER_REJECTED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "an unknown rope type": (
        "llama",
        {"rope_parameters.rope_type": "longrope"},
        ["rope_parameters: rope_type", "'longrope'", "yarn"],
    ),
    "an unknown rope type in an older file": (
        "llama 3",
        {"rope_scaling": {"type": "su", "factor": 2.0}},
        ["rope_scaling: ", "'su'", "yarn"],
    ),
    "a rope type that is not a string": ("llama", {"rope_parameters.rope_type": 3}, ["rope_type is 3"]),
    "rope parameters that are a list": ("llama", {"rope_parameters": [1]}, ["rope_parameters is [1]", "dict"]),
    "rope parameters per layer type": (
        "qwen3",
        {"rope_parameters": {FULL: ROPE, SLIDING: ROPE}},
        ["'rope_theta' is missing"],
    ),
    "no rope_theta": ("llama", {"rope_parameters.rope_theta": None}, ["'rope_theta' is missing"]),
    "no rope_theta in an older file": ("gte-qwen2", {"rope_theta": None}, ["'rope_theta' is missing"]),
    "a rope_theta that is a string": ("gte-qwen2", {"rope_theta": "1e6"}, ["rope_theta is '1e6'"]),
    "a rope_theta of 0": ("gte-qwen2", {"rope_theta": 0}, ["rope_theta is 0"]),
    "a partial rotary factor": ("llama", {"rope_parameters.partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "a partial rotary factor in an older file": ("llama 3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    **{
        f"{kind} scaling without a factor": (
            "llama",
            {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4}},
            ["rope_parameters: 'factor' is missing"],
        )
        for kind in ("linear", "dynamic", "yarn")
    },
    "scaling by a string": ("llama", {"rope_parameters.factor": "4"}, ["rope_parameters: factor is '4'"]),
    "scaling by 0": ("llama", {"rope_parameters.factor": 0}, ["rope_parameters: factor is 0"]),
    **{
        f"llama3 scaling without {key}": (
            "llama 3",
            {f"rope_scaling.{key}": None},
            [f"rope_scaling: '{key}' is missing"],
        )
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    },
    "sections with a wrong sum": (
        "llama",
        {"rope_parameters.mrope_section": [1, 2, 3]},
        ["mrope_section is [1, 2, 3]", "5"],
    ),
    "no is_causal in a qwen2": ("qwen2", {"is_causal": None}, ["'is_causal' is missing"]),
    "an is_causal that is a string": ("qwen2", {"is_causal": "false"}, ["is_causal is 'false'"]),
    "a bidirectional mistral": ("mistral", {"is_causal": False}, ["is_causal is False", "family requires True"]),
    "a bidirectional qwen3": ("qwen3", {"is_causal": False}, ["is_causal is False", "family requires True"]),
    "an activation of other architectures": ("llama", {"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "silu"]),
    "an unknown decoder activation": ("llama", {"hidden_act": "swiglu"}, ["hidden_act is 'swiglu'", "silu"]),
    "heads that are not a multiple of the key heads": (
        "llama",
        {"num_key_value_heads": 4},
        ["num_attention_heads is 6", "num_key_value_heads 4"],
    ),
    "no head_dim in a qwen3": ("qwen3", {"head_dim": None}, ["'head_dim' is missing"]),
    "an odd head_dim": ("llama", {"head_dim": 15}, ["head_dim of 15"]),
    "an odd head_dim by division": ("qwen2", {"hidden_size": 90, "head_dim": None}, ["head_dim of 15"]),
    "a window with bidirectional attention": (
        "qwen2",
        {
            "is_causal": False,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": None,
            "max_window_layers": 0,
        },
        ["sliding_window is 9", "causal"],
    ),
    "a window of 0": ("mistral", {"sliding_window": 0}, ["sliding_window is 0"]),
    "a window that is a string": ("mistral", {"sliding_window": "7"}, ["sliding_window is '7'"]),
    "no first layer with a window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": None, "max_window_layers": None},
        ["'max_window_layers' is missing"],
    ),
    "layer types for too few layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": [FULL, FULL]},
        ["layer_types", FULL, "3 layers"],
    ),
    "an unknown layer type": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": [FULL, FULL, "chunked_attention"]},
        ["layer_types", "chunked_attention"],
    ),
    **{
        f"no {key}": ("llama", {key: None}, [f"'{key}' is missing"])
        for key in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "max_position_embeddings",
            "rms_norm_eps",
            "hidden_act",
        )
    },
    "an MLP bias that is a string": ("llama", {"mlp_bias": "yes"}, ["mlp_bias is 'yes'"]),
    "a bias that is a number": ("llama", {"attention_bias": 1}, ["attention_bias is 1"]),
}


@pytest.mark.parametrize("case", DECODER_REJECTED)
def test_invalid_decoder_config_is_rejected(case: str) -> None:
    name, changes, fragments = DECODER_REJECTED[case]
    message = error_message(read_decoder, changed(DECODERS[name], changes))
    assert [fragment for fragment in fragments if fragment not in message] == []


@pytest.mark.parametrize("location", ["rope_parameters", "top"])
def test_partial_rotary_factor_of_1_is_accepted(location: str) -> None:
    values = changed(
        LLAMA, {"partial_rotary_factor" if location == "top" else "rope_parameters.partial_rotary_factor": 1}
    )
    assert read_decoder(config_file(values)).rope.kind == "yarn"


def test_rope_parameters_override_older_keys() -> None:
    """Read a file with both formats: it was converted, and the older keys were not removed."""
    values = {**LLAMA, "rope_theta": 7.0, "rope_scaling": None}
    assert (
        read_decoder(config_file(values)).rope.theta
        == read_by_transformers(values).rope_parameters["rope_theta"]
        == 1e6
    )


CLIP = CLIPConfig(
    projection_dim=28,
    text_config={
        "vocab_size": 99,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 17,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-3,
        "eos_token_id": 98,
    },
    vision_config={
        "hidden_size": 40,
        "intermediate_size": 68,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-6,
    },
).to_dict()
# As in clip-vit-large-patch14-336: only values that differ from the defaults of transformers' classes.
CLIP_SPARSE = {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
    },
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
}
CLIP_DEFAULTS = {"model_type": "clip", "projection_dim": 512, "text_config": {}, "vision_config": {}}
CLIPS = {
    "complete": CLIP,
    "only values that differ from the defaults": CLIP_SPARSE,
    "defaults": CLIP_DEFAULTS,
    # OpenAI's first files have these older keys next to the newer ones; some are null.
    "same values in older keys": {
        **CLIP_SPARSE,
        "text_config_dict": CLIP_SPARSE["text_config"],
        "vision_config_dict": None,
    },
    "other values in older keys": {
        **CLIP,
        "text_config_dict": {"num_hidden_layers": 2, "hidden_size": 64},
        "vision_config_dict": {"hidden_size": 96, "image_size": 64},
    },
    "empty older key": {**CLIP, "text_config_dict": {}},
    "older keys only": {
        "model_type": "clip",
        "projection_dim": 28,
        "text_config_dict": CLIP["text_config"],
        "vision_config_dict": CLIP["vision_config"],
    },
}
CLIP_KEYS: list[tuple[str, object]] = [
    ("text_config.vocab_size", 77),
    ("text_config.hidden_size", 64),
    ("text_config.intermediate_size", 61),
    ("text_config.num_hidden_layers", 2),
    ("text_config.num_attention_heads", 4),
    ("text_config.max_position_embeddings", 33),
    ("text_config.hidden_act", "gelu"),
    ("text_config.layer_norm_eps", 1e-3),
    ("text_config.eos_token_id", 2),
    ("text_config.eos_token_id", 320),
    ("vision_config.hidden_size", 96),
    ("vision_config.intermediate_size", 61),
    ("vision_config.num_hidden_layers", 2),
    ("vision_config.num_attention_heads", 6),
    ("vision_config.image_size", 336),
    ("vision_config.patch_size", 14),
    ("vision_config.hidden_act", "gelu"),
    ("vision_config.layer_norm_eps", 1e-3),
    ("vision_config.num_channels", 3),
    ("projection_dim", 60),
]


def read_clip(file: JsonFile) -> ClipConfig:
    return read_with_defaults(ClipConfig.read, file)


def clip_config_of_transformers(values: Values) -> ClipConfig:
    config = read_by_transformers(values)
    theirs = build_on_meta(CLIPModel, config)
    text, vision = theirs.text_model, theirs.vision_model
    return ClipConfig(
        text=_clip_tower(text.encoder, config.text_config),
        vision=_clip_tower(vision.encoder, config.vision_config),
        hidden_size=theirs.visual_projection.out_features,
        vocab_size=text.embeddings.token_embedding.num_embeddings,
        max_tokens=text.embeddings.position_embedding.num_embeddings,
        end_of_text=None if config.text_config.eos_token_id == 2 else config.text_config.eos_token_id,
        image_size=vision.embeddings.image_size,
        patch_size=vision.embeddings.patch_size,
    )


def _clip_tower(theirs: Any, config: PreTrainedConfig) -> TowerConfig:
    layer = theirs.layers[0]
    return TowerConfig(
        hidden_size=layer.mlp.fc2.out_features,
        layers=len(theirs.layers),
        heads=layer.self_attn.num_heads,
        intermediate_size=layer.mlp.fc1.out_features,
        norm_eps=layer.layer_norm1.eps,
        activation=ACTIVATIONS[config.hidden_act],
    )


@pytest.mark.parametrize("name", CLIPS)
def test_clip_config_equals_that_of_transformers(name: str) -> None:
    ours = read_clip(config_file(CLIPS[name]))
    assert ours == clip_config_of_transformers(CLIPS[name])
    theirs = build_on_meta(CLIPModel, read_by_transformers(CLIPS[name]))
    assert ours.vision_tokens == theirs.vision_model.embeddings.num_positions


@pytest.mark.parametrize(("key", "value"), CLIP_KEYS, ids=str)
def test_single_key_in_a_clip_config_equals_transformers(key: str, value: object) -> None:
    values = changed(CLIP_DEFAULTS, {key: value})
    assert read_clip(config_file(values)) == clip_config_of_transformers(values)


@pytest.mark.parametrize("key", sorted({key for key, _ in CLIP_KEYS if "." in key}))
def test_missing_key_in_a_clip_config_has_the_default_of_transformers(key: str) -> None:
    tower, _, name = key.partition(".")
    default = getattr(CLIPTextConfig() if tower == "text_config" else CLIPVisionConfig(), name)
    assert read_clip(config_file(changed(CLIP_DEFAULTS, {key: default}))) == read_clip(config_file(CLIP_DEFAULTS))


CLIP_REJECTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gray images": ({"vision_config.num_channels": 1}, ["vision_config: num_channels is 1", "3"]),
    "text heads that do not divide": (
        {"text_config.num_attention_heads": 5},
        ["text_config: hidden_size 36", "num_attention_heads 5"],
    ),
    "vision heads that do not divide": (
        {"vision_config.num_attention_heads": 3},
        ["vision_config: hidden_size 40", "num_attention_heads 3"],
    ),
    "an unknown activation": ({"text_config.hidden_act": "gegelu"}, ["text_config: hidden_act is 'gegelu'"]),
    "several end-of-text ids": ({"text_config.eos_token_id": [2, 98]}, ["text_config: eos_token_id is [2, 98]"]),
    "an image size with two sides": ({"vision_config.image_size": [48, 48]}, ["vision_config: image_size is [48, 48]"]),
    "a patch size of 0": ({"vision_config.patch_size": 0}, ["vision_config: patch_size is 0"]),
    "an epsilon of 0": ({"vision_config.layer_norm_eps": 0}, ["vision_config: layer_norm_eps is 0"]),
    "an older key that is a string": ({"text_config_dict": "none"}, ["text_config_dict is 'none'"]),
    "an older key with a size that is a string": (
        {"vision_config_dict": {"image_size": "48"}},
        ["transformers cannot read it", "image_size", "'48'"],
    ),
    "a tower that is a list": ({"text_config": [1]}, ["text_config is [1]"]),
}


@pytest.mark.parametrize("case", CLIP_REJECTED)
def test_invalid_clip_config_is_rejected(case: str) -> None:
    changes, fragments = CLIP_REJECTED[case]
    message = error_message(read_clip, changed(CLIP, changes))
    assert [fragment for fragment in fragments if fragment not in message] == []


VL_TEXT = {**SIZES, "hidden_size": 96, "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
VL = HfQwen2VLConfig(
    text_config=VL_TEXT,
    vision_config={
        "depth": 2,
        "embed_dim": 40,
        "num_heads": 2,
        "mlp_ratio": 3,
        "hidden_size": 96,
        "hidden_act": "gelu",
        "patch_size": 7,
        "spatial_merge_size": 3,
        "temporal_patch_size": 4,
    },
    image_token_id=93,
).to_dict()
GME = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "image_token_id": 151655,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_config": {"hidden_size": 1536, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vocab_size": 151936,
}
VLS = {
    "by transformers": VL,
    "as on the Hub": GME,
    "as on the Hub, newer": changed(
        GME, {"rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}}
    ),
}
VISION_KEYS: list[tuple[str, object]] = [
    ("depth", 3),
    ("embed_dim", 320),
    ("num_heads", 8),
    ("mlp_ratio", 2),
    ("hidden_act", "gelu"),
    ("patch_size", 16),
    ("spatial_merge_size", 1),
    ("temporal_patch_size", 1),
]


def read_vl(file: JsonFile) -> Qwen2VLConfig:
    return read_with_defaults(Qwen2VLConfig.read, file)


def assert_equals_qwen2_vl_of_transformers(values: Values) -> None:
    """Compare a complete configuration with the network that transformers builds from it."""
    values = {**values, "num_hidden_layers": 2} if "text_config" not in values else values
    config = read_by_transformers(values)
    theirs = build_on_meta(Qwen2VLModel, config)
    ours = read_vl(config_file(values))
    block, tower, text = theirs.visual.blocks[0], theirs.visual, theirs.language_model
    assert ours.vision == TowerConfig(
        hidden_size=tower.patch_embed.embed_dim,
        layers=len(tower.blocks),
        heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        norm_eps=block.norm1.eps,
        activation=ACTIVATIONS[config.vision_config.hidden_act],
    )
    assert tower.merger.ln_q.eps == ours.vision.norm_eps
    assert (ours.frames, ours.patch_size, ours.patch_size) == tower.patch_embed.proj.kernel_size
    assert ours.merge == tower.spatial_merge_size
    assert ours.image_token == config.image_token_id
    attention, mlp = text.layers[0].self_attn, text.layers[0].mlp
    assert (ours.hidden_size, ours.vocab_size) == (text.embed_tokens.embedding_dim, text.embed_tokens.num_embeddings)
    assert (ours.text.layers, ours.text.intermediate_size) == (len(text.layers), mlp.gate_proj.out_features)
    assert ours.text.heads == attention.num_heads
    assert (ours.text.kv_heads, ours.text.head_dim) == (attention.num_key_value_heads, attention.head_dim)
    assert ours.text.norm_eps == text.norm.variance_epsilon
    assert (ours.text.causal, ours.text.qk_norm) == (attention.is_causal, hasattr(attention, "q_norm"))
    biases = [linear.bias is not None for linear in (attention.q_proj, attention.o_proj, mlp.gate_proj)]
    assert [ours.text.qkv_bias, ours.text.output_bias, ours.text.mlp_bias] == biases
    assert ours.text.windows == (None,) * len(text.layers)
    rope = config.text_config.rope_parameters
    assert (ours.text.rope.kind, ours.text.rope.theta) == (rope["rope_type"], rope["rope_theta"])
    assert list(ours.text.rope.sections) == text.rotary_emb.mrope_section
    assert ours.max_tokens == config.text_config.max_position_embeddings


@pytest.mark.parametrize("name", VLS)
def test_qwen2_vl_config_equals_that_of_transformers(name: str) -> None:
    assert_equals_qwen2_vl_of_transformers(VLS[name])


@pytest.mark.parametrize(("key", "value"), VISION_KEYS, ids=str)
def test_single_key_in_a_vision_config_equals_transformers(key: str, value: object) -> None:
    assert_equals_qwen2_vl_of_transformers(changed(GME, {f"vision_config.{key}": value}))


@pytest.mark.parametrize("key", [key for key, _ in VISION_KEYS])
def test_missing_key_in_a_vision_config_has_the_default(key: str) -> None:
    default = getattr(Qwen2VLVisionConfig(), key)
    with_default = changed(GME, {f"vision_config.{key}": default})
    assert read_vl(config_file(with_default)) == read_vl(config_file(GME))


VL_REJECTED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "no sections": ("as on the Hub", {"rope_scaling.mrope_section": None}, ["mrope_section"]),
    "sections with a wrong sum": (
        "as on the Hub",
        {"rope_scaling.mrope_section": [16, 24, 25]},
        ["mrope_section is [16, 24, 25]", "64"],
    ),
    "sections with a wrong sum in a nested config": (
        "by transformers",
        {"text_config.rope_parameters.mrope_section": [2, 3, 4]},
        ["text_config: rope_parameters: mrope_section is [2, 3, 4]", "8"],
    ),
    "two sections": ("as on the Hub", {"rope_scaling.mrope_section": [32, 32]}, ["mrope_section"]),
    "four sections": ("as on the Hub", {"rope_scaling.mrope_section": [16, 16, 16, 16]}, ["mrope_section"]),
    "a section of 0": ("as on the Hub", {"rope_scaling.mrope_section": [0, 32, 32]}, ["[0, 32, 32]"]),
    "sections that are strings": ("as on the Hub", {"rope_scaling.mrope_section": ["16", 24, 24]}, ["['16', 24, 24]"]),
    "heads that do not divide": (
        "by transformers",
        {"vision_config.num_heads": 3},
        ["vision_config: embed_dim is 40", "3 heads"],
    ),
    "a head size that is not a multiple of 4": (
        "by transformers",
        {"vision_config.num_heads": 20},
        ["embed_dim is 40", "20 heads"],
    ),
    "an unknown activation": (
        "as on the Hub",
        {"vision_config.hidden_act": "mish"},
        ["vision_config: hidden_act is 'mish'"],
    ),
    "an MLP ratio of 0": ("as on the Hub", {"vision_config.mlp_ratio": 0}, ["vision_config: mlp_ratio is 0"]),
    "a patch size with two sides": (
        "as on the Hub",
        {"vision_config.patch_size": [14, 14]},
        ["patch_size is [14, 14]"],
    ),
    "a bidirectional text decoder": ("as on the Hub", {"is_causal": False}, ["is_causal is False", "True"]),
}


@pytest.mark.parametrize("case", VL_REJECTED)
def test_invalid_qwen2_vl_config_is_rejected(case: str) -> None:
    name, changes, fragments = VL_REJECTED[case]
    message = error_message(read_vl, changed(VLS[name], changes))
    assert [fragment for fragment in fragments if fragment not in message] == []
