"""Writing a model directory for a checkpoint: the family is detected, its files are copied, nothing else changes."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from checkpoints import FAMILIES
from google.protobuf import text_format
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import save
from tritonclient.grpc import model_config_pb2

from conftest import MINILM, REPOSITORY, write_bert
from triton_embed.python_backend.checkpoint import repository
from triton_embed.python_backend.checkpoint.repository import Checkpoint, RepositoryError

EN = "Represent this sentence for searching relevant passages: "
ZH = "为这个句子生成表示以用于检索相关文章："


def _checkpoint(directory: Path, model_type: str, pooling: dict[str, object] | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if pooling is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory


@pytest.mark.parametrize(
    ("model_type", "pooling", "family"),
    [
        ("bert", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "bge"),
        ("bert", {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "minilm"),
        ("bert", {"pooling_mode": "mean"}, "minilm"),
        ("bert", {"pooling_mode": "lasttoken"}, "minilm"),  # not BGE: its query instruction would be wrong
        ("bert", {"pooling_mode_max_tokens": True}, "minilm"),
        ("xlm-roberta", {"pooling_mode_cls_token": True}, "bge"),
        ("xlm-roberta", {"pooling_mode_mean_tokens": True}, "bge"),
        ("xlm-roberta", {"pooling_mode": "max"}, "bge"),
        ("xlm-roberta", None, "bge"),
        ("mistral", None, "e5_mistral"),
        ("llama", None, "e5_mistral"),
        ("qwen2", None, "gte_qwen2"),
        ("qwen3", None, "qwen3_embedding"),
        ("qwen2_vl", None, "gme_qwen2_vl"),
        ("clip", None, "clip"),
    ],
)
def test_family_of(tmp_path: Path, model_type: str, pooling: dict[str, object] | None, family: str) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoint", model_type, pooling)
    assert repository.family_of(checkpoint, REPOSITORY) == family


def test_family_of_real_weights() -> None:
    assert repository.family_of(MINILM, REPOSITORY) == "minilm"


def test_added_models_are_not_families(tmp_path: Path) -> None:
    models = _copy(tmp_path, "bge", "minilm")
    for name, pooling in (("m3", "cls"), ("e5", "mean"), ("a-bert", "mean")):
        repository.write_model(models, "bge", models, name, {"checkpoint": "org/x", "pooling": pooling})
    assert repository.model_names(models) == ["a-bert", "bge", "e5", "m3", "minilm"]
    assert repository.family_names(models) == ["bge", "minilm"]
    checkpoint = _checkpoint(tmp_path / "new", "xlm-roberta", {"pooling_mode_mean_tokens": True})
    assert repository.family_of(checkpoint, models) == "bge"
    shutil.rmtree(models / "bge")
    shutil.rmtree(models / "minilm")
    with pytest.raises(RepositoryError, match="contains no family"):
        repository.family_of(checkpoint, models)


@pytest.mark.parametrize(
    ("model_type", "pooling", "message"),
    [
        ("t5", None, "model_type 't5' belongs to no family; supported: bert, clip, llama"),
        (
            "bert",
            None,
            "has pooling 'nothing'; families of model_type 'bert': bge (cls) and minilm (mean); --pooling",
        ),
        ("bert", {"pooling_mode_max_tokens": False}, "has pooling 'nothing'"),
    ],
)
def test_family_of_rejects_unknown_checkpoints(tmp_path: Path, model_type: str, pooling: object, message: str) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoint", model_type, pooling)  # type: ignore[arg-type]
    with pytest.raises(RepositoryError) as caught:
        repository.family_of(checkpoint, REPOSITORY)
    assert message in str(caught.value)


def test_family_of_reports_a_missing_config(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"config\.json is missing"):
        repository.family_of(tmp_path, REPOSITORY)


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "lasttoken"])
@pytest.mark.parametrize("folder", ["1_Pooling", "pool"])
def test_checkpoint_pooling_reads_files_of_sentence_transformers(mode: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    Pooling(8, pooling_mode=mode).save(str(tmp_path / folder))
    if folder != "1_Pooling":
        kinds = {"": "Transformer", folder: "Pooling"}
        modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert repository.checkpoint_pooling(tmp_path) == mode.replace("lasttoken", "last")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ""),
        ({}, ""),
        ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls+mean"),  # the engine refuses it
        ({"pooling_mode": ["mean", "lasttoken"]}, "mean+last"),
        ({"pooling_mode_weightedmean_tokens": True}, "pooling_mode_weightedmean_tokens"),
    ],
)
def test_checkpoint_pooling(config: dict[str, object] | None, expected: str, tmp_path: Path) -> None:
    assert repository.checkpoint_pooling(_checkpoint(tmp_path / "x", "bert", config)) == expected


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Qwen3-Embedding-4B", "Qwen3-Embedding-4B"),
        ("bge-small-en-v1.5", "bge-small-en-v1.5"),
        ("my bge (v2)", "my-bge--v2-"),
        (".hidden", "hidden"),
        ("-x", "x"),
        ("模型", "model"),
        ("a/b", "a-b"),
    ],
)
def test_model_name_replaces_invalid_characters(title: str, name: str, tmp_path: Path) -> None:
    assert repository.model_name(title) == name
    repository.check_name(name, tmp_path)


@pytest.mark.parametrize("name", ["a b", "a/b", "../x", ".x", "", "模型", "x\n"])
def test_check_name_rejects_an_invalid_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="Invalid model name"):
        repository.check_name(name, tmp_path)


@pytest.mark.parametrize("name", ["minilm", "MiniLM"])
def test_check_name_rejects_a_taken_name(name: str) -> None:
    with pytest.raises(RepositoryError, match=rf"{REPOSITORY}/minilm exists"):
        repository.check_name(name, REPOSITORY)


@pytest.mark.parametrize(
    ("title", "model_type", "family", "query"),
    [
        ("bge-large-en-v1.5", "bert", "bge", EN),
        ("bge-large-zh-v1.5", "bert", "bge", ZH),
        ("BGE-small-ZH", "bert", "bge", ZH),
        ("bge-m3", "xlm-roberta", "bge", None),
        ("bge-m3-zh", "xlm-roberta", "bge", None),
        ("stella-base-zh", "bert", "minilm", None),
        (
            "gte-qwen2-zh",
            "qwen2",
            "gte_qwen2",
            "Given a web search query, retrieve relevant passages that answer the query",
        ),
        ("clip-zh", "clip", "clip", None),
    ],
)
def test_query_instruction(title: str, model_type: str, family: str, query: str | None, tmp_path: Path) -> None:
    checkpoint = Checkpoint(_checkpoint(tmp_path / title, model_type), f"org/{title}", f"org/{title}")
    facts = repository.checkpoint_parameters(checkpoint, family, REPOSITORY, title)
    written = _parameters(repository.write_model(REPOSITORY, family, tmp_path / "models", title, facts))
    assert written.get("query_instruction") == query


def test_parameters_come_from_the_checkpoint_then_the_family(tmp_path: Path) -> None:
    mean = _checkpoint(tmp_path / "mean", "qwen3", {"pooling_mode_mean_tokens": True})
    silent = _checkpoint(tmp_path / "silent", "qwen3")
    written = [
        _parameters(repository.write_model(REPOSITORY, "qwen3_embedding", tmp_path / "models", path.name, facts))
        for path in (mean, silent)
        for facts in [
            repository.checkpoint_parameters(Checkpoint(path, str(path)), "qwen3_embedding", REPOSITORY, path.name)
        ]
    ]
    assert [parameters["pooling"] for parameters in written] == ["mean", "last"]
    assert [parameters["is_matryoshka"] for parameters in written] == ["true", "true"]
    assert [parameters["checkpoint"] for parameters in written] == [str(mean), str(silent)]
    assert not any("aliases" in parameters for parameters in written)  # the family's aliases are not copied


@pytest.mark.parametrize(
    ("checkpoint", "aliases"),
    [
        (Checkpoint(Path("x"), "org/x", "org/x"), None),  # the gateway derives aliases from the id
        (Checkpoint(Path("/m/x"), "/m/x"), "x"),
        (Checkpoint(Path("/m/taken"), "/m/taken"), None),
        (Checkpoint(Path("/m/a, b"), "/m/a, b"), None),
        (Checkpoint(Path("/m/0a1b"), "/m/0a1b", "BAAI/bge-m3"), "BAAI/bge-m3, bge-m3"),
    ],
)
def test_aliases(checkpoint: Checkpoint, aliases: str | None, tmp_path: Path) -> None:
    facts = repository.checkpoint_parameters(checkpoint, "clip", REPOSITORY, "taken")
    written = _parameters(repository.write_model(REPOSITORY, "clip", tmp_path, "taken", facts))
    assert written.get("aliases") == aliases


def test_pickle_is_rejected_with_the_command_that_converts_it(tmp_path: Path) -> None:
    directory = write_bert(tmp_path / "it's a model")
    weights = load_file(directory / "model.safetensors")
    save(weights, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(RepositoryError, match="pickles") as caught:
        repository.check_weights(Checkpoint(directory, str(directory)))
    command = str(caught.value).partition("try again: ")[2]
    subprocess.run(shlex.split(command), check=True, capture_output=True)
    repository.check_weights(Checkpoint(directory, str(directory)))
    converted = load_file(directory / "model.safetensors")
    assert converted.keys() == weights.keys()
    assert all(bool((converted[name] == weights[name]).all()) for name in weights)


def test_loaded_by_lists_models_with_the_same_checkpoint(tmp_path: Path) -> None:
    assert repository.loaded_by(Checkpoint(tmp_path, "BAAI/bge-base-en-v1.5"), REPOSITORY) == ["bge"]
    assert repository.loaded_by(Checkpoint(tmp_path, "BAAI/bge-m3"), REPOSITORY) == []
    assert repository.loaded_by(Checkpoint(tmp_path, "BAAI/bge-m3"), tmp_path / "none") == []


def test_install_moves_every_file(tmp_path: Path) -> None:
    source = repository.write_model(REPOSITORY, "bge", tmp_path / "source", "mine", {"checkpoint": "org/x"})
    before = {path.relative_to(source): path.read_bytes() for path in source.rglob("*.*")}
    installed = repository.install(source, tmp_path / "models")
    assert installed == tmp_path / "models" / "mine"
    assert {path.relative_to(installed): path.read_bytes() for path in installed.rglob("*.*")} == before
    assert len(before) == 2
    assert not source.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_install_leaves_nothing_behind(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Install as from another file system, where a move is a copy."""

    def copy_half(source: Path, target: Path) -> None:
        shutil.copytree(source / "1", target / "1")
        raise error

    source = repository.write_model(REPOSITORY, "bge", tmp_path / "source", "mine", {"checkpoint": "org/x"})
    models = _copy(tmp_path, "minilm")
    monkeypatch.setattr(shutil, "move", copy_half)
    with pytest.raises(error):
        repository.install(source, models)
    assert [path.name for path in models.iterdir()] == ["minilm"]


def test_install_does_not_overwrite_a_model(tmp_path: Path) -> None:
    source = repository.write_model(REPOSITORY, "bge", tmp_path / "source", "minilm", {"checkpoint": "org/x"})
    models = _copy(tmp_path, "minilm")
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    with pytest.raises(RepositoryError, match="minilm exists"):
        repository.install(source, models)
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before


def test_write_model_sets_parameters_and_keeps_the_source(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in REPOSITORY.rglob("*") if path.suffix in {".py", ".pbtxt"}}
    checkpoint = write_bert(tmp_path / "my-model", pooling="mean")
    repository.write_model(
        REPOSITORY, "minilm", tmp_path / "models", "my-model", {"checkpoint": str(checkpoint), "dtype": "float32"}
    )
    config = repository.read_config(tmp_path / "models", "my-model")
    written = {key: value.string_value for key, value in config.parameters.items()}
    assert config.name == "my-model"
    assert written["checkpoint"] == str(checkpoint)
    assert written["dtype"] == "float32"
    assert "checkpoint_package" not in written  # the package contains another checkpoint
    assert (tmp_path / "models" / "my-model" / "1" / "model.py").is_file()
    assert before == {path: path.read_bytes() for path in before}


def test_write_model_keeps_batching_and_readable_unicode(tmp_path: Path) -> None:
    repository.write_model(REPOSITORY, "bge", tmp_path, "zh", {"checkpoint": "org/x", "query_instruction": ZH})
    text = (tmp_path / "zh" / "config.pbtxt").read_text(encoding="utf-8")
    assert f'"{ZH}"' in text
    written, family = (
        text_format.Parse(source, model_config_pb2.ModelConfig())
        for source in (text, (REPOSITORY / "bge" / "config.pbtxt").read_text())
    )
    assert dict(written.metric_tags) == {"family": "bge"}
    for config in (written, family):
        for field in ("name", "parameters", "metric_tags"):
            config.ClearField(field)
    assert written == family


def test_read_config_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.pbtxt").write_text("nonsense { ")
    with pytest.raises(RepositoryError, match=r"odd/config\.pbtxt"):
        repository.read_config(tmp_path, "odd")


def _copy(directory: Path, *names: str) -> Path:
    for name in names:
        copied = directory / "models" / name
        shutil.copytree(REPOSITORY / name, copied, ignore=shutil.ignore_patterns("__pycache__"))
    return directory / "models"


def _parameters(model: Path) -> dict[str, str]:
    config = text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    return {key: value.string_value for key, value in config.parameters.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_no_queue_policy(family: str) -> None:
    """With one, Triton 2.51 lets requests wait up to 500 ms; the models limit their queue themselves (wire.py)."""
    text = (REPOSITORY / family / "config.pbtxt").read_text(encoding="utf-8")
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching == model_config_pb2.ModelDynamicBatching()
