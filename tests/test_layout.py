"""Rules of the source tree, checked on its syntax: permitted imports, and where names may be used.

A failure names file and line. Every source file needs a position in ORDER and a test file.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
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
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))] + FAMILIES
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
OTHERS = [
    *sorted((ROOT / "tests").rglob("*.py")),
    *BENCHMARKS,
    *sorted((ROOT / "examples").glob("*.py")),
]
BACKENDS = ("kernels/gpu/backend.py", "kernels/cpu/backend.py")
MAX_FILES = 12  # per folder
WIRE = "python_backend/wire.py"  # the one file of the engine that the gateway imports

# A file imports only files before it in its folder.
ORDER = {
    "kernels": (
        "packed",
        "cpu/linear_onednn cpu/linear_int8",
        "reference",
        "gpu/functions gpu/blocks gpu/launch",
        "gpu/attention gpu/norm gpu/rotary gpu/activation gpu/pooling gpu/patchify gpu/linear gpu/backend",
        "cpu/simd cpu/loops cpu/linear_bf16 cpu/norm cpu/rotary cpu/activation cpu/pooling cpu/attention cpu/backend",
        "backend ops",
    ),
    "python_backend": (
        "wire errors cores",
        "checkpoint/git_lfs checkpoint/json_file checkpoint/network_folder checkpoint/class_defaults",
        "checkpoint/sentence_config checkpoint/hf_config",
        "inputs/row inputs/images",
        "spec",
        "checkpoint/config checkpoint/files checkpoint/repository",
        "inputs/parameters inputs/excerpts inputs/tokenizer_files inputs/tokenizer inputs/processors inputs/chunking",
        "inputs/rows",
        "networks/layers networks/weights networks/batch",
        "execution/budget execution/prefix_cache execution/cuda_graphs execution/precision execution/cpu_threads",
        "networks/rotary networks/patches networks/encoder networks/decoder networks/clip networks/qwen2_vl_vision",
        "networks/qwen2_vl networks/head",
        "execution/embedder",
        "scheduling/sender scheduling/metrics scheduling/job scheduling/dedup_cache scheduling/scheduler",
        "serve cleanup launcher",
    ),
    # `verify` comes after everything that serves.
    "gateway": (
        "locations settings errors process/scratch",
        "http/logs http/tracing",
        "api/token_encodings api/vector_formats api/validation api/bodies api/inputs api/requests",
        "triton/model_info",
        "media/safe_fetch media/images",
        "http/metrics",
        "triton/window triton/request_queue triton/admission triton/client triton/dispatch triton/registry",
        "http/middleware http/web_page http/protocol",
        "handler",
        "api/responses api/embeddings api/rerank api/openapi",
        "app",
        "process/server process/triton_process process/supervisor",
        "verify/model_cards verify/samples verify/oracle verify/probe verify/report verify/command",
        "cli",
    ),
}
# Files without a test file of the same name, and where they are tested.
TESTED_ELSEWHERE = {
    "gateway/triton/request_queue.py": "test_admission.py",
    "python_backend/errors.py": "every test that expects an error",
    "python_backend/spec.py": "test_config.py",
    "python_backend/checkpoint/class_defaults.py": "test_checkpoint_keys.py",
    "python_backend/checkpoint/git_lfs.py": "test_checkpoint_keys.py",
    "python_backend/checkpoint/network_folder.py": "test_checkpoint_keys.py",
    "python_backend/checkpoint/sentence_config.py": "test_checkpoint_keys.py",
    "python_backend/inputs/row.py": "test_vectors.py",
    "python_backend/networks/layers.py": "test_vectors.py",
    "python_backend/networks/decoder.py": "test_vectors.py",
    "python_backend/networks/clip.py": "test_vectors.py",
    "python_backend/networks/qwen2_vl_vision.py": "test_vectors.py",
    "python_backend/networks/qwen2_vl.py": "test_vectors.py",
    "python_backend/networks/head.py": "test_encoder.py",
    "kernels/reference.py": "test_ops.py",
    "kernels/gpu/functions.py": "interpreted/test_activation.py",
    "kernels/gpu/backend.py": "interpreted/test_networks.py",
    "kernels/backend.py": "test_ops.py",
    "kernels/cpu/backend.py": "test_ops.py",
    "kernels/cpu/norm.py": "test_cpu_rows.py",
    "kernels/cpu/rotary.py": "test_cpu_rows.py",
    "kernels/cpu/activation.py": "test_cpu_rows.py",
    "kernels/cpu/pooling.py": "test_cpu_rows.py",
    "gateway/locations.py": "test_wheel.py",
    "gateway/process/triton_process.py": "test_supervisor.py",
    "gateway/http/protocol.py": "test_server.py",
    "gateway/handler.py": "test_app.py",
    "gateway/api/validation.py": "test_requests.py",
    "gateway/api/bodies.py": "test_requests.py",
    "gateway/api/embeddings.py": "test_requests.py",
    "gateway/api/responses.py": "test_schema.py",
    "gateway/api/rerank.py": "test_app.py",
    "gateway/api/openapi.py": "test_schema.py",
}
TESTS_OF_SEVERAL_FILES = {
    "test_benchmarks.py",
    "test_overload_benchmark.py",
    "test_checkpoint_keys.py",
    "test_conftest.py",
    "test_cpu_rows.py",
    "test_cuda_rules.py",
    "test_docs.py",
    "test_documents.py",
    "test_e2e.py",
    "test_examples.py",
    "test_families.py",
    "test_gpu_benchmark.py",
    "test_hostile.py",
    "test_launches.py",
    "test_layout.py",
    "test_mutations.py",
    "test_networks.py",
    "test_rules.py",
    "test_scheduling_benchmark.py",
    "test_schema.py",
    "test_spellings.py",
    "test_vectors.py",
    "test_wheel.py",
}


@dataclass(frozen=True)
class Import:
    """One imported module; a module of this repository is written as its path, folder/name.py."""

    file: str
    line: int
    module: str
    lazy: bool  # inside a function, or for type checkers only

    @property
    def top(self) -> str:
        """Return the top-level package."""
        return self.module.partition(".")[0]

    @property
    def ours(self) -> bool:
        """Return whether the module is a file of this repository."""
        return "/" in self.module


def name_of(path: Path) -> str:
    """Return a path relative to the checkout."""
    return str(path.relative_to(ROOT))


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Return every import of a file."""
    return tuple(_imports(ast.parse(path.read_text()), name_of(path), lazy=False))


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
            yield from _imports(child, file, lazy or function or _is_type_checking(child))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse


def _module(origin: str, name: str) -> str:
    """Return what `from origin import name` imports: a path for a file of this repository, else a dotted name."""
    prefix, _, rest = origin.partition(".")
    if prefix != PREFIX:
        return f"{origin}.{name}"
    parts = [*filter(None, rest.split(".")), name]
    file = "/".join(parts) + ".py"
    return file if (ROOT / file).exists() else "/".join(parts[:-1]) + ".py"


def all_imports(*folders: str) -> list[Import]:
    """Return the imports of every source file in these folders."""
    return [item for path in SOURCES if path.relative_to(ROOT).parts[0] in folders for item in imports(path)]


def listed(broken: Sequence[Import]) -> list[str]:
    """Return one line per import that breaks a rule."""
    return [f"{item.file}:{item.line} imports {item.module}" for item in broken]


def third_party(*folders: str) -> list[Import]:
    """Return imports from outside this repository and the standard library."""
    return [item for item in all_imports(*folders) if not item.ours and item.top not in sys.stdlib_module_names]


def test_source_files_are_found() -> None:
    assert len(SOURCES) > 30
    assert len(FAMILIES) == len(list((ROOT / "model_repository").iterdir()))
    assert all(any(item.ours for item in imports(path)) for path in FAMILIES)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_imports_only_earlier_files_by_prefix(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert listed([item for item in imports(path) if item.top in {*FOLDERS, PREFIX, ""} and not item.ours]) == []
    if folder in ORDER:
        order = [f"{folder}/{name}.py" for line in ORDER[folder] for name in line.split()]
        assert name_of(path) in order, f"add {name_of(path)} to ORDER"
        before = order[: order.index(name_of(path))]
        own = [item for item in imports(path) if item.module.startswith(f"{folder}/")]
        assert listed([item for item in own if item.module not in before]) == []


def test_folders_stay_below_the_file_limit() -> None:
    counts: dict[str, int] = {}
    for path in SOURCES + BENCHMARKS:
        counts[name_of(path.parent)] = counts.get(name_of(path.parent), 0) + 1
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


def test_only_ops_and_backends_connect_kernel_files() -> None:
    compiled = {"kernels/cpu/simd.py", "kernels/cpu/loops.py"}
    allowed = {"torch", "triton", "numpy"}
    others = [item for item in third_party("kernels") if item.top not in allowed]
    assert listed([item for item in others if item.file not in compiled or item.top not in {"numba", "llvmlite"}]) == []
    ours = [item for item in all_imports("kernels") if item.ours]
    assert listed([item for item in ours if not item.module.startswith("kernels/")]) == []
    shared = {"packed", "gpu/functions", "gpu/blocks", "gpu/launch", "cpu/simd", "cpu/loops", "cpu/linear_bf16"}
    entries = {"kernels/ops.py", "kernels/backend.py", "kernels/reference.py", *BACKENDS}
    crossing = [item for item in ours if item.module not in {f"kernels/{name}.py" for name in shared}]
    assert listed([item for item in crossing if item.file not in entries]) == []


def test_gpu_and_cpu_kernels_do_not_import_each_other() -> None:
    for folder, other in (("gpu", "cpu"), ("cpu", "gpu")):
        ours = [item for item in all_imports("kernels") if item.file.startswith(f"kernels/{folder}/")]
        assert listed([item for item in ours if item.module.startswith(f"kernels/{other}/")]) == []


def test_triton_is_imported_only_by_the_gpu_backend() -> None:
    """Check that `ops`, which every process imports, imports it lazily."""
    assert "triton" in eager_packages(ROOT / "kernels" / "gpu" / "backend.py")
    assert "triton" not in eager_packages(ROOT / "kernels" / "ops.py")


def test_numba_is_imported_only_by_the_cpu_backend() -> None:
    assert "numba" in eager_packages(ROOT / "kernels" / "cpu" / "backend.py")
    assert "numba" not in eager_packages(ROOT / "kernels" / "ops.py")


def test_kernels_is_not_a_top_level_package() -> None:
    """Keep it apart from Hugging Face's `kernels`: no __init__.py, and no test folder of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


@pytest.mark.parametrize("path", OTHERS, ids=name_of)
def test_tests_benchmarks_and_examples_import_by_prefix(path: Path) -> None:
    assert listed([item for item in imports(path) if item.top in FOLDERS and not item.ours]) == []


def test_engine_imports_only_the_entry_points_of_kernels() -> None:
    ours = [item for item in all_imports("python_backend") if item.ours]
    allowed = ("python_backend/", "kernels/ops.py", "kernels/packed.py")
    assert listed([item for item in ours if not item.module.startswith(allowed)]) == []


def test_only_serve_imports_tritons_python_backend() -> None:
    files = {item.file for item in all_imports(*FOLDERS, "model_repository") if item.top.startswith("triton_python")}
    assert files == {"python_backend/serve.py"}


def test_family_imports_only_the_engine() -> None:
    foreign = [item for item in all_imports("model_repository") if not item.module.startswith("python_backend/")]
    assert listed(foreign) == []


def test_gateway_imports_neither_torch_nor_the_engine() -> None:
    """Accept it in commands only: `verify` compares with transformers, and `verify` and `cli` read checkpoints."""
    heavy = {"torch", "transformers", "sentence_transformers", "tokenizers", "safetensors", "triton", "pytriton"}
    items = all_imports("gateway")
    oracle = [item for item in items if item.file == "gateway/verify/oracle.py" and item.lazy]
    assert listed([item for item in items if item.top in heavy and item not in oracle]) == []
    assert listed([item for item in items if item.module.startswith("kernels/")]) == []
    engine = [item for item in items if item.module.startswith("python_backend/") and item.module != WIRE]
    assert listed([item for item in engine if item.file not in {"gateway/cli.py", "gateway/verify/command.py"}]) == []


def test_wire_contract_imports_only_the_standard_library() -> None:
    """Check that the gateway can import it without torch, and the stub before it decides to load a checkpoint."""
    assert listed([item for item in imports(ROOT / WIRE) if item.top not in sys.stdlib_module_names]) == []


def test_only_the_client_imports_grpc() -> None:
    wire = [item for item in all_imports("gateway", "python_backend") if item.top in {"tritonclient", "grpc"}]
    client = "gateway/triton/client.py"
    assert any(item.file == client for item in wire)
    # config.pbtxt is a protocol buffer; the repository reads and writes it as one.
    allowed = {("python_backend/checkpoint/repository.py", "tritonclient.grpc.model_config_pb2")}
    assert listed([item for item in wire if item.file != client and (item.file, item.module) not in allowed]) == []


def test_serving_does_not_import_transformers() -> None:
    """Accept lazy imports only: for tokenizers that are not cached yet, for keys that files omit, and in `verify`."""
    items = [item for item in third_party(*FOLDERS) if item.top in {"transformers", "sentence_transformers"}]
    allowed = {
        "python_backend/checkpoint/class_defaults.py",
        "python_backend/inputs/tokenizer_files.py",
        "gateway/verify/oracle.py",
    }
    assert listed([item for item in items if item.file not in allowed or not item.lazy]) == []


def eager_packages(path: Path) -> set[str]:
    """Return every third-party package that importing a file imports, directly or through this repository."""
    items = [item for file in reachable(path, lazily=False) for item in imports(file) if not item.lazy]
    return {item.top for item in items if not item.ours} - sys.stdlib_module_names


def reachable(path: Path, lazily: bool = True) -> set[Path]:
    """Return the files of this repository that a file imports, directly or not, including the file."""
    seen, pending = set(), [path]
    while pending:
        seen.add(file := pending.pop())
        ours = {ROOT / item.module for item in imports(file) if item.ours and (lazily or not item.lazy)}
        pending += ours - seen
    return seen


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.parent.parent.name)
def test_family_without_a_checkpoint_imports_nothing_heavy(path: Path) -> None:
    assert eager_packages(path) <= {"numpy", "triton_python_backend_utils"}


def test_serving_does_not_import_verify() -> None:
    serving = {name_of(path) for path in reachable(ROOT / "gateway" / "process" / "supervisor.py")}
    assert "gateway/app.py" in serving
    assert not [file for file in serving if file.startswith("gateway/verify/")]


def test_commands_import_nothing_heavy_at_startup() -> None:
    assert eager_packages(ROOT / "python_backend" / "launcher.py") == set()
    heavy = {"torch", "numpy", "transformers", "fastapi", "huggingface_hub"}
    assert not eager_packages(ROOT / "gateway" / "cli.py") & heavy


def installed_with(declared: Sequence[str]) -> set[str]:
    """Return the distributions pip installs for these requirements: themselves and the ones they require directly."""
    names = set()
    for text in declared:
        requirement = Requirement(text)
        names.add(_canonical(requirement.name))
        if requirement.name == "triton-embed":  # another extra of this package
            continue
        for line in metadata.requires(requirement.name) or []:
            needed = Requirement(line)
            extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
            if needed.marker is None or any(needed.marker.evaluate(extra) for extra in extras):
                names.add(_canonical(needed.name))
    return names


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def missing(items: Sequence[Import], declared: Sequence[str]) -> list[str]:
    """Return imports of packages that these requirements do not install."""
    installed = installed_with(declared)
    owners = metadata.packages_distributions()
    # tritonserver puts the first on the path of its stubs; the second is installed by the extra for GPUs.
    elsewhere = {"triton_python_backend_utils", "triton"}
    optional = {"tiktoken", "opentelemetry", "sentence_transformers"}  # imported lazily, when configured
    return listed(
        [
            item
            for item in items
            if item.top not in elsewhere
            and not (item.top in optional and item.lazy)
            and not {_canonical(owner) for owner in owners.get(item.top, [])} & installed
        ]
    )


def test_every_import_is_installed_by_the_extra_that_needs_it() -> None:
    """Check extras, not this environment: it has packages of the test tools that users do not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, engine = project["dependencies"], project["optional-dependencies"]["engine"]
    gateway = third_party("gateway")
    verify = [item for item in gateway if item.file.startswith("gateway/verify/")]
    assert missing([item for item in gateway if item not in verify], base) == []
    assert missing([*third_party("kernels", "python_backend", "model_repository"), *verify], [*base, *engine]) == []


def nodes(path: Path) -> Iterator[ast.AST]:
    """Yield every node of a file's syntax tree."""
    yield from ast.walk(ast.parse(path.read_text()))


def uses(path: Path, *names: str) -> list[str]:
    """Return where one of these dotted names is used."""
    lines = []
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            name = next((f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in names), "")
        else:
            name = node.id if isinstance(node, ast.Name) else ""
        if name in names:
            lines.append(f"{name_of(path)}:{node.lineno} {name}")  # type: ignore[attr-defined]
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sources_do_not_print_or_change_sys_path(path: Path) -> None:
    assert uses(path, "print", "sys.path", "breakpoint") == []


# One file per side reads defaults; the launcher and the supervisor of Triton pass the environment to child processes.
ENVIRONMENT = {
    "python_backend/checkpoint/config.py",
    "python_backend/launcher.py",
    "gateway/settings.py",
    "gateway/process/triton_process.py",
}


def test_only_listed_files_read_the_environment() -> None:
    names = ("os.environ", "os.getenv", "os.environb", "os.putenv")
    elsewhere = [path for path in SOURCES if name_of(path) not in ENVIRONMENT]
    assert [line for path in elsewhere for line in uses(path, *names)] == []


def test_file_names_are_specific() -> None:
    assert [str(path) for path in SOURCES if path.stem in {"utils", "util", "base", "helpers", "common", "misc"}] == []


def test_every_source_file_has_a_test_file_and_vice_versa() -> None:
    """Look for the tests of wing/name.py in test_name.py or test_wing_name.py."""
    files = {name_of(path) for path in SOURCES if path not in FAMILIES}
    assert TESTED_ELSEWHERE.keys() <= files
    names = {file: {f"test_{Path(file).name}", f"test_{Path(file).parent.name}_{Path(file).name}"} for file in files}
    folders = [ROOT / "tests" / folder for folder in ("", "interpreted", "compiled")]  # clients/ tests other programs
    tests = {path.name for folder in folders for path in folder.glob("test_*.py")}
    assert {file for file in files - TESTED_ELSEWHERE.keys() if not names[file] & tests} == set()
    assert tests - TESTS_OF_SEVERAL_FILES - {name for each in names.values() for name in each} == set()
