"""The probe of `verify`: a private tritonserver starts, computes the vectors that transformers computes, and stops."""

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
from triton_embed.gateway.verify import probe as probe_module
from triton_embed.gateway.verify import samples
from triton_embed.gateway.verify.model_cards import Input
from triton_embed.gateway.verify.probe import ProbeError, ProbeResult, probe
from triton_embed.python_backend.checkpoint import repository

NEAR = "https://pages.example/a%20folder/near%20by.png?width=800"
FAR = "http://127.0.0.1:9/far.png"  # never requested: the probe refuses private addresses
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
    """Return tritonserver and the stubs of this repository. Other tests run other servers."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if any(str(models) in argument for argument in command_line(child))
    ]


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probed")


@pytest.fixture(scope="module")
def result(
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
    return probe(TritonOptions(models), "gme", inputs, images)


def test_card_inputs_are_embedded(result: ProbeResult, checkpoint: Path, picture: Image.Image) -> None:
    items = [
        {"text": TEXT.text},
        {"text": TEXT.text, "instruction": FIND},
        {"images": [picture]},
        {"text": FUSED.text, "images": [picture]},
    ]
    expected = oracles.gme_vectors(checkpoint, oracles.gme_inputs(checkpoint, items, 4, 16), "sequential")
    assert set(result.cards) == {TEXT, INSTRUCTED, PICTURE, FUSED}  # the image of UNFETCHED could not be fetched
    for card_input, vector in zip((TEXT, INSTRUCTED, PICTURE, FUSED), expected, strict=True):
        assert np.abs(result.cards[card_input] - vector).max() < 2e-5, card_input


def test_samples_are_embedded_in_order_together_and_alone(result: ProbeResult, checkpoint: Path) -> None:
    files = list(samples.images())
    items = [{"text": text} for text in samples.TEXTS[:5]]
    items += [{"images": [Image.open(io.BytesIO(file))]} for file in files]
    expected = oracles.gme_vectors(checkpoint, oracles.gme_inputs(checkpoint, items, 4, 16), "sequential")
    assert result.names == [*samples.TEXTS, "image 0", "image 1", "image 2"]
    for vectors in (result.together.vectors, result.alone):
        assert len(vectors) == len(result.names)
        assert np.abs(np.concatenate([vectors[:5], vectors[-3:]]) - expected).max() < 2e-5
    assert (result.together.dropped > 0).sum() >= 1
    assert result.info.modalities[0] == "text"


@pytest.mark.usefixtures("result")
def test_all_processes_end_with_the_probe(models: Path) -> None:
    assert processes(models) == []


def test_model_that_does_not_load_is_reported(tmp_path: Path) -> None:
    checkpoint = write_bert(tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    repository.write_model(REPOSITORY, "bge", tmp_path / "models", "bge", {"checkpoint": str(checkpoint)})
    with pytest.raises(ProbeError, match=r"^no model can be served \(bge: .*/checkpoint has no tokenizer: none of "):
        probe(TritonOptions(tmp_path / "models"), "bge", [], None)


def test_model_process_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the process of a model, as the kernel does when memory runs out. Its requests would never be answered."""
    checkpoint = write_bert(tmp_path / "checkpoint")
    repository.write_model(REPOSITORY, "bge", tmp_path / "models", "bge", {"checkpoint": str(checkpoint)})

    async def wait_and_kill(client: TritonClient, *_: object) -> ProbeResult:
        await probe_module._wait_until_loaded(client, "bge")
        stubs = [child for child in processes(tmp_path) if "stub" in command_line(child)[0]]
        assert len(stubs) == 1
        stubs[0].kill()
        await asyncio.sleep(60)
        raise AssertionError("the probe did not notice that the process died")

    monkeypatch.setattr(probe_module, "_probe", wait_and_kill)
    with pytest.raises(ProbeError, match=r"^the process of model bge died"):
        probe(TritonOptions(tmp_path / "models"), "bge", [], None)
