"""A private tritonserver is started, asked and stopped: what it says is what transformers says."""

import asyncio
import io
from pathlib import Path

import numpy as np
import oracles
import psutil
import pytest
from checkpoints import CASES
from PIL import Image

from conftest import REPOSITORY, write_bert
from triton_embed.gateway.process.triton_process import TritonOptions
from triton_embed.gateway.triton.client import TritonClient
from triton_embed.gateway.verify import probe as examine_module
from triton_embed.gateway.verify import samples
from triton_embed.gateway.verify.model_cards import Input
from triton_embed.gateway.verify.probe import ProbeError, ProbeResult, probe
from triton_embed.python_backend.checkpoint import repository

NEAR = "https://pages.example/a%20folder/near%20by.png?width=800"
FAR = "http://127.0.0.1:9/far.png"  # an address that is never asked
FIND = "Find an image that matches the given text."
TEXT = Input(text="a photo of a cat")
INSTRUCTED = Input(text="a photo of a cat", instruction=FIND)
PICTURE = Input(image=NEAR)
FUSED = Input(text="a photo of a cat", image=NEAR)
UNFETCHED = Input(text="a dog", image=FAR)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.open(io.BytesIO(next(samples.images()))).resize((90, 60))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = next(case for case in CASES if case.name == "gme_qwen2_vl-hub-sequential")
    return case.write(tmp_path_factory.mktemp("gme") / "checkpoint")


def processes(models: Path) -> list[psutil.Process]:
    """tritonserver and the stubs of a repository; other tests have servers of their own."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if any(str(models) in word for word in words(child))
    ]


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examined")


@pytest.fixture(scope="module")
def answers(
    models: Path, tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, picture: Image.Image
) -> ProbeResult:
    images = tmp_path_factory.mktemp("images")
    picture.save(images / "near by.png")
    parameters = {
        "checkpoint": str(checkpoint),
        "image_positions": "sequential",
        "min_image_tokens": "4",
        "max_image_tokens": "16",
    }
    repository.write_model(REPOSITORY, "gme_qwen2_vl", models, "gme", parameters)
    inputs = [TEXT, INSTRUCTED, PICTURE, FUSED, UNFETCHED, TEXT]
    return probe(TritonOptions(models, ("gme",)), "gme", inputs, images)


def test_the_inputs_of_a_card(answers: ProbeResult, checkpoint: Path, picture: Image.Image) -> None:
    items = [
        {"text": TEXT.text},
        {"text": TEXT.text, "instruction": FIND},
        {"images": [picture]},
        {"text": FUSED.text, "images": [picture]},
    ]
    wanted = oracles.gme_vectors(checkpoint, oracles.gme_inputs(checkpoint, items, 4, 16), "sequential")
    assert set(answers.cards) == {TEXT, INSTRUCTED, PICTURE, FUSED}  # the other image could not be fetched
    for one, vector in zip((TEXT, INSTRUCTED, PICTURE, FUSED), wanted, strict=True):
        assert np.abs(answers.cards[one] - vector).max() < 2e-5, one


def test_the_samples_in_order_together_and_alone(answers: ProbeResult, checkpoint: Path) -> None:
    files = list(samples.images())
    items = [{"text": text} for text in samples.TEXTS[:5]]
    items += [{"images": [Image.open(io.BytesIO(file))]} for file in files]
    wanted = oracles.gme_vectors(checkpoint, oracles.gme_inputs(checkpoint, items, 4, 16), "sequential")
    assert answers.names == [*samples.TEXTS, "image 0", "image 1", "image 2"]
    for vectors in (answers.together.vectors, answers.alone):
        assert len(vectors) == len(answers.names)
        assert np.abs(np.concatenate([vectors[:5], vectors[-3:]]) - wanted).max() < 2e-5
    assert (answers.together.dropped > 0).sum() >= 1
    assert answers.info.modalities[0] == "text"


def test_nothing_is_left_running(answers: ProbeResult, models: Path) -> None:
    assert processes(models) == []


def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    checkpoint = write_bert(tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    repository.write_model(REPOSITORY, "bge", tmp_path / "models", "bge", {"checkpoint": str(checkpoint)})
    with pytest.raises(ProbeError, match=r"^model 'bge' did not load"):
        probe(TritonOptions(tmp_path / "models", ("bge",)), "bge", [], None)


def test_a_model_that_dies_while_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel ends one that takes too much memory: nothing would ever be answered."""
    checkpoint = write_bert(tmp_path / "checkpoint")
    repository.write_model(REPOSITORY, "bge", tmp_path / "models", "bge", {"checkpoint": str(checkpoint)})

    async def ask(client: TritonClient, *_: object) -> ProbeResult:
        await examine_module._wait_until_loaded(client, "bge")
        stubs = [child for child in processes(tmp_path) if "stub" in words(child)[0]]
        assert len(stubs) == 1
        stubs[0].kill()
        await asyncio.sleep(60)
        raise AssertionError("the examination went on")

    monkeypatch.setattr(examine_module, "_probe", ask)
    with pytest.raises(ProbeError, match=r"^the process of model bge died"):
        probe(TritonOptions(tmp_path / "models", ("bge",)), "bge", [], None)
