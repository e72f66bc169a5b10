"""The conformance table: `--table FILE` writes what each client was used for, and how it ended.

A test file names its CLIENT and the PACKAGE whose version is told; a test's docstring is its line. A test with
parameters is one line, which passed when all of them did.
"""

import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

HEADING = """# Clients

Each client is used as its own documentation shows, unmodified, against `triton-embed serve`. Vectors are compared with
those that sentence-transformers computes for all-MiniLM-L6-v2, and transformers for the other models: a cosine of at
least 0.99999 and unit length. Written by `make conformance`.

| Client | Version | What was exercised | Result |
|---|---|---|---|
"""


class Table:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._titles: dict[str, tuple[str, str, str]] = {}  # test → (client, version, what)
        self._passed: dict[tuple[str, str, str], bool] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            module: Any = item.module  # type: ignore[attr-defined]
            what = " ".join(item.obj.__doc__.split())  # type: ignore[attr-defined]
            self._titles[item.nodeid] = (module.CLIENT, version_of(module.PACKAGE), what.rstrip("."))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        line = self._titles[report.nodeid]
        self._passed[line] = self._passed.get(line, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        lines, told = [], None
        for (client, version, what), passed in self._passed.items():
            head = (client, version) if (client, version) != told else ("", "")
            told = (client, version)
            lines.append(f"| {' | '.join((*head, what, 'pass' if passed else 'FAIL'))} |\n")
        self._path.parent.mkdir(exist_ok=True)
        self._path.write_text(HEADING + "".join(lines))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, metavar="FILE", help="write the conformance table there")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--table")
    if path is not None:
        config.pluginmanager.register(Table(path))


def version_of(package: str) -> str:
    """Of an installed distribution; curl is a program."""
    if package != "curl":
        return metadata.version(package)
    return re.findall(r"curl (\S+)", subprocess.check_output(["curl", "--version"], text=True))[0]
