"""Shapes: every key of config.json, as transformers writes it and as the hub's older files have it.

What a shape must be is asked of transformers' own modules, built from the same file on meta; each refusal names file,
key and value.
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
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.activations import ACT2FN
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaEmbeddings

from triton_embed.kernels import ops
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.json_file import JsonFile
from triton_embed.python_backend.shapes import ClipShape, DecoderShape, EncoderShape, Qwen2VLShape, Rope, TowerShape

Values = Mapping[str, Any]
FILE = Path("/checkpoint/config.json")

# transformers' names for activations -> ours
ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


def stated(values: Values) -> JsonFile:
    """config.json with these values, through JSON and back."""
    file = JsonFile(FILE)
    file.values = json.loads(json.dumps(values))
    return file


def changed(values: Values, changes: Values) -> dict[str, Any]:
    """With other values, `vision_config.depth` meaning one inside; None takes a key away."""
    found = json.loads(json.dumps(values))
    for key, value in changes.items():
        *parents, last = key.split(".")
        inside = found
        for parent in parents:
            inside = inside[parent]
        if value is None:
            inside.pop(last, None)
        else:
            inside[last] = value
    return dict(found)


def read_by_transformers(values: Values) -> PreTrainedConfig:
    return AutoConfig.for_model(values["model_type"]).from_dict(json.loads(json.dumps(values)))


def on_meta(build: Callable[[PreTrainedConfig], torch.nn.Module], config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return build(config)


def refusal(read: Callable[[JsonFile], object], values: Values) -> str:
    with pytest.raises(ConfigError) as refused:
        read(stated(values))
    said = str(refused.value)
    assert said.startswith(f"{FILE}: ")
    return said


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
def test_encoder(name: str) -> None:
    config = read_by_transformers(changed(ENCODERS[name], {"num_hidden_layers": 3}))
    theirs = on_meta(AutoModel.from_config, config)
    layer, embeddings = theirs.encoder.layer[0], theirs.embeddings
    found = EncoderShape.read(stated(changed(ENCODERS[name], {"num_hidden_layers": 3})))
    first = 0 if name == "bert" else _first_position(config)
    assert found == EncoderShape(
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
    assert found.max_tokens == embeddings.position_embeddings.num_embeddings - first


def _first_position(config: PreTrainedConfig) -> int:
    """The row of the first of a text's tokens."""
    ids = torch.full((1, 5), config.pad_token_id + 7)
    return int(XLMRobertaEmbeddings.create_position_ids_from_input_ids(ids, config.pad_token_id)[0, 0])


def test_bge_m3_takes_as_many_tokens_as_its_card_says() -> None:
    assert EncoderShape.read(stated(BGE_M3)).max_tokens == 8192


@pytest.mark.parametrize("theirs", ACTIVATIONS)
def test_an_activation_is_the_one_transformers_means(theirs: str) -> None:
    found = EncoderShape.read(stated({**BERT, "hidden_act": theirs})).activation
    assert found == ACTIVATIONS[theirs]
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(ops.activation(x, found), ACT2FN[theirs](x), rtol=1e-12, atol=1e-12)


ENCODER_REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    # name: file, changes, words the error must have beside the file's name
    "relative positions": (
        "bert",
        {"position_embedding_type": "relative_key"},
        ["position_embedding_type", "'relative_key'", "absolute"],
    ),
    "an unknown activation": ("bert", {"hidden_act": "mish"}, ["hidden_act", "'mish'", "gelu_new"]),
    "an activation that is a list": ("bert", {"hidden_act": ["gelu"]}, ["hidden_act", "['gelu']", "str"]),
    "heads that do not divide": ("bert", {"num_attention_heads": 7}, ["hidden_size 60", "num_attention_heads 7"]),
    "no heads": ("bert", {"num_attention_heads": 0}, ["num_attention_heads is 0"]),
    "a size that is text": ("bert", {"hidden_size": "60"}, ["hidden_size is '60'"]),
    "an epsilon that is text": ("bert", {"layer_norm_eps": "1e-12"}, ["layer_norm_eps is '1e-12'"]),
    "an epsilon below 0": ("bert", {"layer_norm_eps": -1e-12}, ["layer_norm_eps is -1e-12"]),
    "no padding id where positions count from it": (
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


@pytest.mark.parametrize("case", ENCODER_REFUSED)
def test_an_encoder_that_is_refused(case: str) -> None:
    name, changes, words = ENCODER_REFUSED[case]
    said = refusal(EncoderShape.read, changed(ENCODERS[name], changes))
    assert [word for word in words if word not in said] == []


def test_bert_needs_no_padding_id() -> None:
    assert EncoderShape.read(stated(changed(BERT, {"pad_token_id": None}))).first_position == 0


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
# The specs of the families: what their weights demand.
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
# Laid out as the files on the hub are, which transformers 4 wrote.
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
    "llama, biased": changed(LLAMA, {"attention_bias": True}),
    "llama, biased throughout": changed(LLAMA, {"attention_bias": True, "mlp_bias": True}),
    "llama with an MLP's bias": changed(LLAMA, {"mlp_bias": True}),
    "llama with heads of its own width": changed(LLAMA, {"head_dim": 14}),
    "llama without a head_dim": changed(LLAMA, {"head_dim": None}),
    "llama with a window it does not have": changed(
        LLAMA, {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}
    ),
    "qwen2": QWEN2,
    "qwen2 both ways": changed(QWEN2, {"is_causal": False}),
    "qwen3": QWEN3,
    "qwen3, biased": changed(QWEN3, {"attention_bias": True}),
    "e5-mistral": E5_MISTRAL,
    "gte-qwen2": GTE_QWEN2,
    "gte-qwen2 with a null for scaling": {**GTE_QWEN2, "rope_scaling": None},
    "qwen3-embedding": QWEN3_EMBEDDING,
    "llama 3": LLAMA_3,
    "llama with linear scaling": {**LLAMA_3, "rope_scaling": {"type": "linear", "factor": 2}},
}


def read_decoder(file: JsonFile) -> DecoderShape:
    return DecoderShape.read(file, **SPECS[file.values.get("model_type", "llama")])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str) -> None:
    values = changed(DECODERS[name], {"num_hidden_layers": 3})
    config = read_by_transformers(values)
    theirs = on_meta(AutoModel.from_config, config)
    layer, rope = theirs.layers[0], config.rope_parameters
    attention = layer.self_attn
    found = read_decoder(stated(values))
    numbers = {key: float(value) for key, value in rope.items() if not isinstance(value, str)}
    assert found == DecoderShape(
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
        rope=Rope(
            theta=rope["rope_theta"],
            head_dim=attention.head_dim,
            positions=config.max_position_embeddings,
            kind=rope["rope_type"],
            # Where the theta stands is transformers' affair.
            scaling={key: numbers[key] for key in numbers if key != "rope_theta" or key in found.rope.scaling},
            sections=(attention.head_dim // 2,),
        ),
        qk_norm=hasattr(attention, "q_norm"),
        qkv_bias=attention.q_proj.bias is not None,
        output_bias=attention.o_proj.bias is not None,
        mlp_bias=layer.mlp.gate_proj.bias is not None,
    )
    assert found.max_tokens == config.max_position_embeddings


def _windows_of(theirs: Any) -> tuple[int | None, ...]:
    """Each layer's window; Mistral's layers read it from the config, Llama's know none."""
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


@pytest.mark.parametrize("written", ["by transformers", "as on the hub"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_qwen_windows_are_layer_by_layer(window: dict[str, Any], model_type: str, written: str) -> None:
    values = {**changed(DECODERS[model_type], {"layer_types": None, "num_hidden_layers": 4}), **window}
    if window["use_sliding_window"] is None:
        del values["use_sliding_window"]
    config = read_by_transformers(values)
    theirs = on_meta(AutoModel.from_config, config)
    found = read_decoder(stated(config.to_dict() if written == "by transformers" else values))
    assert found.windows == _windows_of(theirs)


@pytest.mark.parametrize("window", [1, 7, 10_000, None])
def test_a_mistral_window_holds_in_every_layer(window: int | None) -> None:
    values = {**MISTRAL, "sliding_window": window, "max_window_layers": 2, "use_sliding_window": False}
    assert read_decoder(stated(values)).windows == (window,) * 3
    assert read_by_transformers(values).sliding_window == window


def test_only_qwen3_has_a_head_dim_of_its_own_by_default() -> None:
    for name in ("mistral", "llama", "qwen2"):
        assert read_decoder(stated(changed(DECODERS[name], {"head_dim": None}))).head_dim == 60 // 6
    theirs = Qwen3Config(**SIZES)
    assert theirs.head_dim != theirs.hidden_size // theirs.num_attention_heads  # why a Qwen3's has to be stated


@pytest.mark.parametrize("factor", [1, 2.5, 4])
def test_dynamic_scaling_reaches_beyond_the_trained_length(factor: float) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": factor}
    assert read_decoder(stated({**LLAMA, "rope_parameters": rope})).max_tokens == int(128 * factor)


DECODER_REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "an unknown kind of rope": (
        "llama",
        {"rope_parameters.rope_type": "longrope"},
        ["rope_parameters: rope_type", "'longrope'", "yarn"],
    ),
    "an unknown kind of rope in an older file": (
        "llama 3",
        {"rope_scaling": {"type": "su", "factor": 2.0}},
        ["rope_scaling: ", "'su'", "yarn"],
    ),
    "a kind of rope that is no text": ("llama", {"rope_parameters.rope_type": 3}, ["rope_type is 3"]),
    "rope parameters that are a list": ("llama", {"rope_parameters": [1]}, ["rope_parameters is [1]", "dict"]),
    "ropes by layer type": (
        "qwen3",
        {"rope_parameters": {FULL: ROPE, SLIDING: ROPE}},
        ["'rope_theta' is missing"],
    ),
    "no rope_theta": ("llama", {"rope_parameters.rope_theta": None}, ["'rope_theta' is missing"]),
    "no rope_theta in an older file": ("gte-qwen2", {"rope_theta": None}, ["'rope_theta' is missing"]),
    "a rope_theta of text": ("gte-qwen2", {"rope_theta": "1e6"}, ["rope_theta is '1e6'"]),
    "a rope_theta of nothing": ("gte-qwen2", {"rope_theta": 0}, ["rope_theta is 0"]),
    "half a head turned": ("llama", {"rope_parameters.partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "half a head turned in an older file": ("llama 3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    **{
        f"{kind} scaling without a factor": (
            "llama",
            {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4}},
            ["rope_parameters: 'factor' is missing"],
        )
        for kind in ("linear", "dynamic", "yarn")
    },
    "scaling by a text": ("llama", {"rope_parameters.factor": "4"}, ["rope_parameters: factor is '4'"]),
    "scaling by nothing": ("llama", {"rope_parameters.factor": 0}, ["rope_parameters: factor is 0"]),
    **{
        f"llama3 scaling without {key}": (
            "llama 3",
            {f"rope_scaling.{key}": None},
            [f"rope_scaling: '{key}' is missing"],
        )
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    },
    "sections of another sum": (
        "llama",
        {"rope_parameters.mrope_section": [1, 2, 3]},
        ["mrope_section is [1, 2, 3]", "5"],
    ),
    "a model that does not say whether it is causal": ("qwen2", {"is_causal": None}, ["'is_causal' is missing"]),
    "a causality of text": ("qwen2", {"is_causal": "false"}, ["is_causal is 'false'"]),
    "a mistral that looks both ways": ("mistral", {"is_causal": False}, ["is_causal is False", "family says True"]),
    "a qwen3 that looks both ways": ("qwen3", {"is_causal": False}, ["is_causal is False", "family says True"]),
    "an activation of others": ("llama", {"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "silu"]),
    "an activation of nobody": ("llama", {"hidden_act": "swiglu"}, ["hidden_act is 'swiglu'", "silu"]),
    "heads that do not share keys": (
        "llama",
        {"num_key_value_heads": 4},
        ["num_attention_heads is 6", "num_key_value_heads 4"],
    ),
    "no head_dim in a qwen3": ("qwen3", {"head_dim": None}, ["'head_dim' is missing"]),
    "an odd head_dim": ("llama", {"head_dim": 15}, ["head_dim of 15"]),
    "an odd head_dim by division": ("qwen2", {"hidden_size": 90, "head_dim": None}, ["head_dim of 15"]),
    "a window both ways": (
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
    "a window of nothing": ("mistral", {"sliding_window": 0}, ["sliding_window is 0"]),
    "a window of text": ("mistral", {"sliding_window": "7"}, ["sliding_window is '7'"]),
    "windows from an unknown layer on": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": None, "max_window_layers": None},
        ["'max_window_layers' is missing"],
    ),
    "layer types for other layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": [FULL, FULL]},
        ["layer_types", FULL, "3 layers"],
    ),
    "layer types of another kind": (
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
    "an MLP's bias of text": ("llama", {"mlp_bias": "yes"}, ["mlp_bias is 'yes'"]),
    "a bias that is a number": ("llama", {"attention_bias": 1}, ["attention_bias is 1"]),
}


@pytest.mark.parametrize("case", DECODER_REFUSED)
def test_a_decoder_that_is_refused(case: str) -> None:
    name, changes, words = DECODER_REFUSED[case]
    said = refusal(read_decoder, changed(DECODERS[name], changes))
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize("place", ["rope_parameters", "top"])
def test_whole_heads_may_be_stated(place: str) -> None:
    values = changed(LLAMA, {"partial_rotary_factor" if place == "top" else "rope_parameters.partial_rotary_factor": 1})
    assert read_decoder(stated(values)).rope.kind == "yarn"


def test_the_newer_way_to_state_a_rope_counts() -> None:
    """Files that hold both were converted, and the older keys left behind."""
    values = {**LLAMA, "rope_theta": 7.0, "rope_scaling": None}
    assert read_decoder(stated(values)).rope.theta == read_by_transformers(values).rope_parameters["rope_theta"] == 1e6


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
# As clip-vit-large-patch14-336 states itself: what differs from the classes' defaults.
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
    "stated in full": CLIP,
    "stated where it differs": CLIP_SPARSE,
    "not stated": CLIP_DEFAULTS,
    # OpenAI's first files have these keys beside the others, some of them null.
    "stated twice": {**CLIP_SPARSE, "text_config_dict": CLIP_SPARSE["text_config"], "vision_config_dict": None},
    "stated in two ways": {
        **CLIP,
        "text_config_dict": {"num_hidden_layers": 2, "hidden_size": 64},
        "vision_config_dict": {"hidden_size": 96, "image_size": 64},
    },
    "stated and taken back": {**CLIP, "text_config_dict": {}},
    "stated the older way alone": {
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


def clip_of_transformers(values: Values) -> ClipShape:
    config = read_by_transformers(values)
    theirs = on_meta(CLIPModel, config)
    text, vision = theirs.text_model, theirs.vision_model
    return ClipShape(
        text=_clip_tower(text.encoder, config.text_config),
        vision=_clip_tower(vision.encoder, config.vision_config),
        hidden_size=theirs.visual_projection.out_features,
        vocab_size=text.embeddings.token_embedding.num_embeddings,
        max_tokens=text.embeddings.position_embedding.num_embeddings,
        end_of_text=None if config.text_config.eos_token_id == 2 else config.text_config.eos_token_id,
        image_size=vision.embeddings.image_size,
        patch_size=vision.embeddings.patch_size,
    )


def _clip_tower(theirs: Any, config: PreTrainedConfig) -> TowerShape:
    layer = theirs.layers[0]
    return TowerShape(
        hidden_size=layer.mlp.fc2.out_features,
        layers=len(theirs.layers),
        heads=layer.self_attn.num_heads,
        intermediate_size=layer.mlp.fc1.out_features,
        norm_eps=layer.layer_norm1.eps,
        activation=ACTIVATIONS[config.hidden_act],
    )


@pytest.mark.parametrize("name", CLIPS)
def test_clip(name: str) -> None:
    found = ClipShape.read(stated(CLIPS[name]))
    assert found == clip_of_transformers(CLIPS[name])
    theirs = on_meta(CLIPModel, read_by_transformers(CLIPS[name]))
    assert found.vision_tokens == theirs.vision_model.embeddings.num_positions


@pytest.mark.parametrize(("key", "value"), CLIP_KEYS, ids=str)
def test_a_clip_that_states_one_key_alone(key: str, value: object) -> None:
    values = changed(CLIP_DEFAULTS, {key: value})
    assert ClipShape.read(stated(values)) == clip_of_transformers(values)


@pytest.mark.parametrize("key", sorted({key for key, _ in CLIP_KEYS if "." in key}))
def test_a_clip_that_leaves_one_key_out(key: str) -> None:
    """What stands for it is the default of transformers' own class."""
    tower, _, inner = key.partition(".")
    default = getattr(CLIPTextConfig() if tower == "text_config" else CLIPVisionConfig(), inner)
    assert ClipShape.read(stated(changed(CLIP_DEFAULTS, {key: default}))) == ClipShape.read(stated(CLIP_DEFAULTS))


CLIP_REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "grey pictures": ({"vision_config.num_channels": 1}, ["vision_config: num_channels is 1", "3"]),
    "no projection": ({"projection_dim": None}, ["'projection_dim' is missing"]),
    "text heads that do not divide": (
        {"text_config.num_attention_heads": 5},
        ["text_config: hidden_size 36", "num_attention_heads 5"],
    ),
    "vision heads that do not divide": (
        {"vision_config.num_attention_heads": 3},
        ["vision_config: hidden_size 40", "num_attention_heads 3"],
    ),
    "an activation of nobody": ({"text_config.hidden_act": "gegelu"}, ["text_config: hidden_act is 'gegelu'"]),
    "several ends of a text": ({"text_config.eos_token_id": [2, 98]}, ["text_config: eos_token_id is [2, 98]"]),
    "a picture of two sides": ({"vision_config.image_size": [48, 48]}, ["vision_config: image_size is [48, 48]"]),
    "a patch of nothing": ({"vision_config.patch_size": 0}, ["vision_config: patch_size is 0"]),
    "an epsilon of nothing": ({"vision_config.layer_norm_eps": 0}, ["vision_config: layer_norm_eps is 0"]),
    "an older key of text": ({"text_config_dict": "none"}, ["text_config_dict is 'none'"]),
    "an older key with a size of text": (
        {"vision_config_dict": {"image_size": "48"}},
        ["vision_config_dict: image_size is '48'"],
    ),
    "a tower that is a list": ({"text_config": [1]}, ["text_config is [1]"]),
}


@pytest.mark.parametrize("case", CLIP_REFUSED)
def test_a_clip_that_is_refused(case: str) -> None:
    changes, words = CLIP_REFUSED[case]
    said = refusal(ClipShape.read, changed(CLIP, changes))
    assert [word for word in words if word not in said] == []


VL_TEXT = {**SIZES, "hidden_size": 96, "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
VL = Qwen2VLConfig(
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
    "as on the hub": GME,
    "as on the hub, later": changed(
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


def assert_qwen2_vl(values: Values) -> None:
    """All of a shape, against the network that transformers makes of it."""
    values = {**values, "num_hidden_layers": 2} if "text_config" not in values else values
    config = read_by_transformers(values)
    theirs = on_meta(Qwen2VLModel, config)
    found = Qwen2VLShape.read(stated(values))
    block, tower, text = theirs.visual.blocks[0], theirs.visual, theirs.language_model
    assert found.vision == TowerShape(
        hidden_size=tower.patch_embed.embed_dim,
        layers=len(tower.blocks),
        heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        norm_eps=block.norm1.eps,
        activation=ACTIVATIONS[config.vision_config.hidden_act],
    )
    assert tower.merger.ln_q.eps == found.vision.norm_eps
    assert (found.frames, found.patch_size, found.patch_size) == tower.patch_embed.proj.kernel_size
    assert found.merge == tower.spatial_merge_size
    assert found.image_token == config.image_token_id
    attention, mlp = text.layers[0].self_attn, text.layers[0].mlp
    assert (found.hidden_size, found.vocab_size) == (text.embed_tokens.embedding_dim, text.embed_tokens.num_embeddings)
    assert (found.text.layers, found.text.intermediate_size) == (len(text.layers), mlp.gate_proj.out_features)
    assert found.text.heads == attention.num_heads
    assert (found.text.kv_heads, found.text.head_dim) == (attention.num_key_value_heads, attention.head_dim)
    assert found.text.norm_eps == text.norm.variance_epsilon
    assert (found.text.causal, found.text.qk_norm) == (attention.is_causal, hasattr(attention, "q_norm"))
    biases = [linear.bias is not None for linear in (attention.q_proj, attention.o_proj, mlp.gate_proj)]
    assert [found.text.qkv_bias, found.text.output_bias, found.text.mlp_bias] == biases
    assert found.text.windows == (None,) * len(text.layers)
    rope = config.text_config.rope_parameters
    assert (found.text.rope.kind, found.text.rope.theta) == (rope["rope_type"], rope["rope_theta"])
    assert list(found.text.rope.sections) == text.rotary_emb.mrope_section
    assert found.max_tokens == config.text_config.max_position_embeddings


@pytest.mark.parametrize("name", VLS)
def test_qwen2_vl(name: str) -> None:
    assert_qwen2_vl(VLS[name])


@pytest.mark.parametrize(("key", "value"), VISION_KEYS, ids=str)
def test_a_vision_tower_that_states_one_key_alone(key: str, value: object) -> None:
    assert_qwen2_vl(changed(GME, {f"vision_config.{key}": value}))


@pytest.mark.parametrize("key", [key for key, _ in VISION_KEYS])
def test_a_vision_tower_that_leaves_one_key_out(key: str) -> None:
    """What stands for it is the default of transformers' own class."""
    default = getattr(Qwen2VLVisionConfig(), key)
    with_it = changed(GME, {f"vision_config.{key}": default})
    assert Qwen2VLShape.read(stated(with_it)) == Qwen2VLShape.read(stated(GME))


VL_REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "no sections": ("as on the hub", {"rope_scaling.mrope_section": None}, ["mrope_section"]),
    "sections of another sum": (
        "as on the hub",
        {"rope_scaling.mrope_section": [16, 24, 25]},
        ["rope_scaling: mrope_section is [16, 24, 25]", "64"],
    ),
    "sections of nested text": (
        "by transformers",
        {"text_config.rope_parameters.mrope_section": [2, 3, 4]},
        ["text_config: rope_parameters: mrope_section is [2, 3, 4]", "8"],
    ),
    "two sections": ("as on the hub", {"rope_scaling.mrope_section": [32, 32]}, ["mrope_section"]),
    "four sections": ("as on the hub", {"rope_scaling.mrope_section": [16, 16, 16, 16]}, ["mrope_section"]),
    "a section of nothing": ("as on the hub", {"rope_scaling.mrope_section": [0, 32, 32]}, ["[0, 32, 32]"]),
    "sections of text": ("as on the hub", {"rope_scaling.mrope_section": ["16", 24, 24]}, ["['16', 24, 24]"]),
    "no image token": ("as on the hub", {"image_token_id": None}, ["'image_token_id' is missing"]),
    "heads that do not divide": (
        "by transformers",
        {"vision_config.num_heads": 3},
        ["vision_config: embed_dim is 40", "3 heads"],
    ),
    "heads without two axes": ("by transformers", {"vision_config.num_heads": 20}, ["embed_dim is 40", "20 heads"]),
    "an activation of nobody": (
        "as on the hub",
        {"vision_config.hidden_act": "mish"},
        ["vision_config: hidden_act is 'mish'"],
    ),
    "an MLP of nothing": ("as on the hub", {"vision_config.mlp_ratio": 0}, ["vision_config: mlp_ratio is 0"]),
    "patches of two sides": ("as on the hub", {"vision_config.patch_size": [14, 14]}, ["patch_size is [14, 14]"]),
    "a text that looks both ways": ("as on the hub", {"is_causal": False}, ["is_causal is False", "True"]),
    "a nested text without layers": (
        "by transformers",
        {"text_config.num_hidden_layers": None},
        ["text_config: 'num_hidden_layers' is missing"],
    ),
}


@pytest.mark.parametrize("case", VL_REFUSED)
def test_a_qwen2_vl_that_is_refused(case: str) -> None:
    name, changes, words = VL_REFUSED[case]
    said = refusal(Qwen2VLShape.read, changed(VLS[name], changes))
    assert [word for word in words if word not in said] == []
