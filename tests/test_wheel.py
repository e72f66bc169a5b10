"""The built wheel serves from an environment outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT, free_port


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a new environment that uses the dependencies of this one; the checkout is not on its path.

    A .pth file adds this environment's packages without running their .pth files, among them the editable install.
    """
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"  # a copy, because setuptools leaves files of earlier builds in build/
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("gateway", "kernels", "model_repository", "python_backend"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    venv.create(root / "venv", with_pip=False)
    python = root / "venv" / "bin" / "python"
    (packages,) = (root / "venv").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [python, "-m", "pip", "install", "--no-compile", "--no-deps", "--no-index", wheel],
        check=True,
        capture_output=True,
    )
    return python.parent


@pytest.fixture
def port(environment: Path, tmp_path: Path) -> Iterator[int]:
    """Serve without any variable, standard input or output, in a directory of modules that must not be imported.

    As root, serve as a user without a home directory who cannot write to the environment.
    """
    for name in ("triton_embed", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current directory')")
    capabilities = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")  # pytest's folders are private
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *capabilities] if os.geteuid() == 0 else []
    port, *triton = (free_port() for _ in range(4))
    flags = [f"--triton-{name}-port={number}" for name, number in zip(("http", "grpc", "metrics"), triton, strict=True)]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        command = ["/bin/bash", "-c", 'exec "$@" <&- >&-', "bash", *user]
        command += [environment / "triton-embed", "serve", "--model=minilm", f"--port={port}", *flags]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=stream, env={})
    try:
        deadline = time.monotonic() + 90
        while "Try: curl" not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def test_installed_wheel_answers_with_a_vector(port: int) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/embeddings", json.dumps({"input": "hello"}).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        assert len(json.load(response)["data"][0]["embedding"]) == 384


def test_installed_files_come_from_the_wheel_alone(environment: Path) -> None:
    code = "import triton_embed.gateway.locations as x; print(x.FAMILIES, x.CHECKPOINTS)"
    output = subprocess.run([environment / "python", "-c", code], capture_output=True, text=True, check=True).stdout
    families, checkpoints = output.split()
    assert Path(families).is_relative_to(environment.parent)
    assert sorted(path.name for path in Path(families).iterdir()) == sorted(
        path.name for path in (ROOT / "model_repository").iterdir()
    )
    assert Path(checkpoints) == Path.home() / ".local" / "share" / "triton-embed" / "checkpoints"
