"""Model directories written for a checkpoint: the family is found, its files are copied, nothing else changes."""

import json
from pathlib import Path

import pytest

from conftest import MINILM, REPOSITORY, write_bert
from triton_embed.gateway import repository
from triton_embed.gateway.repository import RepositoryError


def _checkpoint(directory: Path, model_type: str, pooling: dict[str, object] | None = None) -> Path:
    directory.mkdir()
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


@pytest.mark.parametrize(
    ("model_type", "pooling", "says"),
    [
        ("t5", None, "model_type 't5' belongs to no family; served are bert, clip, llama"),
        ("bert", None, "states pooling 'nothing'; of model_type 'bert' are bge (cls) and minilm (mean)"),
        ("bert", {"pooling_mode_max_tokens": True}, "states pooling 'max'"),
    ],
)
def test_family_of_refuses_to_guess(tmp_path: Path, model_type: str, pooling: object, says: str) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoint", model_type, pooling)  # type: ignore[arg-type]
    with pytest.raises(RepositoryError) as caught:
        repository.family_of(checkpoint, REPOSITORY)
    assert says in str(caught.value)


def test_family_of_names_a_missing_config(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"config\.json is missing"):
        repository.family_of(tmp_path, REPOSITORY)


def test_write_model_sets_parameters_and_leaves_the_source_alone(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in REPOSITORY.rglob("*") if path.suffix in {".py", ".pbtxt"}}
    checkpoint = write_bert(tmp_path / "my-model", pooling="mean")
    repository.write_model(
        REPOSITORY, "minilm", tmp_path / "models", "my-model", {"checkpoint": str(checkpoint), "dtype": "float32"}
    )
    config = repository.read_config(tmp_path / "models", "my-model")
    stated = {key: value.string_value for key, value in config.parameters.items()}
    assert config.name == "my-model"
    assert stated["checkpoint"] == str(checkpoint)
    assert stated["dtype"] == "float32"
    assert "checkpoint_package" not in stated  # it carries another checkpoint
    assert (tmp_path / "models" / "my-model" / "1" / "model.py").is_file()
    assert before == {path: path.read_bytes() for path in before}


def test_an_unreadable_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.pbtxt").write_text("nonsense { ")
    with pytest.raises(RepositoryError, match=r"odd/config\.pbtxt"):
        repository.read_config(tmp_path, "odd")
