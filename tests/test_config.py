"""What the operator decides and what a checkpoint states: every value read, every contradiction refused by name.

The files are written by transformers and sentence-transformers themselves.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.base.modules import Dense as TheirDense
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import fullname
from test_shapes import CLIP, E5_MISTRAL, GME, GTE_QWEN2, QWEN3_EMBEDDING, VL
from torch import nn
from transformers import BertConfig, CLIPImageProcessorPil, Qwen2VLImageProcessorPil

from conftest import MINILM, REPOSITORY, serving
from triton_embed.gateway import repository
from triton_embed.kernels import ops
from triton_embed.python_backend.config import Dense, ModelConfig, ServingConfig
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.json_file import JsonFile
from triton_embed.python_backend.reader import Reader
from triton_embed.python_backend.shapes import ClipShape, DecoderShape, EncoderShape, Qwen2VLShape
from triton_embed.python_backend.spec import ClipSpec, DecoderSpec, EncoderSpec, Qwen2VLSpec, Spec
from triton_embed.python_backend.weights import Naming


def arguments(parameters: Mapping[str, str], name: str = "bge", gpu: bool = False) -> dict[str, str]:
    """What Triton passes to `initialize`."""
    stated = {key: {"string_value": value} for key, value in parameters.items()}
    return {
        "model_config": json.dumps({"name": name, "parameters": stated}),
        "model_repository": f"/srv/repository/{name}",
        "model_instance_kind": "GPU" if gpu else "CPU",
        "model_instance_device_id": "3" if gpu else "0",
    }


def test_every_parameter_is_read_as_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_EMBED_CHECKPOINTS", raising=False)
    found = ServingConfig.from_triton(
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
    assert found == ServingConfig(
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
    assert found.thread_count == 1


def test_defaults_follow_the_device() -> None:
    on_cpu = ServingConfig.from_triton(arguments({"checkpoint": "a/b"}))
    on_gpu = ServingConfig.from_triton(arguments({"checkpoint": "a/b"}, gpu=True))
    assert (on_cpu.device, on_gpu.device) == ("cpu", "cuda:3")
    assert on_cpu.thread_count == len(os.sched_getaffinity(0))
    assert not on_cpu.is_matryoshka
    # GME's official limits
    assert (on_cpu.kernels, on_cpu.cuda_graphs, on_cpu.prefix_reuse) == ("auto", True, True)
    assert (on_cpu.image_positions, on_cpu.min_image_tokens, on_cpu.max_image_tokens) == ("mrope", 256, 1280)


def test_checkpoints_are_looked_up_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_EMBED_CHECKPOINTS", "/data/models")
    assert ServingConfig.from_triton(arguments({"checkpoint": "a/b"})).checkpoint_root == Path("/data/models")


@pytest.mark.parametrize("family", repository.families(REPOSITORY))
def test_the_engine_knows_every_parameter_that_is_checked_in(family: str) -> None:
    stated = repository.read_config(REPOSITORY, family).parameters
    parameters = {key: stated[key].string_value for key in stated}
    found = ServingConfig.from_triton(arguments(parameters, family))
    assert found.checkpoint == parameters["checkpoint"]
    assert found.pooling == parameters.get("pooling", "")


@pytest.mark.parametrize(
    ("parameters", "words"),
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
        ({"checkpoint": "a/b", "kernels": "triton"}, ["kernels", "'triton'", "auto, torch"]),
        ({"checkpoint": "a/b", "cuda_graphs": "maybe"}, ["cuda_graphs", "'maybe'", "true or false"]),
        ({"checkpoint": "a/b", "prefix_reuse": "1"}, ["prefix_reuse", "'1'", "true or false"]),
        ({"checkpoint": "a/b", "image_positions": ""}, ["image_positions", "''", "mrope, sequential"]),
        ({"checkpoint": "a/b", "min_image_tokens": "-4"}, ["min_image_tokens", "'-4'", "whole number"]),
        ({"checkpoint": "a/b", "max_image_tokens": "1,280"}, ["max_image_tokens", "'1,280'", "whole number"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_parameter_that_cannot_be_meant_is_refused(parameters: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        ServingConfig.from_triton(arguments(parameters))
    assert str(refused.value).startswith("bge/config.pbtxt: ")
    for word in words:
        assert word in str(refused.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The JSON files of a BERT with CLS pooling."""
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
    Pooling(60, pooling_mode="cls").save(str(_made(tmp_path / "1_Pooling")))
    return tmp_path


def _made(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return directory


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    stated = {**(json.loads(file.read_text()) if file.is_file() else {}), **values}
    file.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))


def read(directory: Path, **operator: object) -> ModelConfig:
    return ModelConfig.from_checkpoint(directory, serving(**operator), EncoderSpec())


def test_a_checkpoint_of_few_words(checkpoint: Path) -> None:
    found = read(checkpoint)
    assert found == ModelConfig(
        model_type="bert",
        shape=EncoderShape.read(JsonFile(checkpoint / CONFIG)),
        pooling="cls",
        max_tokens=77,
    )
    assert (found.vocab_size, found.dimensions) == (97, 60)
    assert (found.dense, found.lowercase, found.matryoshka, found.prompts) == ((), False, None, {})
    assert found.normalisation == ()


def test_the_real_minilm() -> None:
    found = read(MINILM, pooling="mean")
    assert (found.dimensions, found.shape.layers, found.pooling, found.max_tokens) == (384, 6, "mean", 256)
    assert (found.shape.activation, found.lowercase, found.matryoshka) == ("gelu_erf", False, None)


QWEN3 = DecoderSpec(causal=True, qk_norm=True, qkv_bias=False, eos="<|endoftext|>")
GTE = DecoderSpec(causal=None, qk_norm=False, qkv_bias=True, eos="<|endoftext|>")
E5 = DecoderSpec(causal=True, qk_norm=False, qkv_bias=False, eos="eos_token")


@pytest.mark.parametrize(
    ("spec", "config", "facts"),
    [
        # the shape's class, values of a vector, tokens of a text, words of the vocabulary
        (E5, E5_MISTRAL, (DecoderShape, 4096, 32768, 32000)),
        (GTE, GTE_QWEN2, (DecoderShape, 1536, 131072, 151646)),
        (QWEN3, QWEN3_EMBEDDING, (DecoderShape, 1024, 32768, 151669)),
        (Qwen2VLSpec(), GME, (Qwen2VLShape, 1536, 32768, 151936)),
        (Qwen2VLSpec(), VL, (Qwen2VLShape, 96, 128, 103)),
    ],
    ids=["e5", "gte", "qwen3", "gme", "qwen2-vl by transformers"],
)
def test_a_checkpoint_is_read_as_its_family_says(
    spec: Spec, config: Mapping[str, Any], facts: tuple[type, int, int, int], tmp_path: Path
) -> None:
    change(tmp_path / CONFIG, **config)
    processor = Qwen2VLImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    if isinstance(spec, Qwen2VLSpec):
        processor.save_pretrained(tmp_path)
    operator = serving(model_types=(config["model_type"],), pooling="last", image_positions="sequential")
    found = ModelConfig.from_checkpoint(tmp_path, operator, spec)
    assert found.shape == spec.read(JsonFile(tmp_path / CONFIG))
    assert (type(found.shape), found.dimensions, found.max_tokens, found.vocab_size) == facts
    assert (found.pooling, found.image_positions) == ("last", "sequential")
    theirs = tuple(map(tuple, (processor.image_mean, processor.image_std)))
    assert found.normalisation == (theirs if isinstance(spec, Qwen2VLSpec) else ())


def test_a_clip_needs_no_word_on_pooling(tmp_path: Path) -> None:
    change(tmp_path / CONFIG, **CLIP)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48)
    processor.save_pretrained(tmp_path)
    found = ModelConfig.from_checkpoint(tmp_path, serving(model_types=("clip",)), ClipSpec())
    assert found.shape == ClipShape.read(JsonFile(tmp_path / CONFIG))
    assert (found.pooling, found.dimensions, found.max_tokens, found.vocab_size) == ("projection", 28, 17, 99)
    assert found.normalisation == tuple(map(tuple, (processor.image_mean, processor.image_std)))


@pytest.mark.parametrize("spec", [EncoderSpec(), QWEN3, ClipSpec(), Qwen2VLSpec()], ids=lambda spec: spec.network)
def test_what_a_spec_names_is_there(spec: Spec) -> None:
    network, reader = spec.load(spec.network), spec.load(spec.reader)
    assert issubclass(network, nn.Module)
    assert isinstance(network.naming, Naming)
    assert issubclass(reader, Reader)


@pytest.mark.parametrize(("spec", "config"), [(ClipSpec(), CLIP), (Qwen2VLSpec(), GME)], ids=["clip", "gme"])
def test_a_model_of_pictures_needs_their_processor(spec: Spec, config: Mapping[str, Any], tmp_path: Path) -> None:
    change(tmp_path / CONFIG, **config)
    operator = serving(model_types=(config["model_type"],), pooling="" if spec.pooling else "last")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is missing"):
        ModelConfig.from_checkpoint(tmp_path, operator, spec)


@pytest.mark.parametrize(
    ("sentence", "operator", "limit"),
    [(None, 0, 77), (50, 0, 50), (50, 40, 40), (40, 50, 40), (512, 0, 77), (None, 99, 77)],
)
def test_the_shortest_limit_counts(sentence: int | None, operator: int, limit: int, checkpoint: Path) -> None:
    change(checkpoint / "sentence_bert_config.json", max_seq_length=sentence, do_lower_case=True)
    found = read(checkpoint, max_tokens=operator)
    assert (found.max_tokens, found.lowercase) == (limit, True)


def test_prompts_of_sentence_transformers(checkpoint: Path) -> None:
    change(checkpoint / "config_sentence_transformers.json", prompts={"query": "Represent: "}, version="5")
    assert read(checkpoint).prompts == {"query": "Represent: "}


@pytest.mark.parametrize(
    ("prompts", "stated", "default"),
    [
        ({"query": "q: "}, "query", "query"),
        ({"query": "q: ", "odd": "o: "}, "odd", "odd"),
        ({"query": "q: "}, None, None),
        # sentence-transformers gives every model these two, empty: test_reader.py asks it.
        ({"query": "q: "}, "document", None),
        ({}, "query", None),
    ],
)
def test_the_default_prompt(prompts: dict[str, str], stated: str | None, default: str | None, checkpoint: Path) -> None:
    change(checkpoint / "config_sentence_transformers.json", prompts=prompts, default_prompt_name=stated)
    assert read(checkpoint).default_prompt == default


# ours -> the end of sentence-transformers' older switch
LEGACY = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}


@pytest.mark.parametrize("mode", LEGACY)
@pytest.mark.parametrize("stated_by_operator", [True, False], ids=["both say it", "checkpoint alone"])
@pytest.mark.parametrize("form", ["new", "new list", "legacy"])
def test_pooling_in_every_form_it_is_written(form: str, stated_by_operator: bool, mode: str, checkpoint: Path) -> None:
    file = checkpoint / "1_Pooling" / "config.json"
    if form == "legacy":
        switches = {f"pooling_mode_{name}": key == mode for key, name in LEGACY.items()}
        file.write_text(json.dumps({"word_embedding_dimension": 60, **switches}))
    else:
        name = {"last": "lasttoken"}.get(mode, mode)
        Pooling(60, pooling_mode=name).save(str(file.parent))
        if form == "new list":
            change(file, pooling_mode=[name])
    operator = mode if stated_by_operator else ""
    assert read(checkpoint, pooling=operator).pooling == mode


def test_pooling_at_the_path_that_modules_json_names(checkpoint: Path) -> None:
    Pooling(60, pooling_mode="max").save(str(_made(checkpoint / "7_Last")))
    _write_modules(checkpoint, ("Transformer", ""), ("Pooling", "7_Last"), ("Normalize", "2_Normalize"))
    assert read(checkpoint).pooling == "max"
    with pytest.raises(ConfigError, match=rf"{checkpoint}/7_Last/config\.json says pooling 'max'.*'cls'"):
        read(checkpoint, pooling="cls")
    _write_modules(checkpoint, ("Transformer", ""), ("Pooling", "8_Gone"))
    with pytest.raises(ConfigError, match=rf"{checkpoint}/8_Gone/config\.json states no pooling"):
        read(checkpoint)


def _write_modules(directory: Path, *modules: tuple[str, str]) -> None:
    """modules.json: the kind and the path of each, in the words of sentence-transformers 2 to 4."""
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules)
    ]
    (directory / MODULES).write_text(json.dumps(listed))


def test_the_operator_stands_in_for_a_missing_pooling_file(checkpoint: Path) -> None:
    (checkpoint / "1_Pooling" / "config.json").unlink()
    assert read(checkpoint, pooling="last").pooling == "last"


@pytest.mark.parametrize(
    ("checkpoint_says", "operator_says", "expected"),
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
def test_matryoshka_sizes(
    checkpoint_says: dict[str, Any], operator_says: dict[str, Any], expected: object, checkpoint: Path
) -> None:
    change(checkpoint / "config.json", **checkpoint_says)
    assert read(checkpoint, **operator_says).matryoshka == expected


def test_the_override_of_the_documents_starts_a_model_of_fewer_dimensions(checkpoint: Path) -> None:
    """One list for a family of three sizes: [128, 256, 512, 1024, 1536], for a model of 1024 dimensions."""
    change(checkpoint / CONFIG, hidden_size=1024, num_attention_heads=16)
    parameters = {"checkpoint": "a/b", "model_types": "bert", "matryoshka_dimensions": "128, 256, 512, 1024, 1536"}
    found = ModelConfig.from_checkpoint(checkpoint, ServingConfig.from_triton(arguments(parameters)), EncoderSpec())
    assert (found.dimensions, found.matryoshka) == (1024, (128, 256, 512, 1024))


def test_matryoshka_sizes_are_those_after_the_last_dense(checkpoint: Path) -> None:
    _write_dense(checkpoint, TheirDense(60, 31))
    assert read(checkpoint, matryoshka_dimensions=(20, 31, 60)).matryoshka == (20, 31)


def _write_dense(directory: Path, *layers: TheirDense) -> None:
    """Dense modules after Pooling, saved by sentence-transformers."""
    for i, layer in enumerate(layers):
        layer.save(str(_made(directory / f"{i + 2}_Dense")))
    dense = [("Dense", f"{i + 2}_Dense") for i in range(len(layers))]
    _write_modules(directory, ("Transformer", ""), ("Pooling", "1_Pooling"), *dense, ("Normalize", "9_Normalize"))


def test_dense_modules_follow_each_other(checkpoint: Path) -> None:
    _write_dense(
        checkpoint,
        TheirDense(60, 97, bias=False, activation_function=None),
        TheirDense(97, 20, activation_function=nn.GELU()),
    )
    found = read(checkpoint)
    assert found.dense == (
        Dense(checkpoint / "2_Dense", inputs=60, outputs=97, bias=False, activation=None),
        Dense(checkpoint / "3_Dense", inputs=97, outputs=20, bias=True, activation="gelu_erf"),
    )
    assert (found.dimensions, found.shape.hidden_size) == (20, 60)


@pytest.mark.parametrize("activation", [nn.Identity(), nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Tanh()], ids=str)
def test_activations_of_a_dense_module(activation: nn.Module, checkpoint: Path) -> None:
    _write_dense(checkpoint, TheirDense(60, 20, activation_function=activation))
    (found,) = read(checkpoint).dense
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    ours = x if found.activation is None else ops.activation(x, found.activation)
    torch.testing.assert_close(ours, activation(x), rtol=1e-12, atol=1e-12)


def test_a_dense_module_of_few_words(checkpoint: Path) -> None:
    _write_dense(checkpoint, TheirDense(60, 20))
    change(checkpoint / "2_Dense" / CONFIG, bias=None, activation_function=None)
    (found,) = read(checkpoint).dense
    theirs = TheirDense(60, 20)
    assert found.bias == theirs.bias
    assert isinstance(theirs.activation_function, nn.Tanh)
    assert found.activation == "tanh"


@pytest.mark.parametrize(
    ("module", "changes", "words"),
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
def test_a_dense_module_that_is_refused(
    module: str, changes: dict[str, Any], words: list[str], checkpoint: Path
) -> None:
    _write_dense(checkpoint, TheirDense(60, 20), TheirDense(20, 30))
    change(checkpoint / module / CONFIG, **changes)
    with pytest.raises(ConfigError) as refused:
        read(checkpoint)
    said = str(refused.value)
    assert said.startswith(f"{checkpoint / module / CONFIG}: ")
    assert [word for word in words if word not in said] == []


def test_a_dense_module_without_a_config(checkpoint: Path) -> None:
    _write_dense(checkpoint, TheirDense(60, 20))
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
def test_modules_in_another_order_are_refused(order: tuple[str, ...], checkpoint: Path) -> None:
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Normalize"}
    TheirDense(60, 20).save(str(_made(checkpoint / "2_Dense")))
    _write_modules(checkpoint, *((kind, paths[kind]) for kind in order))
    with pytest.raises(ConfigError, match=rf"modules\.json: modules in the order {', '.join(order)} are not"):
        read(checkpoint)


CONFIG, POOLING, MODULES = "config.json", "1_Pooling/config.json", "modules.json"
SENTENCE, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
NO_POOLING = dict.fromkeys(["pooling_mode", "include_prompt"])
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    # name: file, its changed keys, the operator's word, words the error must have beside the file's name
    "foreign model type": (CONFIG, {"model_type": "qwen3"}, {}, ["'qwen3'", "bert", "tiny/config.pbtxt"]),
    "no model type": (CONFIG, {"model_type": None}, {}, ["model_type"]),
    "a family without types": (CONFIG, {}, {"model_types": ()}, ["'bert'", "none"]),
    "a shape that does not fit": (CONFIG, {"num_attention_heads": 7}, {}, ["hidden_size 60", "num_attention_heads 7"]),
    "no size": (CONFIG, {"num_hidden_layers": None}, {}, ["'num_hidden_layers' is missing"]),
    "a text limit that is text": (SENTENCE, {"max_seq_length": "256"}, {}, ["max_seq_length", "256"]),
    "a text limit below 1": (SENTENCE, {"max_seq_length": -1}, {}, ["max_seq_length", "-1"]),
    "a lower case of text": (SENTENCE, {"do_lower_case": "no"}, {}, ["do_lower_case is 'no'"]),
    "prompts that are a list": (PROMPTS, {"prompts": ["query: "]}, {}, ["prompts"]),
    "a prompt that is a number": (
        PROMPTS,
        {"prompts": {"query": "q: ", "passage": 3}},
        {},
        ["prompts", "3", "strings"],
    ),
    "a default prompt that is none": (
        PROMPTS,
        {"prompts": {"query": "q: "}, "default_prompt_name": "passage"},
        {},
        ["default_prompt_name", "passage", "which has query"],
    ),
    "a default prompt that is a number": (PROMPTS, {"default_prompt_name": 3}, {}, ["default_prompt_name", "3", "str"]),
    "a prompt that is null": (PROMPTS, {"prompts": {"query": None}}, {}, ["prompts", "None", "strings"]),
    "matryoshka sizes that are one": (CONFIG, {"matryoshka_dimensions": 20}, {}, ["matryoshka_dimensions", "20"]),
    "matryoshka sizes of text": (CONFIG, {"matryoshka_dimensions": ["20"]}, {}, ["matryoshka_dimensions", "20"]),
    "matryoshka sizes that are true": (CONFIG, {"matryoshka_dimensions": [20, True]}, {}, ["[20, True]", "above 0"]),
    "matryoshka of nothing": (CONFIG, {"matryoshka_dimensions": [0]}, {}, ["matryoshka_dimensions [0]", "above 0"]),
    "matryoshka of text": (CONFIG, {"is_matryoshka": "true"}, {}, ["is_matryoshka is 'true'"]),
    "a pooling that is a number": (POOLING, {"pooling_mode": 1}, {}, ["pooling"]),
    "pooling contradiction": (POOLING, {}, {"pooling": "mean"}, ["'cls'", "'mean'", "tiny/config.pbtxt"]),
    "pooling unknown": (POOLING, {"pooling_mode": "weightedmean"}, {}, ["'weightedmean'", "cls, mean, last, max"]),
    "pooling of two": (POOLING, {"pooling_mode": ["cls", "mean"]}, {}, ["'cls+mean'"]),
    "pooling of two, one the operator's": (
        POOLING,
        {"pooling_mode": ["cls", "mean"]},
        {"pooling": "cls"},
        ["'cls+mean'", "'cls'"],
    ),
    "pooling legacy contradiction": (
        POOLING,
        {**NO_POOLING, "pooling_mode_max_tokens": True},
        {"pooling": "cls"},
        ["'max'", "'cls'"],
    ),
    "pooling legacy of two": (
        POOLING,
        {**NO_POOLING, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
        {},
        ["'cls+max'"],
    ),
    "pooling legacy unknown": (
        POOLING,
        {**NO_POOLING, "pooling_mode_mean_sqrt_len_tokens": True},
        {},
        ["pooling_mode_mean_sqrt_len_tokens"],
    ),
    "pooling not stated": (POOLING, {**NO_POOLING, "pooling_mode_cls_token": False}, {}, ["tiny/config.pbtxt"]),
    "prompt left out of the mean": (POOLING, {"include_prompt": False}, {}, ["include_prompt"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_cannot_be_served_is_refused(case: str, checkpoint: Path) -> None:
    name, changes, operator, words = REFUSED[case]
    change(checkpoint / name, **changes)
    with pytest.raises(ConfigError) as refused:
        read(checkpoint, **operator)
    for word in [str(checkpoint / name), *words]:
        assert word in str(refused.value)


def test_no_pooling_file_and_no_word_of_the_operator(checkpoint: Path) -> None:
    (checkpoint / POOLING).unlink()
    with pytest.raises(ConfigError, match=r"1_Pooling/config\.json states no pooling: state it .*tiny/config\.pbtxt"):
        read(checkpoint)


def test_a_pooling_the_operator_invents(checkpoint: Path) -> None:
    (checkpoint / POOLING).unlink()
    with pytest.raises(ConfigError, match="'weightedmean' is not implemented"):
        read(checkpoint, pooling="weightedmean")


def test_matryoshka_sizes_the_operator_got_wrong_are_blamed_on_config_pbtxt(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny/config\.pbtxt: matryoshka_dimensions \[0, 20\].*above 0"):
        read(checkpoint, matryoshka_dimensions=(0, 20))


@pytest.mark.parametrize("module", ["sentence_transformers.models.WordWeights", "sentence_transformers.models.LSTM"])
def test_a_module_that_is_not_implemented(module: str, checkpoint: Path) -> None:
    modules = json.loads((MINILM / MODULES).read_text())
    (checkpoint / MODULES).write_text(json.dumps(modules))
    assert read(checkpoint).pooling == "cls"
    (checkpoint / MODULES).write_text(json.dumps([*modules, {"idx": 3, "name": "3", "path": "3_x", "type": module}]))
    with pytest.raises(ConfigError, match=rf"modules\.json: module '{module}' is not implemented"):
        read(checkpoint)


def test_modules_by_their_newer_names(checkpoint: Path) -> None:
    """sentence-transformers 5.6 and later write where its classes live now."""
    TheirDense(60, 20, activation_function=None).save(str(_made(checkpoint / "2_Dense")))
    modules = [(Transformer, ""), (Pooling, "1_Pooling"), (TheirDense, "2_Dense"), (Normalize, "3_Normalize")]
    listed = [{"idx": i, "path": path, "type": fullname(module)} for i, (module, path) in enumerate(modules)]
    (checkpoint / MODULES).write_text(json.dumps(listed))
    assert (read(checkpoint).pooling, read(checkpoint).dimensions) == ("cls", 20)


@pytest.mark.parametrize("name", ["sentence_transformers.models.CLIPModel", "custom_st.MultiModalTransformer"])
def test_the_network_goes_by_several_names_but_comes_first(name: str, checkpoint: Path) -> None:
    pooling = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    network = {"idx": 0, "name": "0", "path": "", "type": name}
    (checkpoint / MODULES).write_text(json.dumps([network, pooling]))
    assert read(checkpoint).pooling == "cls"
    (checkpoint / MODULES).write_text(json.dumps([network, pooling, network]))
    with pytest.raises(ConfigError, match=rf"modules\.json: module '{name}' is not implemented"):
        read(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[]", "7"])
@pytest.mark.parametrize("name", [CONFIG, POOLING])
def test_a_file_that_is_no_json_object(name: str, text: str, checkpoint: Path) -> None:
    (checkpoint / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        read(checkpoint)


@pytest.mark.parametrize("module", ["Transformer", {}, {"type": 3}, None])
def test_a_list_of_modules_that_are_none(module: object, checkpoint: Path) -> None:
    (checkpoint / MODULES).write_text(json.dumps([module]))
    with pytest.raises(ConfigError, match=r"modules\.json"):
        read(checkpoint)


def test_no_config_json(checkpoint: Path) -> None:
    (checkpoint / CONFIG).unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        read(checkpoint)
