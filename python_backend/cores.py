"""The number of CPU cores that this process may use."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def core_count() -> int:
    """Return the number of cores that this process may use: those it may run on, or the CPU quota if that is less.

    More threads than the quota allows would use it up early in each period and then wait for the next.
    """
    return max(1, int(min(len(os.sched_getaffinity(0)), quota())))


def quota() -> float:
    """Return the cores that the CPU quotas of containers and services leave to this process, or infinity."""
    return min(_quotas(), default=float("inf"))


def _quotas() -> Iterator[float]:
    for directory in _cgroups():
        try:
            if (directory / "cpu.max").exists():  # cgroup v2: "max 100000" or "150000 100000"
                limit, period = (directory / "cpu.max").read_text().split()
            else:
                limit, period = ((directory / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if limit != "max" and int(limit) > 0:  # -1 in cgroup v1 means none
                yield int(limit) / int(period)
        except (OSError, ValueError):  # no limit can be set here
            continue


def _cgroups() -> Iterator[Path]:
    """Yield the cgroups of this process that may limit its CPUs, up to the root.

    A container sees its cgroup as the root, in cgroup v1 under the path that it has outside.
    """
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / controllers
        group = root / path.lstrip("/")
        yield from (directory for directory in (group, *group.parents) if directory.is_relative_to(root))
