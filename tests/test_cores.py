"""The number of cores: affinity and CPU quotas of both versions of cgroups, as Linux and containers show them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triton_embed.python_backend import cores

V1 = "7:cpu,cpuacct:/docker/abc\n6:memory:/docker/abc\n0::/init.scope\n"


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / f"cpu.{name}").write_text(text)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("membership", "groups", "count"),
    [
        ("0::/\n", {"": "max 100000\n"}, 8),
        ("0::/\n", {"": "250000 100000\n"}, 2),
        ("0::/\n", {"": "50000 100000\n"}, 1),
        ("0::/\n", {"": "1200000 100000\n"}, 8),
        ("0::/system.slice/x.service\n", {"system.slice/x.service": "max 100000", "system.slice": "300000 100000"}, 3),
        ("0::/a/b\n", {"a/b": "200000 100000", "a": "400000 100000", "": "100000 100000 garbage"}, 2),
        ("0::/../outside\n", {"": "300000 100000\n"}, 3),  # of a process that moved into a container
        ("", {}, 8),
    ],
)
def test_quota_of_cgroup_v2_lowers_the_count(root: Path, membership: str, groups: dict[str, str], count: int) -> None:
    (root.parent / "membership").write_text(membership)
    for name, limit in groups.items():
        write(root / name, max=limit)
    assert cores.core_count() == count


@pytest.mark.parametrize("place", ["cpu,cpuacct", "cpu,cpuacct/docker", "cpu,cpuacct/docker/abc"])
def test_quota_of_cgroup_v1_lowers_the_count(root: Path, place: str) -> None:
    (root.parent / "membership").write_text(V1)
    write(root / "cpu,cpuacct", cfs_quota_us="-1\n", cfs_period_us="100000\n")
    assert cores.core_count() == 8
    write(root / place, cfs_quota_us="450000\n", cfs_period_us="150000\n")
    assert cores.core_count() == 3


def test_machine_without_cgroups_has_no_quota(root: Path) -> None:
    assert not root.exists()
    assert cores.core_count() == 8


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/cpu/cgroup.procs", os.W_OK), reason="no cgroup can be created here")
def test_quota_of_a_real_cgroup_is_found() -> None:
    group = Path(f"/sys/fs/cgroup/cpu/triton-embed-test-{os.getpid()}")
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("50000")
        code = f"open('{group}/cgroup.procs', 'w').write('0'); from triton_embed.python_backend import cores; "
        code += "print(cores.quota(), cores.core_count())"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert output == "0.5 1\n"
    finally:
        group.rmdir()
