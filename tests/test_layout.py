"""The house rules of the source tree, read from its syntax: who may import whom, and what may be said where.

A rule that is broken names file and line. Every file has its place in one of the orders below and its own tests.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from conftest import ROOT

PREFIX = "triton_embed"
FOLDERS = ("kernels", "python_backend", "gateway")
FAMILIES = sorted((ROOT / "model_repository").glob("*/1/model.py"))
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))] + FAMILIES
OTHERS = [*sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]

# A file imports only those before it in its folder.
ORDER = {
    "kernels": "packed functions blocks launch reference onednn int8 simd loops rows panels dense_attention looped"
    " attention norm rotary activation pooling patchify linear accelerated ops",
    "python_backend": "errors json_file shapes row images spec config request checkpoint tokenizer reader long_text"
    " inputs budget layers weights batch prefix rotary patches encoder decoder clip vision qwen2_vl graphs head"
    " precision threads embedder delivery engine_metrics job reuse scheduler serve launcher",
    # What `verify` is made of comes after all that serves.
    "gateway": "locations settings errors logs tracing items foreign forms schemas model repository fetch media metrics lanes"
    " front pages client dispatch registry service similarity openapi app protocol worker triton_process supervisor"
    " cards samples oracle examine report verify cli",
}
# What no file of its own tests, and where it is tested instead.
TESTED_ELSEWHERE = {
    "python_backend/errors.py": "every test that expects a refusal",
    "python_backend/spec.py": "test_config.py",
    "python_backend/row.py": "test_vectors.py",
    "python_backend/layers.py": "test_vectors.py",
    "python_backend/decoder.py": "test_vectors.py",
    "python_backend/clip.py": "test_vectors.py",
    "python_backend/vision.py": "test_vectors.py",
    "python_backend/qwen2_vl.py": "test_vectors.py",
    "python_backend/head.py": "test_encoder.py",
    "gateway/locations.py": "test_cli.py",
    "kernels/reference.py": "test_ops.py",
    "kernels/functions.py": "interpreted/test_activation.py",
    "kernels/accelerated.py": "interpreted/test_networks.py",
    "kernels/looped.py": "test_ops.py",
    "gateway/triton_process.py": "test_supervisor.py",
    "gateway/protocol.py": "test_worker.py",
    "gateway/service.py": "test_app.py",
    "gateway/similarity.py": "test_app.py",
    "gateway/openapi.py": "test_schema.py",
}
TESTS_OF_MORE_THAN_A_FILE = {
    "test_benchmarks.py",
    "test_conftest.py",
    "test_documents.py",
    "test_e2e.py",
    "test_families.py",
    "test_gpu_benchmark.py",
    "test_hostile.py",
    "test_layout.py",
    "test_mutations.py",
    "test_networks.py",
    "test_rules.py",
    "test_scheduling_benchmark.py",
    "test_schema.py",
    "test_vectors.py",
}


@dataclass(frozen=True)
class Import:
    """One imported module; a module of ours is written folder/name.py."""

    file: str
    line: int
    module: str
    lazy: bool  # inside a function, or for the type checker's eyes only

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def ours(self) -> bool:
        return "/" in self.module


@cache
def imports(path: Path) -> tuple[Import, ...]:
    return tuple(_imports(ast.parse(path.read_text()), str(path.relative_to(ROOT)), lazy=False))


def _imports(node: ast.AST, file: str, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, lazy)
        elif isinstance(child, ast.ImportFrom):
            origin = "." * child.level + (child.module or "")
            for alias in child.names:
                yield Import(file, child.lineno, _module(origin, alias.name), lazy)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, file, lazy or function or _is_for_the_type_checker(child))


def _is_for_the_type_checker(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse


def _module(origin: str, name: str) -> str:
    """What `from origin import name` imports."""
    prefix, _, rest = origin.partition(".")
    if prefix != PREFIX:
        return f"{origin}.{name}"
    parts = [*filter(None, rest.split(".")), name]
    return f"{parts[0]}/{parts[1] if len(parts) > 1 else ''}.py"


def all_imports(*folders: str) -> list[Import]:
    return [found for path in SOURCES if path.relative_to(ROOT).parts[0] in folders for found in imports(path)]


def told(broken: list[Import]) -> list[str]:
    return [f"{found.file}:{found.line} imports {found.module}" for found in broken]


def third_party(*folders: str) -> list[Import]:
    return [found for found in all_imports(*folders) if not found.ours and found.top not in sys.stdlib_module_names]


def test_there_is_something_to_read() -> None:
    assert len(SOURCES) > 30
    assert len(FAMILIES) == 7
    assert all(any(found.ours for found in imports(path)) for path in FAMILIES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_ours_by_our_prefix_and_only_what_comes_before_it(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    wrong = [found for found in imports(path) if found.top in {*FOLDERS, PREFIX, ""} and not found.ours]
    assert told(wrong) == []
    if folder in ORDER:
        order = [f"{folder}/{name}.py" for name in ORDER[folder].split()]
        me = f"{folder}/{path.name}"
        assert me in order, f"give {me} a place in ORDER"
        own = [found for found in imports(path) if found.module.startswith(f"{folder}/")]
        assert told([found for found in own if found.module not in order[: order.index(me)]]) == []


def test_kernels_import_torch_and_each_other_through_ops_alone() -> None:
    loops = {"kernels/simd.py": {"numba", "llvmlite"}, "kernels/loops.py": {"numba", "llvmlite"}}
    allowed = {"torch", "triton", "numpy"}
    others = [found for found in third_party("kernels") if found.top not in allowed]
    assert told([found for found in others if found.top not in loops.get(found.file, set())]) == []
    ours = [found for found in all_imports("kernels") if found.ours]
    assert told([found for found in ours if not found.module.startswith("kernels/")]) == []
    shared = {f"kernels/{name}.py" for name in ("packed", "functions", "blocks", "launch", "simd", "loops", "panels")}
    doors = {"kernels/ops.py", "kernels/accelerated.py", "kernels/looped.py"}
    assert told([found for found in ours if found.file not in doors and found.module not in shared]) == []


def test_triton_is_imported_once_a_gpu_asks_for_it() -> None:
    """`ops`, which every process imports, leads to it lazily alone."""
    assert "triton" in at_once(ROOT / "kernels" / "accelerated.py")
    assert "triton" not in at_once(ROOT / "kernels" / "ops.py")


def test_numba_is_imported_once_a_cpu_asks_for_it() -> None:
    assert "numba" in at_once(ROOT / "kernels" / "looped.py")
    assert "numba" not in at_once(ROOT / "kernels" / "ops.py")


def test_kernels_is_no_package_of_its_own() -> None:
    """One with an __init__.py, or tests under that name, would be taken for Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_and_benchmarks_import_ours_by_our_prefix(path: Path) -> None:
    assert told([found for found in imports(path) if found.top in FOLDERS and not found.ours]) == []


def test_the_engine_sees_the_door_of_the_kernels_and_nothing_of_the_gateway() -> None:
    ours = [found for found in all_imports("python_backend") if found.ours]
    allowed = ("python_backend/", "kernels/ops.py", "kernels/packed.py")
    assert told([found for found in ours if not found.module.startswith(allowed)]) == []


def test_one_file_talks_to_tritons_python_backend() -> None:
    found = {found.file for found in all_imports(*FOLDERS, "model_repository") if found.top.startswith("triton_python")}
    assert found == {"python_backend/serve.py"}


def test_a_family_imports_the_engine_alone() -> None:
    foreign = [found for found in all_imports("model_repository") if not found.module.startswith("python_backend/")]
    assert told(foreign) == []


def test_the_gateway_knows_neither_torch_nor_the_engine() -> None:
    """But for commands: `verify` asks transformers for its opinion, and both read checkpoints as the engine does."""
    heavy = {"torch", "transformers", "sentence_transformers", "tokenizers", "safetensors", "triton", "pytriton"}
    found = all_imports("gateway")
    asked = [one for one in found if one.file == "gateway/oracle.py" and one.lazy]
    assert told([one for one in found if one.top in heavy and one not in asked]) == []
    assert told([one for one in found if one.module.startswith("kernels/")]) == []
    engine = [one for one in found if one.module.startswith("python_backend/")]
    assert told([one for one in engine if one.file not in {"gateway/cli.py", "gateway/verify.py"}]) == []


def test_one_file_talks_to_triton_over_the_wire() -> None:
    wire = [found for found in all_imports("gateway") if found.top in {"tritonclient", "grpc"}]
    assert any(found.file == "gateway/client.py" for found in wire)
    allowed = {("gateway/repository.py", "tritonclient.grpc.model_config_pb2")}  # the form of config.pbtxt
    assert (
        told([one for one in wire if one.file != "gateway/client.py" and (one.file, one.module) not in allowed]) == []
    )


def test_the_serving_path_does_without_transformers() -> None:
    """Only for what ships without a tokenizer.json may it be imported, lazily, and by `verify`, which asks it."""
    found = [found for found in third_party(*FOLDERS) if found.top in {"transformers", "sentence_transformers"}]
    allowed = {"python_backend/checkpoint.py", "python_backend/tokenizer.py", "gateway/oracle.py"}
    assert told([one for one in found if one.file not in allowed or not one.lazy]) == []


def at_once(path: Path) -> set[str]:
    """Everything foreign that importing a file imports, through files of ours."""
    found = [found for here in reached(path, lazily=False) for found in imports(here) if not found.lazy]
    return {one.top for one in found if not one.ours} - sys.stdlib_module_names


def reached(path: Path, lazily: bool = True) -> set[Path]:
    """The files of ours that a file leads to, itself included."""
    seen, waiting = set(), [path]
    while waiting:
        seen.add(here := waiting.pop())
        ours = {ROOT / found.module for found in imports(here) if found.ours and (lazily or not found.lazy)}
        waiting += ours - seen
    return seen


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.parent.parent.name)
def test_a_family_without_a_checkpoint_costs_no_heavy_import(path: Path) -> None:
    assert at_once(path) <= {"numpy", "triton_python_backend_utils"}


def test_serving_never_reaches_what_verify_is_made_of() -> None:
    serving = {path.name for path in reached(ROOT / "gateway" / "supervisor.py")}
    assert "app.py" in serving
    assert not serving & {"cards.py", "samples.py", "oracle.py", "examine.py", "report.py", "verify.py"}


def test_commands_start_light() -> None:
    assert at_once(ROOT / "python_backend" / "launcher.py") == set()
    assert not at_once(ROOT / "gateway" / "cli.py") & {"torch", "numpy", "transformers", "fastapi", "huggingface_hub"}


def installed_with(declared: list[str]) -> set[str]:
    """Distributions that pip installs for these requirements: themselves and what they name in turn."""
    found = set()
    for text in declared:
        wanted = Requirement(text)
        found.add(_canonical(wanted.name))
        for line in metadata.requires(wanted.name) or []:
            needed = Requirement(line)
            extras = [{"extra": extra} for extra in wanted.extras] or [{"extra": ""}]
            if needed.marker is None or any(needed.marker.evaluate(extra) for extra in extras):
                found.add(_canonical(needed.name))
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_imported_is_installed_by_a_plain_install() -> None:
    """Test tools bring more: a module of theirs would be missing on a user's machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    there = installed_with(project["dependencies"])
    owners = metadata.packages_distributions()
    # pytriton carries the one, in the directory that the server puts on the path; a GPU needs the other, an extra.
    elsewhere = {"triton_python_backend_utils", "triton"}
    extras = {"tiktoken", "opentelemetry"}  # imported where an operator asked for them
    missing = [
        found
        for found in third_party(*FOLDERS, "model_repository")
        if found.top not in elsewhere
        and not (found.top in extras and found.lazy)
        and not {_canonical(owner) for owner in owners.get(found.top, [])} & there
    ]
    assert told(missing) == []


def nodes(path: Path) -> Iterator[ast.AST]:
    yield from ast.walk(ast.parse(path.read_text()))


def places(path: Path, *names: str) -> list[str]:
    """Where one of these dotted names is used."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            name = next((f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in names), "")
        else:
            name = node.id if isinstance(node, ast.Name) else ""
        if name in names:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_printed_and_the_path_is_left_alone(path: Path) -> None:
    assert places(path, "print", "sys.path", "breakpoint") == []


# Defaults have one place an end; the other two pass the environment on to the process they start.
ENVIRONMENT = {
    "python_backend/config.py",
    "python_backend/launcher.py",
    "gateway/settings.py",
    "gateway/triton_process.py",
}


def test_the_environment_is_read_in_four_places() -> None:
    names = ("os.environ", "os.getenv", "os.environb", "os.putenv")
    elsewhere = [path for path in SOURCES if str(path.relative_to(ROOT)) not in ENVIRONMENT]
    assert [place for path in elsewhere for place in places(path, *names)] == []


def test_no_file_is_named_after_nothing() -> None:
    assert [str(path) for path in SOURCES if path.stem in {"utils", "util", "base", "helpers", "common", "misc"}] == []


def test_every_file_has_its_tests() -> None:
    files = {f"{path.parent.name}/{path.name}" for path in SOURCES if path not in FAMILIES}
    assert TESTED_ELSEWHERE.keys() <= files
    folders = (ROOT / "tests", ROOT / "tests" / "interpreted")  # those of clients are about other people's code
    tests = {path.name for folder in folders for path in folder.glob("test_*.py")}
    untested = {file for file in files - TESTED_ELSEWHERE.keys() if f"test_{Path(file).name}" not in tests}
    assert untested == set()
    assert tests - TESTS_OF_MORE_THAN_A_FILE - {f"test_{Path(file).name}" for file in files} == set()
