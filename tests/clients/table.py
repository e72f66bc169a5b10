"""Pytest plugin for the conformance table: `--table FILE` writes one line per client and feature, with the result.

A test file sets CLIENT and the PACKAGE whose version is reported; the docstring of a test is
its text in the table. A parametrized test is one line, which passes if all its parameters pass.
"""

import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

HEADING = """# Clients

Each client is used unmodified, as its documentation shows, against `triton-embed serve`. Vectors are compared with
sentence-transformers for all-MiniLM-L6-v2 and with transformers for the other models; they must have unit length and a
cosine of at least 0.99999. `make conformance` writes this file.

| Client | Version | Test | Result |
|---|---|---|---|
"""


class Table:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, tuple[str, str, str]] = {}  # test → (client, version, feature)
        self._passed: dict[tuple[str, str, str], bool] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            module: Any = item.module  # type: ignore[attr-defined]
            feature = " ".join(item.obj.__doc__.split())  # type: ignore[attr-defined]
            self._lines[item.nodeid] = (module.CLIENT, version_of(module.PACKAGE), feature.rstrip("."))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        line = self._lines[report.nodeid]
        self._passed[line] = self._passed.get(line, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        lines, previous = [], None
        by_client = sorted(self._passed.items(), key=lambda item: item[0][0].lower())
        for (client, version, feature), passed in by_client:
            head = (client, version) if (client, version) != previous else ("", "")
            previous = (client, version)
            lines.append(f"| {' | '.join((*head, feature, 'pass' if passed else 'FAIL'))} |\n")
        self._path.parent.mkdir(exist_ok=True)
        self._path.write_text(HEADING + "".join(lines))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, metavar="FILE", help="write the conformance table to FILE")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--table")
    if path is not None:
        config.pluginmanager.register(Table(path))


def version_of(package: str) -> str:
    """Return the version of an installed distribution, or of the curl program."""
    if package != "curl":
        return metadata.version(package)
    return re.findall(r"curl (\S+)", subprocess.check_output(["curl", "--version"], text=True))[0]
