"""Tests of ServingConfig and ModelConfig: values are read correctly, and contradictions are rejected by name.

The checkpoint files are written by transformers and sentence-transformers.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.base.modules import Dense as SentenceTransformersDense
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import fullname
from test_hf_config import CLIP, E5_MISTRAL, GME, GTE_QWEN2, QWEN3_EMBEDDING, VL
from torch import nn
from transformers import BertConfig, CLIPImageProcessorPil, Qwen2VLImageProcessorPil

from conftest import MINILM, REPOSITORY, serving
from triton_embed.kernels.ops import Ops
from triton_embed.python_backend.checkpoint import repository
from triton_embed.python_backend.checkpoint.class_defaults import read_with_defaults
from triton_embed.python_backend.checkpoint.config import Dense, ModelConfig, ServingConfig
from triton_embed.python_backend.checkpoint.hf_config import ClipConfig, DecoderConfig, EncoderConfig, Qwen2VLConfig
from triton_embed.python_backend.checkpoint.json_file import JsonFile
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.inputs.processors import TextProcessor
from triton_embed.python_backend.networks.weights import Naming
from triton_embed.python_backend.spec import ClipSpec, DecoderSpec, EncoderSpec, Qwen2VLSpec, Spec

ops = Ops.on("cpu", torch.float32)


def arguments(parameters: Mapping[str, str], name: str = "bge", gpu: bool = False) -> dict[str, str]:
    """Build the arguments that Triton passes to `initialize`."""
    values = {key: {"string_value": value} for key, value in parameters.items()}
    return {
        "model_config": json.dumps({"name": name, "parameters": values}),
        "model_repository": f"/srv/repository/{name}",
        "model_instance_kind": "GPU" if gpu else "CPU",
        "model_instance_device_id": "3" if gpu else "0",
    }


def test_every_parameter_is_parsed_with_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_EMBED_CHECKPOINTS", raising=False)
    config = ServingConfig.from_triton(
        arguments(
            {
                "checkpoint": "BAAI/bge-small-en-v1.5",
                "checkpoint_package": "some_package",
                "max_request_tokens": "9000",
                "model_types": "bert, roberta",
                "aliases": " BAAI/bge ,small,",
                "dtype": "bfloat16",
                "pooling": "cls",
                "max_tokens": "128",
                "max_batch_tokens": "2048",
                "matryoshka_dimensions": "256, 64,128",
                "is_matryoshka": "True",
                "query_instruction": "Represent this, please: ",
                "image_positions": "sequential",
                "min_image_tokens": "4",
                "max_image_tokens": "99",
                "threads": "1",
            }
        )
    )
    assert config == ServingConfig(
        name="bge",
        checkpoint="BAAI/bge-small-en-v1.5",
        checkpoint_package="some_package",
        max_request_tokens=9000,
        checkpoint_root=Path("/srv/checkpoints"),
        model_types=("bert", "roberta"),
        device="cpu",
        aliases=("BAAI/bge", "small"),
        dtype="bfloat16",
        pooling="cls",
        max_tokens=128,
        max_batch_tokens=2048,
        matryoshka_dimensions=(64, 128, 256),
        is_matryoshka=True,
        query_instruction="Represent this, please: ",
        image_positions="sequential",
        min_image_tokens=4,
        max_image_tokens=99,
        threads=1,
    )
    assert config.thread_count == 1


def test_defaults_depend_on_the_device() -> None:
    on_cpu = ServingConfig.from_triton(arguments({"checkpoint": "a/b"}))
    on_gpu = ServingConfig.from_triton(arguments({"checkpoint": "a/b"}, gpu=True))
    assert (on_cpu.device, on_gpu.device) == ("cpu", "cuda:3")
    assert on_cpu.thread_count == len(os.sched_getaffinity(0))
    assert not on_cpu.is_matryoshka
    # GME's official limits
    assert (on_cpu.kernels, on_cpu.cuda_graphs, on_cpu.prefix_reuse) == ("auto", True, True)
    assert (on_cpu.image_positions, on_cpu.min_image_tokens, on_cpu.max_image_tokens) == ("mrope", 256, 1280)


@pytest.mark.parametrize(
    ("groups", "instances"),
    [
        ([{"kind": "KIND_CPU", "count": 1, "gpus": []}], 1),
        ([{"kind": "KIND_CPU", "count": 2, "gpus": []}], 2),
        ([{"kind": "KIND_GPU", "count": 2, "gpus": [0, 1, 2, 3]}], 8),
        ([{"kind": "KIND_GPU", "count": 1, "gpus": [0]}, {"kind": "KIND_CPU", "count": 3}], 4),
        ([], 1),
    ],
)
def test_instances_of_all_groups_are_counted(groups: list[dict[str, object]], instances: int) -> None:
    given = arguments({"checkpoint": "a/b"})
    given["model_config"] = json.dumps(json.loads(given["model_config"]) | {"instance_group": groups})
    config = ServingConfig.from_triton(given)
    assert config.instances == instances
    assert config.thread_count == max(1, len(os.sched_getaffinity(0)) // instances)


def test_environment_variable_sets_the_checkpoint_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_EMBED_CHECKPOINTS", "/data/models")
    assert ServingConfig.from_triton(arguments({"checkpoint": "a/b"})).checkpoint_root == Path("/data/models")


@pytest.mark.parametrize("family", repository.model_names(REPOSITORY))
def test_parameters_of_the_model_repository_are_accepted(family: str) -> None:
    declared = repository.read_config(REPOSITORY, family).parameters
    parameters = {key: declared[key].string_value for key in declared}
    config = ServingConfig.from_triton(arguments(parameters, family))
    assert config.checkpoint == parameters["checkpoint"]
    assert config.pooling == parameters.get("pooling", "")


@pytest.mark.parametrize(
    ("parameters", "fragments"),
    [
        ({"checkpoint": "a/b", "max_token": "12"}, ["'max_token'", "max_tokens"]),
        ({"checkpoint": "a/b", "checkpoint_root": "/"}, ["'checkpoint_root'"]),
        ({"checkpoint": "a/b", "device": "cuda:1"}, ["'device'"]),
        ({"checkpoint": "a/b", "name": "x"}, ["'name'"]),
        ({"dtype": "float32"}, ["'checkpoint' is missing"]),
        ({"checkpoint": "a/b", "dtype": "int4"}, ["dtype", "'int4'", "bfloat16"]),
        ({"checkpoint": "a/b", "max_tokens": "many"}, ["max_tokens", "'many'", "whole number"]),
        ({"checkpoint": "a/b", "max_tokens": "-1"}, ["max_tokens", "'-1'", "whole number"]),
        ({"checkpoint": "a/b", "max_tokens": "1.5"}, ["max_tokens", "'1.5'"]),
        ({"checkpoint": "a/b", "max_tokens": ""}, ["max_tokens", "''"]),
        ({"checkpoint": "a/b", "is_matryoshka": "1"}, ["is_matryoshka", "'1'", "true or false"]),
        ({"checkpoint": "a/b", "matryoshka_dimensions": "64,x"}, ["matryoshka_dimensions", "'64,x'", "list"]),
        ({"checkpoint": "a/b", "image_positions": "grid"}, ["image_positions", "'grid'", "mrope, sequential"]),
        ({"checkpoint": "a/b", "kernels": "triton"}, ["kernels", "'triton'", "auto, reference"]),
        ({"checkpoint": "a/b", "cuda_graphs": "maybe"}, ["cuda_graphs", "'maybe'", "true or false"]),
        ({"checkpoint": "a/b", "prefix_reuse": "1"}, ["prefix_reuse", "'1'", "true or false"]),
        ({"checkpoint": "a/b", "image_positions": ""}, ["image_positions", "''", "mrope, sequential"]),
        ({"checkpoint": "a/b", "min_image_tokens": "-4"}, ["min_image_tokens", "'-4'", "whole number"]),
        ({"checkpoint": "a/b", "max_image_tokens": "1,280"}, ["max_image_tokens", "'1,280'", "whole number"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_invalid_parameter_is_rejected(parameters: dict[str, str], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ServingConfig.from_triton(arguments(parameters))
    assert str(error.value).startswith("bge/config.pbtxt: ")
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write the JSON files of a BERT with CLS pooling."""
    BertConfig(
        vocab_size=97,
        hidden_size=60,
        num_hidden_layers=3,
        num_attention_heads=6,
        intermediate_size=92,
        max_position_embeddings=77,
        type_vocab_size=3,
        layer_norm_eps=1e-7,
        hidden_act="gelu_new",
    ).save_pretrained(tmp_path)
    Pooling(60, pooling_mode="cls").save(str(_make_directory(tmp_path / "1_Pooling")))
    return tmp_path


def _make_directory(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return directory


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; the value None removes a key."""
    content = {**(json.loads(file.read_text()) if file.is_file() else {}), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def read(directory: Path, **operator: object) -> ModelConfig:
    return ModelConfig.from_checkpoint(directory, serving(**operator), EncoderSpec())


def test_minimal_checkpoint_has_defaults(checkpoint: Path) -> None:
    config = read(checkpoint)
    assert config == ModelConfig(
        model_type="bert",
        network_config=EncoderConfig.read(JsonFile(checkpoint / CONFIG)),
        pooling="cls",
        max_tokens=77,
        directory=checkpoint,
    )
    assert (config.vocab_size, config.dimensions) == (97, 60)
    assert (config.dense, config.lowercase, config.matryoshka, config.prompts) == ((), False, None, {})
    assert config.image_normalization == ()


def test_config_of_the_real_minilm() -> None:
    config = read(MINILM, pooling="mean")
    assert (config.dimensions, config.network_config.layers, config.pooling, config.max_tokens) == (384, 6, "mean", 256)
    assert (config.network_config.activation, config.lowercase, config.matryoshka) == ("gelu_erf", False, None)


QWEN3 = DecoderSpec(causal=True, qk_norm=True, qkv_bias=False, eos="<|endoftext|>")
GTE = DecoderSpec(causal=None, qk_norm=False, qkv_bias=True, eos="<|endoftext|>")
E5 = DecoderSpec(causal=True, qk_norm=False, qkv_bias=False, eos="eos_token")


@pytest.mark.parametrize(
    ("spec", "config", "expected"),
    [
        # expected: class of the network config, dimensions, maximum tokens, vocabulary size
        (E5, E5_MISTRAL, (DecoderConfig, 4096, 32768, 32000)),
        (GTE, GTE_QWEN2, (DecoderConfig, 1536, 131072, 151646)),
        (QWEN3, QWEN3_EMBEDDING, (DecoderConfig, 1024, 32768, 151669)),
        (Qwen2VLSpec(), GME, (Qwen2VLConfig, 1536, 32768, 151936)),
        (Qwen2VLSpec(), VL, (Qwen2VLConfig, 96, 128, 103)),
    ],
    ids=["e5", "gte", "qwen3", "gme", "qwen2-vl by transformers"],
)
def test_network_config_depends_on_the_family(
    spec: Spec, config: Mapping[str, Any], expected: tuple[type, int, int, int], tmp_path: Path
) -> None:
    change(tmp_path / CONFIG, **config)
    processor = Qwen2VLImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    if isinstance(spec, Qwen2VLSpec):
        processor.save_pretrained(tmp_path)
    settings = serving(model_types=(config["model_type"],), pooling="last", image_positions="sequential")
    model = ModelConfig.from_checkpoint(tmp_path, settings, spec)
    assert model.network_config == read_with_defaults(spec.read_config, JsonFile(tmp_path / CONFIG))
    assert (type(model.network_config), model.dimensions, model.max_tokens, model.vocab_size) == expected
    assert (model.pooling, model.image_positions) == ("last", "sequential")
    normalization = tuple(map(tuple, (processor.image_mean, processor.image_std)))
    assert model.image_normalization == (normalization if isinstance(spec, Qwen2VLSpec) else ())


def test_clip_needs_no_pooling_setting(tmp_path: Path) -> None:
    change(tmp_path / CONFIG, **CLIP)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48)
    processor.save_pretrained(tmp_path)
    model = ModelConfig.from_checkpoint(tmp_path, serving(model_types=("clip",)), ClipSpec())
    assert model.network_config == ClipConfig.read(JsonFile(tmp_path / CONFIG))
    assert (model.pooling, model.dimensions, model.max_tokens, model.vocab_size) == ("projection", 28, 17, 99)
    assert model.image_normalization == tuple(map(tuple, (processor.image_mean, processor.image_std)))


@pytest.mark.parametrize("spec", [EncoderSpec(), QWEN3, ClipSpec(), Qwen2VLSpec()], ids=lambda spec: spec.network)
def test_classes_named_by_a_spec_exist(spec: Spec) -> None:
    network, processor = spec.load(spec.network), spec.load(spec.processor)
    assert issubclass(network, nn.Module)
    assert isinstance(network.naming, Naming)
    assert issubclass(processor, TextProcessor)


@pytest.mark.parametrize(("spec", "config"), [(ClipSpec(), CLIP), (Qwen2VLSpec(), GME)], ids=["clip", "gme"])
def test_image_model_requires_the_processor_config(spec: Spec, config: Mapping[str, Any], tmp_path: Path) -> None:
    change(tmp_path / CONFIG, **config)
    settings = serving(model_types=(config["model_type"],), pooling="" if spec.pooling else "last")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is missing"):
        ModelConfig.from_checkpoint(tmp_path, settings, spec)


@pytest.mark.parametrize(
    ("max_seq_length", "max_tokens", "expected"),
    [(None, 0, 77), (50, 0, 50), (50, 40, 40), (40, 50, 40), (512, 0, 77), (None, 99, 77)],
)
def test_smallest_length_limit_applies(
    max_seq_length: int | None, max_tokens: int, expected: int, checkpoint: Path
) -> None:
    change(checkpoint / "sentence_bert_config.json", max_seq_length=max_seq_length, do_lower_case=True)
    config = read(checkpoint, max_tokens=max_tokens)
    assert (config.max_tokens, config.lowercase) == (expected, True)


def test_prompts_are_read_from_the_sentence_transformers_config(checkpoint: Path) -> None:
    change(checkpoint / "config_sentence_transformers.json", prompts={"query": "Represent: "}, version="5")
    assert read(checkpoint).prompts == {"query": "Represent: "}


@pytest.mark.parametrize(
    ("prompts", "configured", "expected"),
    [
        ({"query": "q: "}, "query", "query"),
        ({"query": "q: ", "odd": "o: "}, "odd", "odd"),
        ({"query": "q: "}, None, None),
        # sentence-transformers defines these two, empty, for every model; test_processors.py compares with it.
        ({"query": "q: "}, "document", None),
        ({}, "query", None),
    ],
)
def test_default_prompt(
    prompts: dict[str, str], configured: str | None, expected: str | None, checkpoint: Path
) -> None:
    change(checkpoint / "config_sentence_transformers.json", prompts=prompts, default_prompt_name=configured)
    assert read(checkpoint).default_prompt == expected


# our pooling mode -> the suffix of the older switch of sentence-transformers
LEGACY = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}


@pytest.mark.parametrize("mode", LEGACY)
@pytest.mark.parametrize("set_by_operator", [True, False], ids=["config.pbtxt and checkpoint", "checkpoint only"])
@pytest.mark.parametrize("file_format", ["new", "new list", "legacy"])
def test_pooling_in_every_file_format(file_format: str, set_by_operator: bool, mode: str, checkpoint: Path) -> None:
    file = checkpoint / "1_Pooling" / "config.json"
    if file_format == "legacy":
        switches = {f"pooling_mode_{name}": key == mode for key, name in LEGACY.items()}
        file.write_text(json.dumps({"word_embedding_dimension": 60, **switches}))
    else:
        name = {"last": "lasttoken"}.get(mode, mode)
        Pooling(60, pooling_mode=name).save(str(file.parent))
        if file_format == "new list":
            change(file, pooling_mode=[name])
    pooling = mode if set_by_operator else ""
    assert read(checkpoint, pooling=pooling).pooling == mode


def test_pooling_is_read_from_the_path_in_modules_json(checkpoint: Path) -> None:
    Pooling(60, pooling_mode="max").save(str(_make_directory(checkpoint / "7_Last")))
    _write_modules(checkpoint, ("Transformer", ""), ("Pooling", "7_Last"), ("Normalize", "2_Normalize"))
    assert read(checkpoint).pooling == "max"
    with pytest.raises(ConfigError, match=rf"{checkpoint}/7_Last/config\.json says pooling 'max'.*'cls'"):
        read(checkpoint, pooling="cls")
    _write_modules(checkpoint, ("Transformer", ""), ("Pooling", "8_Gone"))
    with pytest.raises(ConfigError, match=rf"{checkpoint}/8_Gone/config\.json sets no pooling"):
        read(checkpoint)


def _write_modules(directory: Path, *modules: tuple[str, str]) -> None:
    """Write modules.json from (type, path) pairs, in the format of sentence-transformers 2 to 4."""
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules)
    ]
    (directory / MODULES).write_text(json.dumps(entries))


def test_operator_sets_pooling_if_the_file_is_missing(checkpoint: Path) -> None:
    (checkpoint / "1_Pooling" / "config.json").unlink()
    assert read(checkpoint, pooling="last").pooling == "last"


@pytest.mark.parametrize(
    ("checkpoint_values", "operator_values", "expected"),
    [
        ({}, {}, None),
        ({"is_matryoshka": True}, {}, True),
        ({"is_matryoshka": False}, {}, None),
        ({"matryoshka_dimensions": [20, 60]}, {}, (20, 60)),
        ({"matryoshka_dimensions": [20], "is_matryoshka": True}, {}, (20,)),
        ({"matryoshka_dimensions": [20]}, {"matryoshka_dimensions": (1, 30)}, (1, 30)),
        ({"matryoshka_dimensions": [20]}, {"is_matryoshka": True}, True),
        ({}, {"is_matryoshka": True}, True),
        ({}, {"is_matryoshka": True, "matryoshka_dimensions": (7, 9)}, (7, 9)),
        ({"matryoshka_dimensions": [20, 60, 61, 4096]}, {}, (20, 60)),
        ({}, {"matryoshka_dimensions": (30, 61)}, (30,)),
    ],
)
def test_matryoshka_dimensions(
    checkpoint_values: dict[str, Any], operator_values: dict[str, Any], expected: object, checkpoint: Path
) -> None:
    change(checkpoint / "config.json", **checkpoint_values)
    assert read(checkpoint, **operator_values).matryoshka == expected


def test_matryoshka_list_of_a_family_is_limited_to_the_model(checkpoint: Path) -> None:
    """Test the documented list of a family of three sizes with a model of 1024 dimensions."""
    change(checkpoint / CONFIG, hidden_size=1024, num_attention_heads=16)
    parameters = {"checkpoint": "a/b", "model_types": "bert", "matryoshka_dimensions": "128, 256, 512, 1024, 1536"}
    config = ModelConfig.from_checkpoint(checkpoint, ServingConfig.from_triton(arguments(parameters)), EncoderSpec())
    assert (config.dimensions, config.matryoshka) == (1024, (128, 256, 512, 1024))


def test_matryoshka_dimensions_are_limited_by_the_last_dense(checkpoint: Path) -> None:
    _write_dense(checkpoint, SentenceTransformersDense(60, 31))
    assert read(checkpoint, matryoshka_dimensions=(20, 31, 60)).matryoshka == (20, 31)


def _write_dense(directory: Path, *layers: SentenceTransformersDense) -> None:
    """Write Dense modules after Pooling, saved by sentence-transformers."""
    for i, layer in enumerate(layers):
        layer.save(str(_make_directory(directory / f"{i + 2}_Dense")))
    dense = [("Dense", f"{i + 2}_Dense") for i in range(len(layers))]
    _write_modules(directory, ("Transformer", ""), ("Pooling", "1_Pooling"), *dense, ("Normalize", "9_Normalize"))


def test_dense_modules_are_chained(checkpoint: Path) -> None:
    _write_dense(
        checkpoint,
        SentenceTransformersDense(60, 97, bias=False, activation_function=None),
        SentenceTransformersDense(97, 20, activation_function=nn.GELU()),
    )
    config = read(checkpoint)
    assert config.dense == (
        Dense(checkpoint / "2_Dense", in_features=60, out_features=97, bias=False, activation=None),
        Dense(checkpoint / "3_Dense", in_features=97, out_features=20, bias=True, activation="gelu_erf"),
    )
    assert (config.dimensions, config.network_config.hidden_size) == (20, 60)


@pytest.mark.parametrize("activation", [nn.Identity(), nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Tanh()], ids=str)
def test_dense_activation_equals_that_of_torch(activation: nn.Module, checkpoint: Path) -> None:
    _write_dense(checkpoint, SentenceTransformersDense(60, 20, activation_function=activation))
    (dense,) = read(checkpoint).dense
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    ours = x if dense.activation is None else ops.activation(x, dense.activation)
    torch.testing.assert_close(ours, activation(x), rtol=1e-12, atol=1e-12)


def test_minimal_dense_module_has_defaults(checkpoint: Path) -> None:
    _write_dense(checkpoint, SentenceTransformersDense(60, 20))
    change(checkpoint / "2_Dense" / CONFIG, bias=None, activation_function=None)
    (dense,) = read(checkpoint).dense
    theirs = SentenceTransformersDense(60, 20)
    assert dense.bias == theirs.bias
    assert isinstance(theirs.activation_function, nn.Tanh)
    assert dense.activation == "tanh"


@pytest.mark.parametrize(
    ("module", "changes", "fragments"),
    [
        ("2_Dense", {"in_features": 61}, ["in_features is 61", "60"]),
        ("3_Dense", {"in_features": 60}, ["in_features is 60", "20"]),
        ("3_Dense", {"in_features": None}, ["'in_features' is missing"]),
        ("2_Dense", {"out_features": None}, ["'out_features' is missing"]),
        ("2_Dense", {"out_features": 0}, ["out_features is 0"]),
        ("3_Dense", {"bias": "yes"}, ["bias is 'yes'"]),
        (
            "2_Dense",
            {"activation_function": "torch.nn.modules.activation.Mish"},
            ["activation_function is 'torch.nn.modules.activation.Mish'", "torch.nn.modules.activation.GELU"],
        ),
    ],
    ids=str,
)
def test_invalid_dense_module_is_rejected(
    module: str, changes: dict[str, Any], fragments: list[str], checkpoint: Path
) -> None:
    _write_dense(checkpoint, SentenceTransformersDense(60, 20), SentenceTransformersDense(20, 30))
    change(checkpoint / module / CONFIG, **changes)
    with pytest.raises(ConfigError) as error:
        read(checkpoint)
    message = str(error.value)
    assert message.startswith(f"{checkpoint / module / CONFIG}: ")
    assert [fragment for fragment in fragments if fragment not in message] == []


def test_dense_module_without_a_config_is_rejected(checkpoint: Path) -> None:
    _write_dense(checkpoint, SentenceTransformersDense(60, 20))
    (checkpoint / "2_Dense" / CONFIG).unlink()
    with pytest.raises(ConfigError, match=r"2_Dense/config\.json is missing"):
        read(checkpoint)


@pytest.mark.parametrize(
    "order",
    [
        ("Transformer", "Dense", "Pooling"),
        ("Transformer", "Pooling", "Normalize", "Dense"),
        ("Transformer", "Normalize", "Pooling"),
        ("Pooling", "Transformer"),
        ("Dense", "Transformer", "Pooling"),
    ],
    ids=" ".join,
)
def test_modules_in_unsupported_order_are_rejected(order: tuple[str, ...], checkpoint: Path) -> None:
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Normalize"}
    SentenceTransformersDense(60, 20).save(str(_make_directory(checkpoint / "2_Dense")))
    _write_modules(checkpoint, *((kind, paths[kind]) for kind in order))
    with pytest.raises(ConfigError, match=rf"modules\.json: modules in the order {', '.join(order)} are not"):
        read(checkpoint)


CONFIG, POOLING, MODULES = "config.json", "1_Pooling/config.json", "modules.json"
SENTENCE, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
NO_POOLING = dict.fromkeys(["pooling_mode", "include_prompt"])
REJECTED: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    # name: file, changed keys, operator settings, fragments of the error message in addition to the file name
    "model type of another family": (CONFIG, {"model_type": "qwen3"}, {}, ["'qwen3'", "bert", "tiny/config.pbtxt"]),
    "missing model type": (CONFIG, {"model_type": None}, {}, ["model_type"]),
    "a family without model types": (CONFIG, {}, {"model_types": ()}, ["'bert'", "none"]),
    "invalid network config": (CONFIG, {"num_attention_heads": 7}, {}, ["hidden_size 60", "num_attention_heads 7"]),
    "length limit is a string": (SENTENCE, {"max_seq_length": "256"}, {}, ["max_seq_length", "256"]),
    "length limit below 1": (SENTENCE, {"max_seq_length": -1}, {}, ["max_seq_length", "-1"]),
    "do_lower_case is a string": (SENTENCE, {"do_lower_case": "no"}, {}, ["do_lower_case is 'no'"]),
    "prompts are a list": (PROMPTS, {"prompts": ["query: "]}, {}, ["prompts"]),
    "prompt is a number": (
        PROMPTS,
        {"prompts": {"query": "q: ", "passage": 3}},
        {},
        ["prompts", "3", "must be a string"],
    ),
    "unknown default prompt": (
        PROMPTS,
        {"prompts": {"query": "q: "}, "default_prompt_name": "passage"},
        {},
        ["default_prompt_name", "passage", "which defines query"],
    ),
    "default prompt is a number": (PROMPTS, {"default_prompt_name": 3}, {}, ["default_prompt_name", "3", "str"]),
    "matryoshka_dimensions is a number": (CONFIG, {"matryoshka_dimensions": 20}, {}, ["matryoshka_dimensions", "20"]),
    "matryoshka dimension is a string": (
        CONFIG,
        {"matryoshka_dimensions": ["20"]},
        {},
        ["matryoshka_dimensions", "20"],
    ),
    "matryoshka dimension is a bool": (CONFIG, {"matryoshka_dimensions": [20, True]}, {}, ["[20, True]", "above 0"]),
    "matryoshka dimension is 0": (CONFIG, {"matryoshka_dimensions": [0]}, {}, ["matryoshka_dimensions [0]", "above 0"]),
    "is_matryoshka is a string": (CONFIG, {"is_matryoshka": "true"}, {}, ["is_matryoshka is 'true'"]),
    "pooling is a number": (POOLING, {"pooling_mode": 1}, {}, ["pooling"]),
    "pooling contradiction": (POOLING, {}, {"pooling": "mean"}, ["'cls'", "'mean'", "tiny/config.pbtxt"]),
    "unknown pooling": (POOLING, {"pooling_mode": "weightedmean"}, {}, ["'weightedmean'", "cls, mean, last, max"]),
    "two pooling modes": (POOLING, {"pooling_mode": ["cls", "mean"]}, {}, ["'cls+mean'"]),
    "two pooling modes, one set by the operator": (
        POOLING,
        {"pooling_mode": ["cls", "mean"]},
        {"pooling": "cls"},
        ["'cls+mean' is not implemented"],
    ),
    "legacy pooling contradiction": (
        POOLING,
        {**NO_POOLING, "pooling_mode_max_tokens": True},
        {"pooling": "cls"},
        ["'max'", "'cls'"],
    ),
    "two legacy pooling modes": (
        POOLING,
        {**NO_POOLING, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
        {},
        ["'cls+max'"],
    ),
    "unknown legacy pooling": (
        POOLING,
        {**NO_POOLING, "pooling_mode_mean_sqrt_len_tokens": True},
        {},
        ["pooling_mode_mean_sqrt_len_tokens"],
    ),
    "no pooling mode": (POOLING, {**NO_POOLING, "pooling_mode_cls_token": False}, {}, ["tiny/config.pbtxt"]),
    "prompt excluded from pooling": (POOLING, {"include_prompt": False}, {}, ["include_prompt"]),
}


@pytest.mark.parametrize("case", REJECTED)
def test_invalid_checkpoint_is_rejected(case: str, checkpoint: Path) -> None:
    name, changes, settings, fragments = REJECTED[case]
    change(checkpoint / name, **changes)
    with pytest.raises(ConfigError) as error:
        read(checkpoint, **settings)
    for fragment in [str(checkpoint / name), *fragments]:
        assert fragment in str(error.value)


def test_missing_pooling_is_an_error(checkpoint: Path) -> None:
    (checkpoint / POOLING).unlink()
    with pytest.raises(
        ConfigError, match=r"1_Pooling/config\.json sets no pooling mode; set pooling .*tiny/config\.pbtxt"
    ):
        read(checkpoint)


def test_unknown_pooling_set_by_the_operator_is_rejected(checkpoint: Path) -> None:
    (checkpoint / POOLING).unlink()
    with pytest.raises(ConfigError, match="'weightedmean' is not implemented"):
        read(checkpoint, pooling="weightedmean")


def test_error_for_matryoshka_dimensions_of_the_operator_names_config_pbtxt(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny/config\.pbtxt: matryoshka_dimensions \[0, 20\].*above 0"):
        read(checkpoint, matryoshka_dimensions=(0, 20))


@pytest.mark.parametrize("module", ["sentence_transformers.models.WordWeights", "sentence_transformers.models.LSTM"])
def test_unsupported_module_is_rejected(module: str, checkpoint: Path) -> None:
    modules = json.loads((MINILM / MODULES).read_text())
    (checkpoint / MODULES).write_text(json.dumps(modules))
    assert read(checkpoint).pooling == "cls"
    (checkpoint / MODULES).write_text(json.dumps([*modules, {"idx": 3, "name": "3", "path": "3_x", "type": module}]))
    with pytest.raises(ConfigError, match=rf"modules\.json: module '{module}' is not implemented"):
        read(checkpoint)


def test_newer_module_names_are_accepted(checkpoint: Path) -> None:
    """Test the import paths of the classes that sentence-transformers 5.6 and later write."""
    SentenceTransformersDense(60, 20, activation_function=None).save(str(_make_directory(checkpoint / "2_Dense")))
    modules = [
        (Transformer, ""),
        (Pooling, "1_Pooling"),
        (SentenceTransformersDense, "2_Dense"),
        (Normalize, "3_Normalize"),
    ]
    entries = [{"idx": i, "path": path, "type": fullname(module)} for i, (module, path) in enumerate(modules)]
    (checkpoint / MODULES).write_text(json.dumps(entries))
    assert (read(checkpoint).pooling, read(checkpoint).dimensions) == ("cls", 20)


@pytest.mark.parametrize("name", ["sentence_transformers.models.CLIPModel", "custom_st.MultiModalTransformer"])
def test_network_module_may_have_several_names_but_must_be_first(name: str, checkpoint: Path) -> None:
    pooling = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    network = {"idx": 0, "name": "0", "path": "", "type": name}
    (checkpoint / MODULES).write_text(json.dumps([network, pooling]))
    assert read(checkpoint).pooling == "cls"
    (checkpoint / MODULES).write_text(json.dumps([network, pooling, network]))
    with pytest.raises(ConfigError, match=rf"modules\.json: module '{name}' is not implemented"):
        read(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[]", "7"])
@pytest.mark.parametrize("name", [CONFIG, POOLING])
def test_file_that_is_not_a_json_object_is_rejected(name: str, text: str, checkpoint: Path) -> None:
    (checkpoint / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        read(checkpoint)


@pytest.mark.parametrize("module", ["Transformer", {}, {"type": 3}, None])
def test_invalid_entry_in_modules_json_is_rejected(module: object, checkpoint: Path) -> None:
    (checkpoint / MODULES).write_text(json.dumps([module]))
    with pytest.raises(ConfigError, match=r"modules\.json"):
        read(checkpoint)


def test_missing_config_json_is_an_error(checkpoint: Path) -> None:
    (checkpoint / CONFIG).unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        read(checkpoint)
