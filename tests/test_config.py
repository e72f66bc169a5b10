"""What the operator decides and what a checkpoint states: every value read, every contradiction refused by name.

The files are written by transformers and sentence-transformers themselves.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig, BertConfig

from conftest import MINILM, REPOSITORY, serving
from triton_embed.gateway import repository
from triton_embed.python_backend.config import ModelConfig, ServingConfig
from triton_embed.python_backend.errors import ConfigError


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
        threads=1,
    )
    assert (found.batch_tokens, found.thread_count) == (2048, 1)


def test_defaults_follow_the_device() -> None:
    on_cpu = ServingConfig.from_triton(arguments({"checkpoint": "a/b"}))
    on_gpu = ServingConfig.from_triton(arguments({"checkpoint": "a/b"}, gpu=True))
    assert (on_cpu.device, on_gpu.device) == ("cpu", "cuda:3")
    assert on_cpu.batch_tokens < on_gpu.batch_tokens
    assert on_cpu.thread_count == len(os.sched_getaffinity(0))
    assert not on_cpu.is_matryoshka


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
        ({"checkpoint": "a/b", "dtype": "int8"}, ["dtype", "'int8'", "bfloat16"]),
        ({"checkpoint": "a/b", "max_tokens": "many"}, ["max_tokens", "'many'", "whole number"]),
        ({"checkpoint": "a/b", "max_tokens": "-1"}, ["max_tokens", "'-1'", "whole number"]),
        ({"checkpoint": "a/b", "max_tokens": "1.5"}, ["max_tokens", "'1.5'"]),
        ({"checkpoint": "a/b", "max_tokens": ""}, ["max_tokens", "''"]),
        ({"checkpoint": "a/b", "is_matryoshka": "1"}, ["is_matryoshka", "'1'", "true or false"]),
        ({"checkpoint": "a/b", "matryoshka_dimensions": "64,x"}, ["matryoshka_dimensions", "'64,x'", "list"]),
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


def test_every_size_is_the_checkpoints_own(checkpoint: Path) -> None:
    found, stated = ModelConfig.from_checkpoint(checkpoint, serving()), AutoConfig.from_pretrained(checkpoint)
    assert found == ModelConfig(
        model_type=stated.model_type,
        vocab_size=stated.vocab_size,
        hidden_size=stated.hidden_size,
        layers=stated.num_hidden_layers,
        heads=stated.num_attention_heads,
        intermediate_size=stated.intermediate_size,
        positions=stated.max_position_embeddings,
        token_types=stated.type_vocab_size,
        norm_eps=stated.layer_norm_eps,
        activation="gelu_tanh",
        pooling="cls",
        max_tokens=stated.max_position_embeddings,
    )


def test_the_real_minilm() -> None:
    found = ModelConfig.from_checkpoint(MINILM, serving(pooling="mean"))
    assert (found.hidden_size, found.layers, found.pooling, found.max_tokens) == (384, 6, "mean", 256)
    assert (found.activation, found.lowercase, found.matryoshka) == ("gelu_erf", False, None)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("gelu", "gelu_erf"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("silu", "silu"),
    ],
)
def test_activation_names(theirs: str, ours: str, checkpoint: Path) -> None:
    change(checkpoint / "config.json", hidden_act=theirs)
    assert ModelConfig.from_checkpoint(checkpoint, serving()).activation == ours


@pytest.mark.parametrize(
    ("sentence", "operator", "limit"),
    [(None, 0, 77), (50, 0, 50), (50, 40, 40), (40, 50, 40), (512, 0, 77), (None, 99, 77)],
)
def test_the_shortest_limit_counts(sentence: int | None, operator: int, limit: int, checkpoint: Path) -> None:
    change(checkpoint / "sentence_bert_config.json", max_seq_length=sentence, do_lower_case=True)
    found = ModelConfig.from_checkpoint(checkpoint, serving(max_tokens=operator))
    assert (found.max_tokens, found.lowercase) == (limit, True)


def test_prompts_of_sentence_transformers(checkpoint: Path) -> None:
    change(checkpoint / "config_sentence_transformers.json", prompts={"query": "Represent: "}, version="5")
    assert ModelConfig.from_checkpoint(checkpoint, serving()).prompts == {"query": "Represent: "}


LEGACY = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}


@pytest.mark.parametrize("mode", ["cls", "mean", "last"])
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
    assert ModelConfig.from_checkpoint(checkpoint, serving(pooling=operator)).pooling == mode


def test_the_operator_stands_in_for_a_missing_pooling_file(checkpoint: Path) -> None:
    (checkpoint / "1_Pooling" / "config.json").unlink()
    assert ModelConfig.from_checkpoint(checkpoint, serving(pooling="last")).pooling == "last"


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
    ],
)
def test_matryoshka_sizes(
    checkpoint_says: dict[str, Any], operator_says: dict[str, Any], expected: object, checkpoint: Path
) -> None:
    change(checkpoint / "config.json", **checkpoint_says)
    assert ModelConfig.from_checkpoint(checkpoint, serving(**operator_says)).matryoshka == expected


CONFIG, POOLING, MODULES = "config.json", "1_Pooling/config.json", "modules.json"
SENTENCE, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
NO_POOLING = dict.fromkeys(["pooling_mode", "include_prompt"])
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    # name: file, its changed keys, the operator's word, words the error must have beside the file's name
    "foreign model type": (CONFIG, {"model_type": "qwen3"}, {}, ["'qwen3'", "bert", "tiny/config.pbtxt"]),
    "no model type": (CONFIG, {"model_type": None}, {}, ["model_type"]),
    "a family without types": (CONFIG, {}, {"model_types": ()}, ["'bert'", "none"]),
    "relative positions": (CONFIG, {"position_embedding_type": "relative_key"}, {}, ["'relative_key'", "absolute"]),
    "activation": (CONFIG, {"hidden_act": "mish"}, {}, ["hidden_act", "'mish'", "gelu"]),
    "heads that do not divide": (CONFIG, {"num_attention_heads": 7}, {}, ["hidden_size 60", "num_attention_heads 7"]),
    "no heads": (CONFIG, {"num_attention_heads": 0}, {}, ["num_attention_heads"]),
    "a size that is text": (CONFIG, {"hidden_size": "60"}, {}, ["hidden_size"]),
    **{
        f"no {key}": (CONFIG, {key: None}, {}, [f"'{key}' is missing"])
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
    "an activation that is a list": (CONFIG, {"hidden_act": ["gelu"]}, {}, ["hidden_act"]),
    "an epsilon that is text": (CONFIG, {"layer_norm_eps": "1e-12"}, {}, ["layer_norm_eps", "1e-12"]),
    "an epsilon below 0": (CONFIG, {"layer_norm_eps": -1e-12}, {}, ["layer_norm_eps"]),
    "a text limit that is text": (SENTENCE, {"max_seq_length": "256"}, {}, ["max_seq_length", "256"]),
    "a text limit below 1": (SENTENCE, {"max_seq_length": -1}, {}, ["max_seq_length", "-1"]),
    "prompts that are a list": (PROMPTS, {"prompts": ["query: "]}, {}, ["prompts"]),
    "matryoshka sizes that are one": (CONFIG, {"matryoshka_dimensions": 20}, {}, ["matryoshka_dimensions", "20"]),
    "matryoshka sizes of text": (CONFIG, {"matryoshka_dimensions": ["20"]}, {}, ["matryoshka_dimensions", "20"]),
    "a pooling that is a number": (POOLING, {"pooling_mode": 1}, {}, ["pooling"]),
    "matryoshka too large": (CONFIG, {"matryoshka_dimensions": [20, 61]}, {}, ["[20, 61]", "60"]),
    "matryoshka of nothing": (CONFIG, {"matryoshka_dimensions": [0]}, {}, ["[0]", "60"]),
    "pooling contradiction": (POOLING, {}, {"pooling": "mean"}, ["'cls'", "'mean'", "tiny/config.pbtxt"]),
    "pooling unknown": (POOLING, {"pooling_mode": "weightedmean"}, {}, ["'weightedmean'", "cls"]),
    "pooling of two": (POOLING, {"pooling_mode": ["cls", "mean"]}, {}, ["'cls+mean'"]),
    "pooling of two, one the operator's": (
        POOLING,
        {"pooling_mode": ["cls", "mean"]},
        {"pooling": "cls"},
        ["'cls+mean'", "'cls'"],
    ),
    "pooling legacy contradiction": (
        POOLING,
        {**NO_POOLING, "pooling_mode_mean_tokens": True},
        {"pooling": "cls"},
        ["'mean'", "'cls'"],
    ),
    "pooling legacy unknown": (
        POOLING,
        {**NO_POOLING, "pooling_mode_max_tokens": True},
        {},
        ["pooling_mode_max_tokens"],
    ),
    "pooling not stated": (POOLING, {**NO_POOLING, "pooling_mode_cls_token": False}, {}, ["tiny/config.pbtxt"]),
    "prompt left out of the mean": (POOLING, {"include_prompt": False}, {}, ["include_prompt"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_cannot_be_served_is_refused(case: str, checkpoint: Path) -> None:
    name, changes, operator, words = REFUSED[case]
    change(checkpoint / name, **changes)
    with pytest.raises(ConfigError) as refused:
        ModelConfig.from_checkpoint(checkpoint, serving(**operator))
    for word in [str(checkpoint / name), *words]:
        assert word in str(refused.value)


def test_no_pooling_file_and_no_word_of_the_operator(checkpoint: Path) -> None:
    (checkpoint / POOLING).unlink()
    with pytest.raises(ConfigError, match=r"1_Pooling/config\.json is missing: state pooling .*tiny/config\.pbtxt"):
        ModelConfig.from_checkpoint(checkpoint, serving())


def test_a_pooling_the_operator_invents(checkpoint: Path) -> None:
    (checkpoint / POOLING).unlink()
    with pytest.raises(ConfigError, match="'max' is not implemented"):
        ModelConfig.from_checkpoint(checkpoint, serving(pooling="max"))


def test_matryoshka_sizes_the_operator_got_wrong_are_blamed_on_config_pbtxt(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny/config\.pbtxt: matryoshka_dimensions \[61\].*60"):
        ModelConfig.from_checkpoint(checkpoint, serving(matryoshka_dimensions=(61,)))


@pytest.mark.parametrize("module", ["sentence_transformers.models.Dense", "sentence_transformers.models.LSTM"])
def test_a_module_that_is_not_implemented(module: str, checkpoint: Path) -> None:
    modules = json.loads((MINILM / MODULES).read_text())
    (checkpoint / MODULES).write_text(json.dumps(modules))
    assert ModelConfig.from_checkpoint(checkpoint, serving()).pooling == "cls"
    (checkpoint / MODULES).write_text(json.dumps([*modules, {"idx": 3, "name": "3", "path": "3_x", "type": module}]))
    with pytest.raises(ConfigError, match=rf"modules\.json: module '{module}' is not implemented"):
        ModelConfig.from_checkpoint(checkpoint, serving())


@pytest.mark.parametrize("text", ["", "{", "\x00", "[]", "7"])
@pytest.mark.parametrize("name", [CONFIG, POOLING])
def test_a_file_that_is_no_json_object(name: str, text: str, checkpoint: Path) -> None:
    (checkpoint / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_checkpoint(checkpoint, serving())


@pytest.mark.parametrize("module", ["Transformer", {}, {"type": 3}, None])
def test_a_list_of_modules_that_are_none(module: object, checkpoint: Path) -> None:
    (checkpoint / MODULES).write_text(json.dumps([module]))
    with pytest.raises(ConfigError, match=r"modules\.json"):
        ModelConfig.from_checkpoint(checkpoint, serving())


def test_no_config_json(checkpoint: Path) -> None:
    (checkpoint / CONFIG).unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        ModelConfig.from_checkpoint(checkpoint, serving())
