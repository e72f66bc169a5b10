"""`triton-embed verify`: real weights against their card, a tiny checkpoint against transformers, and errors."""

import json
import re
import shutil
from pathlib import Path

import oracles
import pytest
from checkpoints import CASES, TASK

from conftest import MINILM, REPOSITORY, write_bert
from triton_embed.gateway import cli
from triton_embed.gateway.verify import model_cards as cards


def verify(*arguments: str | Path) -> str | int | None:
    """Run the command. Return the exit code, or the message that it exits with instead of 1."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", *map(str, arguments)])
    return caught.value.code


def test_minilm_agrees_with_its_card_and_sentence_transformers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = verify("minilm")
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert re.search(
        r"0\.6660 +0\.6660 +\S+  ok +\"The weather is lovely today\.\" x \"It's so sunny outside!\"", printed
    )
    assert len(re.findall(r'  ok +"', printed)) == 18
    assert re.search(r"41 texts by sentence-transformers [\d.]+\n +lowest cosine +[01]\.\d+  ok", printed)
    assert printed.endswith("23 agree, 0 differ, 0 could not be compared\n")


def test_wrong_score_on_a_card_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verify a decoder whose card is found by its directory name. Only the wrong score differs."""
    case = next(case for case in CASES if case.name == "qwen3_embedding-bare")
    checkpoint = case.write(tmp_path / "Tiny-Embedding-0.1B")
    queries, documents = ["what is a cat", "what is a dog"], ["a cat sat", "the dog ran"]
    prompted = [f"Instruct: {TASK}\nQuery:{query}" for query in queries]
    vectors = oracles.decoder_vectors(checkpoint, oracles.token_ids(checkpoint, [*prompted, *documents]))
    scores = (100 * vectors[:2] @ vectors[2:].T).tolist()
    scores[1][0] += 1
    entry = {
        "checkpoint": "org/tiny-embedding-0.1b",
        "source": "a page",
        "kind": "cosine x 100",
        "decimals": 4,
        "tolerance": 0.01,
        "queries": [{"text": query, "instruction": TASK} for query in queries],
        "documents": [{"text": document} for document in documents],
        "scores": scores,
    }
    monkeypatch.setattr(cards, "FILE", tmp_path / "cards.json")
    cards.FILE.write_text(json.dumps([entry]))
    code = verify(checkpoint)
    printed = capsys.readouterr().out
    assert code == 1, printed
    assert re.search(r'-1\.0000  differs +"what is a dog" x "a cat sat"\n', printed)
    assert len(re.findall(r'0\.0000  ok +"', printed)) == 3
    assert re.search(r"41 texts by transformers [\d.]+\n +lowest cosine +1\.0+  ok", printed)
    assert printed.endswith("8 agree, 1 differ, 0 could not be compared\n")


@pytest.mark.parametrize("model", ["Qwen/Qwen3-Embedding-0.6B", "qwen3_embedding", "intfloat/multilingual-e5-base"])
def test_missing_checkpoint_error_contains_the_download_command(tmp_path: Path, model: str) -> None:
    checkpoints = tmp_path / "a directory"
    message = verify(model, f"--checkpoints={checkpoints}")
    checkpoint = model if "/" in model else "Qwen/Qwen3-Embedding-0.6B"
    assert isinstance(message, str)
    assert f"{checkpoint} is not on this machine" in message
    assert message.endswith(f"Fetch it with: triton-embed download {checkpoint} '--checkpoints={checkpoints}'")
    assert "\n" not in message
    assert not checkpoints.exists()  # verify downloads nothing


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    checkpoint = write_bert(tmp_path / "org" / "name")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    for model in (checkpoint, "org/name"):
        assert "has no *.safetensors file" in str(verify(model, f"--checkpoints={tmp_path}"))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "gte_qwen2-bidirectional-one-layer")
    checkpoint = case.write(tmp_path / "checkpoint")
    shard = sorted(checkpoint.glob("*.safetensors"))[-1]
    shard.unlink()
    assert str(verify(checkpoint)).endswith(f"names {shard}, which is missing")


def test_missing_checkpoint_directory_of_a_model_is_named(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "bge", tmp_path / "models" / "mine")
    config = tmp_path / "models" / "mine" / "config.pbtxt"
    config.write_text(config.read_text().replace('"BAAI/bge-base-en-v1.5"', f'"{tmp_path / "gone"}"'))
    message = str(verify("mine", f"--model-repository={tmp_path / 'models'}"))
    assert message.endswith(f"{tmp_path / 'gone'} is not on this machine: looked in {tmp_path / 'gone'}")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nonsense"], "nonsense is neither a directory with a config.json, nor an id"),
        (["minilm", "--card=org/unknown"], "--card org/unknown: there is no such card; there are Alibaba-NLP/gme"),
        (["minilm", "--parameter=dtype"], "--parameter dtype is not KEY=VALUE"),
        (["minilm", "--parameter=dtyp=x"], "minilm/config.pbtxt: unknown parameter 'dtyp'"),
        (["minilm", "--parameter=dtype=int4"], "dtype is 'int4'; must be one of"),
        (["minilm", "--model-repository=/nonexistent"], "/nonexistent contains no model directory"),
        ([str(MINILM), "--model-repository=/nonexistent"], "/nonexistent contains no model directory"),
    ],
)
def test_errors_are_one_line(arguments: list[str], error: str) -> None:
    message = str(verify(*arguments))
    assert error in message
    assert "\n" not in message
