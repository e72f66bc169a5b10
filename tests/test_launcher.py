"""The `tritonserver` command: safe defaults, and errors instead of hangs."""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pytest

from triton_embed.python_backend import launcher

SAFE = [
    "--http-address=127.0.0.1",
    "--grpc-address=127.0.0.1",
    "--metrics-address=127.0.0.1",
    "--disable-auto-complete-config",
]


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        ([], SAFE),
        (["--model-repository", "m"], SAFE),
        (["--http-address=0.0.0.0"], SAFE[1:]),
        (["--http-address", "0.0.0.0"], SAFE[1:]),
        (["--disable-auto-complete-config"], SAFE[:3]),
        (["--metrics-address=::1", "--grpc-address", "10.0.0.1"], [SAFE[0], SAFE[3]]),
        (["--http-address-extra=1", "--http-port=1"], SAFE),
    ],
    ids=" ".join,
)
def test_safe_defaults_are_added_unless_the_caller_sets_them(arguments: list[str], added: list[str]) -> None:
    assert launcher.with_defaults(arguments) == arguments + added


class Replaced(Exception):  # noqa: N818 - not an error: execve replaces this process
    pass


@pytest.fixture
def execve(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record what `main` does: ["cleaned", binary, arguments, environment]."""
    recorded: list[Any] = []

    def replace(*arguments: Any) -> None:
        recorded.extend(arguments)
        raise Replaced

    monkeypatch.setattr(launcher.os, "execve", replace)
    monkeypatch.setattr(launcher, "clean_up", lambda stub: recorded.append(f"cleaned {stub.name}"))
    monkeypatch.setattr(launcher, "OFFICIAL", Path("/nonexistent/tritonserver"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return recorded


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tritonserver", *arguments])
    with pytest.raises(Replaced):
        launcher.main()


def test_main_executes_the_wheels_server_with_the_stub_of_this_python(
    execve: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/their/libraries")
    run_main(monkeypatch, "--model-repository=m")
    cleaned, binary, arguments, environment = execve
    assert cleaned == "cleaned triton_python_backend_stub"
    assert os.access(binary, os.X_OK)
    assert arguments[:2] == ["tritonserver", "--model-repository=m"]
    assert set(SAFE) < set(arguments)
    (backends,) = [Path(word.partition("=")[2]) for word in arguments if word.startswith("--backend-directory=")]
    assert (backends / "python" / "libtriton_python.so").is_file()
    stub = (backends / "python" / launcher.STUB).resolve()
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in stub.parts
    assert os.access(stub, os.X_OK)
    assert environment["PATH"].split(":")[0] == str(Path(sys.prefix) / "bin")
    assert environment["LD_LIBRARY_PATH"].split(":") == [sysconfig.get_config_var("LIBDIR"), "/their/libraries"]
    assert "pytriton" not in sys.modules


def test_environment_outside_ascii_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launcher.sys, "prefix", "/home/José/.venv")
    with pytest.raises(SystemExit, match=r"cannot import from /home/José/\.venv: install into a path of ASCII"):
        launcher.main()


def test_openmp_spin_count_is_limited(execve: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    run_main(monkeypatch)
    assert 0 < int(execve[3]["GOMP_SPINCOUNT"]) < 1_000_000


def test_backend_directory_of_the_caller_is_kept(execve: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run_main(monkeypatch, "--backend-directory", "/theirs")
    assert [word for word in execve[2] if word.startswith("--backend-directory")] == ["--backend-directory"]


def test_official_server_keeps_its_environment(
    execve: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    official = tmp_path / "tritonserver"
    official.touch()
    monkeypatch.setattr(launcher, "OFFICIAL", official)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # the caller's value is kept
    run_main(monkeypatch)
    assert execve[1:] == [official, ["tritonserver", *SAFE], dict(os.environ)]


def test_interpreted_kernels_are_refused(execve: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1"):
        launcher.main()
    assert execve == []


def test_missing_server_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="nvidia-pytriton package is installed"):
        launcher.wheel_directory()


WITHOUT_LIBPYTHON = """
import ctypes, os, sys, sysconfig
get_config_var = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: "/nowhere" if name == "LIBDIR" else get_config_var(name)
def missing(*_):
    raise OSError("cannot open shared object file")
ctypes.CDLL = missing
os.execve = lambda *_: sys.exit("started anyway")
from triton_embed.python_backend import launcher
launcher.OFFICIAL = launcher.Path("/nonexistent")
launcher.clean_up = lambda stub: sys.exit("cleaned up first")
launcher.main()
"""


def test_missing_libpython_is_an_error_not_a_hang() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBPYTHON], capture_output=True, text=True, timeout=60, check=False
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert result.returncode == 1
    assert result.stderr.startswith(f"tritonserver: libpython{version}.so.1.0 is missing from /nowhere")
    assert f"apt-get install libpython{version}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the files of nvidia-pytriton that the launcher uses, for four Pythons; `sys.prefix` is a sibling folder."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    names = ["backends/python/libtriton_python.so", "backends/python/triton_python_backend_utils.py"]
    names += [f"python_backend_stubs/3.{minor}/{launcher.STUB}" for minor in (10, 11, 12, 13)]
    for name in names:
        (tmp_path / "wheel" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "wheel" / name).write_text(name)
    return tmp_path / "wheel"


def links(directory: Path) -> dict[str, tuple[str, int]]:
    """Return the content behind each link and the inode of the link itself."""
    return {path.name: (path.read_text(), path.lstat().st_ino) for path in (directory / "python").iterdir()}


def test_backend_directory_links_the_stub_of_this_python(wheel: Path) -> None:
    directory = launcher.backend_directory(wheel)
    assert directory.is_relative_to(wheel.parent / "prefix")
    assert {name: text for name, (text, _) in links(directory).items()} == {
        "libtriton_python.so": "backends/python/libtriton_python.so",
        "triton_python_backend_utils.py": "backends/python/triton_python_backend_utils.py",
        launcher.STUB: f"python_backend_stubs/3.{sys.version_info.minor}/{launcher.STUB}",
    }
    assert all(path.is_symlink() for path in (directory / "python").iterdir())


def test_correct_links_are_kept_and_wrong_links_replaced(wheel: Path) -> None:
    before = links(directory := launcher.backend_directory(wheel))
    assert links(launcher.backend_directory(wheel)) == before
    utils, stub = directory / "python" / "triton_python_backend_utils.py", directory / "python" / launcher.STUB
    utils.unlink()
    utils.symlink_to("/of/an/older/wheel")
    stub.unlink()
    stub.write_text("a copy")
    after = links(launcher.backend_directory(wheel))
    assert {name: text for name, (text, _) in after.items()} == {name: text for name, (text, _) in before.items()}
    assert stub.is_symlink()
    assert after["libtriton_python.so"] == before["libtriton_python.so"]


def test_directory_of_the_user_is_used_if_the_environment_is_not_writable(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also if its path has a space: the Python backend starts stubs with an unquoted command."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for prefix in (tmp_path / "read-only", tmp_path / "my environment"):
        prefix.mkdir()
        monkeypatch.setattr(sys, "prefix", str(prefix))
        (tmp_path / "read-only" / "share").write_text("nobody, not even root, creates a directory here")
        directory = launcher.backend_directory(wheel)
        assert directory.parent == tmp_path / "home" / ".cache" / "triton-embed"
        assert directory.parent.stat().st_mode & 0o077 == 0
        assert set(links(directory)) == {"libtriton_python.so", "triton_python_backend_utils.py", launcher.STUB}


def test_directory_that_others_may_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shared library would run as this user."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "home").write_text("no directory")
    assert launcher.user_directory() == tmp_path / f"triton-embed-{os.getuid()}"
    launcher.user_directory().chmod(0o777)
    with pytest.raises(SystemExit, match=r"none is writable for this user alone.*: set HOME or TMPDIR"):
        launcher.user_directory()


def test_bash_is_found_without_path_or_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton would wait for ever for a stub that bash did not start."""
    monkeypatch.delenv("PATH")
    assert launcher.search_path() == os.defpath
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launcher.search_path() == f"{tmp_path}:{os.defpath}"
    monkeypatch.setattr(os, "defpath", str(tmp_path))
    with pytest.raises(SystemExit, match=r"bash.* is not in PATH=.*: install it"):
        launcher.search_path()


def test_tmp_that_is_not_writable_is_reported(execve: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's Python backend would abort."""
    monkeypatch.setattr(os, "access", lambda path, _: str(path) != "/tmp")  # noqa: S108
    with pytest.raises(SystemExit, match="needs to write to /tmp: make it writable"):
        launcher.main()
    assert execve == []


def test_stub_that_does_not_run_is_reported_before_triton_changes_its_mode(tmp_path: Path) -> None:
    stub = tmp_path / launcher.STUB
    for mode, code, reason in (
        (0o755, 127, "libcudart.so: No such file"),
        (0o644, 1, r"Permission denied \(.*/triton_python_backend_stub\)"),
    ):
        stub.write_text(f"#!/bin/sh\necho 'libcudart.so: No such file' >&2; exit {code}\n")
        stub.chmod(mode)
        with pytest.raises(SystemExit, match=f"cannot start its stub: {reason}"):
            launcher.check_stub(stub, os.environ)
    stub.chmod(0o755)
    launcher.check_stub(stub, os.environ)
