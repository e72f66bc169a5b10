"""Every model directory that is checked in, served by the plain command a user types."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.http
from checkpoints import write_clip

from conftest import REPOSITORY, Triton, write_bert
from triton_embed.python_backend.checkpoint import repository

FAMILIES = ["bge", "clip", "e5_mistral", "gme_qwen2_vl", "gte_qwen2", "minilm", "qwen3_embedding"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """`tritonserver --model-repository model_repository` over the checked-in directories."""
    server = Triton(REPOSITORY, tmp_path_factory.mktemp("plain") / "log")
    yield server
    server.stop()


@pytest.fixture
def client(plain: Triton) -> Iterator[tritonclient.http.InferenceServerClient]:
    made = tritonclient.http.InferenceServerClient(plain.http)
    yield made
    made.close()


def _text() -> tritonclient.http.InferInput:
    found = tritonclient.http.InferInput("TEXT", [1, 1], "BYTES")
    found.set_data_from_numpy(np.array([["hello"]], dtype=np.object_))
    return found


def test_the_repository_holds_the_six_families_and_the_default() -> None:
    assert repository.model_names(REPOSITORY) == FAMILIES
    assert sorted(path.name for path in REPOSITORY.iterdir()) == FAMILIES  # anything else stops tritonserver


def test_all_directories_boot_and_minilm_serves(client: tritonclient.http.InferenceServerClient) -> None:
    states = {entry["name"]: entry.get("state") for entry in client.get_model_repository_index()}
    assert states == dict.fromkeys(FAMILIES, "READY")
    vector = client.infer("minilm", [_text()]).as_numpy("EMBEDDING")
    assert vector.shape == (1, 384)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "minilm"])
def test_a_family_that_cannot_serve_says_why(client: tritonclient.http.InferenceServerClient, name: str) -> None:
    with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
        client.infer(name, [_text()])
    assert caught.value.status() == "503"
    checkpoint = repository.read_config(REPOSITORY, name).parameters["checkpoint"].string_value
    first, second = caught.value.message().splitlines()
    assert first == f"Model '{name}' has no checkpoint. Fetch it with: triton-embed download {checkpoint}"
    assert second.endswith(f"/checkpoints/{checkpoint}")


def test_only_a_family_with_a_checkpoint_pays_for_torch(plain: Triton) -> None:
    torch_loaded = {}
    for child in psutil.Process(plain.process.pid).children():
        words = child.cmdline()
        if words and words[0].endswith("stub"):
            maps = Path(f"/proc/{child.pid}/maps").read_text()
            torch_loaded[Path(words[1]).parent.parent.name] = "libtorch" in maps
    assert torch_loaded == {name: name == "minilm" for name in FAMILIES}


def test_idle_workers_of_torch_do_not_spin_for_long(plain: Triton) -> None:
    stubs = [child for child in psutil.Process(plain.process.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    assert stubs
    assert all(int(stub.environ()["GOMP_SPINCOUNT"]) <= 30_000 for stub in stubs)


def test_nothing_listens_beyond_this_machine(plain: Triton) -> None:
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.Process(plain.process.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def truncated(directory: Path) -> tuple[str, Path, str]:
    """Break a checkpoint: (its family, where it lies, what the server must say)."""
    checkpoint = write_bert(directory)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    return "bge", checkpoint, f"{weights} cannot be read"


def without_preprocessor(directory: Path) -> tuple[str, Path, str]:
    checkpoint = write_clip(directory)
    (checkpoint / "preprocessor_config.json").unlink()
    return "clip", checkpoint, f"{checkpoint / 'preprocessor_config.json'} is missing"


def test_a_broken_checkpoint_fails_to_load_and_names_the_file(tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(REPOSITORY / "minilm", models / "minilm", ignore=shutil.ignore_patterns("__pycache__"))
    broken = {make.__name__: make(tmp_path / make.__name__) for make in (truncated, without_preprocessor)}
    for name, (family, checkpoint, _) in broken.items():
        repository.write_model(REPOSITORY, family, models, name, {"checkpoint": str(checkpoint)})
    server = Triton(models, tmp_path / "log", "--exit-on-error=false", "--strict-readiness=false")
    try:
        client = tritonclient.http.InferenceServerClient(server.http)
        index = {entry["name"]: entry for entry in client.get_model_repository_index()}
        assert client.infer("minilm", [_text()]).as_numpy("EMBEDDING").shape == (1, 384)
        client.close()
    finally:
        server.stop()
    for name, (_, _, words) in broken.items():
        assert index[name]["state"] == "UNAVAILABLE"
        assert words in index[name]["reason"]
