"""All checked-in model directories, served by the plain command that a user types."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.http
from checkpoints import FAMILIES, write_clip

from conftest import REPOSITORY, Triton, write_bert
from triton_embed.python_backend.checkpoint import repository

DEFAULT = "minilm"  # the only family whose weights are installed with the server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """Run `tritonserver --model-repository model_repository` with the checked-in directories."""
    server = Triton(REPOSITORY, tmp_path_factory.mktemp("plain") / "log")
    yield server
    server.stop()


@pytest.fixture
def client(plain: Triton) -> Iterator[tritonclient.http.InferenceServerClient]:
    http_client = tritonclient.http.InferenceServerClient(plain.http)
    yield http_client
    http_client.close()


def _text() -> tritonclient.http.InferInput:
    tensor = tritonclient.http.InferInput("TEXT", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([["hello"]], dtype=np.object_))
    return tensor


def test_repository_contains_only_families() -> None:
    assert DEFAULT in FAMILIES
    assert sorted(path.name for path in REPOSITORY.iterdir()) == list(FAMILIES)  # tritonserver refuses other entries


def test_all_families_load_and_the_default_serves(client: tritonclient.http.InferenceServerClient) -> None:
    states = {entry["name"]: entry.get("state") for entry in client.get_model_repository_index()}
    assert states == dict.fromkeys(FAMILIES, "READY")
    vector = client.infer(DEFAULT, [_text()]).as_numpy("EMBEDDING")
    assert vector.shape == (1, 384)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != DEFAULT])
def test_family_without_checkpoint_returns_the_download_command(
    client: tritonclient.http.InferenceServerClient, name: str
) -> None:
    with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
        client.infer(name, [_text()])
    assert caught.value.status() == "503"
    checkpoint = repository.read_config(REPOSITORY, name).parameters["checkpoint"].string_value
    first, second = caught.value.message().splitlines()
    assert first == f"Model '{name}' has no checkpoint. Fetch it with: triton-embed download {checkpoint}"
    assert second.endswith(f"/checkpoints/{checkpoint}")


def test_only_a_family_with_a_checkpoint_imports_torch(plain: Triton) -> None:
    torch_loaded = {}
    for child in psutil.Process(plain.process.pid).children():
        command = child.cmdline()
        if command and command[0].endswith("stub"):
            maps = Path(f"/proc/{child.pid}/maps").read_text()
            torch_loaded[Path(command[1]).parent.parent.name] = "libtorch" in maps
    assert torch_loaded == {name: name == DEFAULT for name in FAMILIES}


def test_idle_torch_workers_spin_only_briefly(plain: Triton) -> None:
    stubs = [child for child in psutil.Process(plain.process.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    assert stubs
    assert all(int(stub.environ()["GOMP_SPINCOUNT"]) <= 30_000 for stub in stubs)


def test_server_listens_on_loopback_only(plain: Triton) -> None:
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.Process(plain.process.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def truncated(directory: Path) -> tuple[str, Path, str]:
    """Write a checkpoint with truncated weights. Return (family, directory, expected error)."""
    checkpoint = write_bert(directory)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    return "bge", checkpoint, f"{weights} cannot be read"


def without_preprocessor(directory: Path) -> tuple[str, Path, str]:
    """Write a checkpoint without preprocessor_config.json. Return (family, directory, expected error)."""
    checkpoint = write_clip(directory)
    (checkpoint / "preprocessor_config.json").unlink()
    return "clip", checkpoint, f"{checkpoint / 'preprocessor_config.json'} is missing"


def test_broken_checkpoint_fails_to_load_and_the_file_is_named(tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(REPOSITORY / DEFAULT, models / DEFAULT, ignore=shutil.ignore_patterns("__pycache__"))
    broken = {make.__name__: make(tmp_path / make.__name__) for make in (truncated, without_preprocessor)}
    for name, (family, checkpoint, _) in broken.items():
        repository.write_model(REPOSITORY, family, models, name, {"checkpoint": str(checkpoint)})
    server = Triton(models, tmp_path / "log", "--exit-on-error=false", "--strict-readiness=false")
    try:
        client = tritonclient.http.InferenceServerClient(server.http)
        index = {entry["name"]: entry for entry in client.get_model_repository_index()}
        assert client.infer(DEFAULT, [_text()]).as_numpy("EMBEDDING").shape == (1, 384)
        client.close()
    finally:
        server.stop()
    for name, (_, _, error) in broken.items():
        assert index[name]["state"] == "UNAVAILABLE"
        assert error in index[name]["reason"]
