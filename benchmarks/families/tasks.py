"""Checkpoints on disk, and the task that an engine is given for one."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToJson

from benchmarks import report
from benchmarks.families.tables import Engine
from benchmarks.families.work import Rows
from benchmarks.shapes import CHECKPOINTS

GME_TEXT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
)


@contextmanager
def checkpoint(name: str, keep: Path | None) -> Iterator[Path]:
    """Yield the checkpoint directory of a shape: under `keep`, reused if present, or temporary."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        directory = folder / name
        if not (directory / "tokenizer.json").is_file():  # written last
            folder.mkdir(parents=True, exist_ok=True)
            needed, free = CHECKPOINTS[name].parameters_m * 4e6 * 1.1, shutil.disk_usage(folder).free
            if free < needed:
                sys.exit(
                    f"not enough disk space in {folder}: {name} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"
                )
            start = time.monotonic()
            command = [sys.executable, "-m", "benchmarks.shapes", name, str(directory)]
            subprocess.run(command, cwd=report.ROOT, check=True, stderr=subprocess.DEVNULL)
            print(f"  checkpoint written in {time.monotonic() - start:.0f} s", flush=True)
        yield directory


def parameters(directory: Path) -> int:
    """Count the parameters of the checkpoint."""
    with (directory / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(int(np.prod(tensor["shape"])) for key, tensor in header.items() if key != "__metadata__")


def task(name: str, engine: Engine, directory: Path, work: dict[str, Rows]) -> dict[str, Any]:
    """Return the task of `benchmarks.families.engines`.

    `arguments` are those that tritonserver passes to a Python model.
    """
    from triton_embed.python_backend.checkpoint.repository import read_config

    family, repository = CHECKPOINTS[name].family, report.ROOT / "model_repository"
    config = read_config(repository, family)
    config.name = family
    config.parameters["checkpoint"].string_value = str(directory)
    config.parameters["dtype"].string_value = engine.dtype
    return {
        "family": family,
        "directory": str(directory),
        "dtype": engine.dtype,
        "text": GME_TEXT,
        "arguments": {
            "model_config": MessageToJson(config, preserving_proto_field_name=True),
            "model_repository": str(repository / family),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        },
        "work": work,
    }
