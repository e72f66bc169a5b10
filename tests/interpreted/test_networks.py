"""Every family on Triton kernels: vectors as in transformers, and a bounded number of launches per layer."""

import io
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from checkpoints import write_clip, write_decoder, write_qwen2_vl, write_xlm_roberta
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoConfig
from triton.runtime.interpreter import GridExecutor

from triton_embed.kernels.backend import choose
from triton_embed.kernels.gpu import backend as accelerated
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.checkpoint.config import ServingConfig
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.execution import embedder as embedder_file
from triton_embed.python_backend.execution.embedder import Embedder
from triton_embed.python_backend.execution.prefix_cache import PrefixCache
from triton_embed.python_backend.inputs.images import ClipImageProcessor, Qwen2VLImageProcessor
from triton_embed.python_backend.inputs.row import Row

REPOSITORY = Path(__file__).parents[2] / "model_repository"
LENGTHS = (5, 1, 19, 2)
# Head sizes are multiples of 16, as the kernels require; all other sizes are as irregular as possible.
CHECKPOINTS = {
    "bge": lambda d: write_xlm_roberta(d, hidden_size=96, num_hidden_layers=2),
    "bge-mean": lambda d: write_xlm_roberta(d, hidden_size=96, num_hidden_layers=2, pooling="mean", hidden_act="gelu"),
    "e5_mistral": lambda d: write_decoder(d, "mistral", sliding_window=7, num_hidden_layers=2),
    "e5_mistral-llama": lambda d: write_decoder(
        d, "llama", num_hidden_layers=2, hidden_size=60, head_dim=16, attention_bias=True, mlp_bias=True
    ),
    "gte_qwen2": lambda d: write_decoder(d, "qwen2", is_causal=False, hidden_size=96, num_hidden_layers=2),
    "gte_qwen2-causal": lambda d: write_decoder(d, "qwen2", is_causal=True, hidden_size=96, num_hidden_layers=2),
    "qwen3_embedding": lambda d: write_decoder(d, "qwen3", num_hidden_layers=2, max_seq_length=None),
    "qwen3_embedding-d80": lambda d: write_decoder(d, "qwen3", num_hidden_layers=2, head_dim=80, max_seq_length=None),
    "clip": lambda d: write_clip(
        d,
        text={"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
        vision={"hidden_size": 48, "num_attention_heads": 3, "image_size": 24},
    ),
    "gme_qwen2_vl": lambda d: write_qwen2_vl(d, num_hidden_layers=2),
}
LAUNCHES = {"bge": 7, "clip": 7, "gme_qwen2_vl": 9, "e5_mistral": 9, "gte_qwen2": 9, "qwen3_embedding": 9}
TOWER_LAUNCHES = 8  # GME's vision tower: the 7 of an encoder, and the rotation of q and k
FREE = {
    "view", "_unsafe_view", "split", "split_with_sizes", "unbind", "slice", "select", "transpose", "t", "expand",
    "as_strided", "alias", "detach", "empty", "empty_like", "new_empty", "unsqueeze", "squeeze", "permute", "reshape",
    "flatten",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "linear"}


@dataclass(frozen=True)
class Family:
    name: str
    embedder: Embedder
    rows: list[Row]  # including images
    vectors: np.ndarray  # from transformers


@pytest.fixture(scope="module", params=CHECKPOINTS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = CHECKPOINTS[request.param](tmp_path_factory.mktemp("checkpoint") / request.param)
    rows, vectors = rows_and_vectors(request.param, directory)
    return Family(request.param, embedder(request.param, directory), rows, vectors)


def embedder(name: str, directory: Path, dtype: str = "auto") -> Embedder:
    sys.modules.setdefault("triton_python_backend_utils", ModuleType("only inside Triton"))
    model = runpy.run_path(str(REPOSITORY / name.partition("-")[0] / "1" / "model.py"))["TritonPythonModel"]
    kind = AutoConfig.from_pretrained(directory).model_type
    serving = ServingConfig(
        name=name, checkpoint="", checkpoint_root=Path("/nonexistent"), model_types=(kind,), threads=1,
        kernels="triton", dtype=dtype, max_tokens=20, min_image_tokens=1, max_image_tokens=4,
    )  # fmt: skip
    return Embedder(model.spec, directory, serving)


def random_texts(name: str, vocabulary: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, vocabulary - 2, size=length).tolist() for length in LENGTHS]
    # CLIP pools the highest id, which is the last of its vocabulary.
    return [[*row, vocabulary - 1] for row in rows] if name == "clip" else rows


def sample_image() -> Image.Image:
    draw = np.random.default_rng(1)
    return Image.fromarray(draw.integers(0, 255, (30, 60, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def rows_and_vectors(name: str, directory: Path) -> tuple[list[Row], np.ndarray]:
    vocabulary = AutoConfig.from_pretrained(directory).get_text_config().vocab_size
    ids = random_texts(name, vocabulary)
    rows = [Row(np.array(text_ids, dtype=np.int32)) for text_ids in ids]
    if name.startswith("bge"):
        return rows, oracles.pooled_vectors(directory, ids, "mean" if "mean" in name else "cls")
    data = png(sample_image())
    if name == "clip":
        pixels = ClipImageProcessor.from_checkpoint(directory).read(data, 0)
        vectors = oracles.clip_text_vectors(directory, ids), oracles.clip_image_vectors(directory, [sample_image()])
        return [*rows, Row(np.empty(0, dtype=np.int32), (pixels,), 1)], np.concatenate(vectors)
    if name == "gme_qwen2_vl":
        (inputs,) = oracles.gme_inputs(directory, [{"text": "a cat", "images": [sample_image()]}], 1, 4)
        pixels = Qwen2VLImageProcessor.from_checkpoint(directory, 1, 4).read(data, 0)
        row = Row(inputs["input_ids"][0].numpy().astype(np.int32), (pixels,), 1)
        plain = [{"input_ids": torch.tensor([text_ids])} for text_ids in ids]
        return [*rows, row], oracles.gme_vectors(directory, [*plain, inputs])
    return rows, oracles.decoder_vectors(directory, ids)


def test_vectors_match_transformers(family: Family) -> None:
    assert family.embedder.kernels == "triton"
    result = family.embedder.embed(family.rows, [family.vectors.shape[1]] * len(family.rows))
    assert np.abs(result - family.vectors).max() < 2e-6


class Operations(TorchDispatchMode):
    """A record of all operations that would be a launch on a GPU: our kernels, and torch operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def record_launches(layers: Sequence[nn.Module], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Record the launches of each layer, in execution order."""
    launches: list[list[str]] = []
    active: list[Operations] = []
    call = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        if active:
            active[-1].names.append(self.fn.__name__)
        with _disable_current_modes():
            call(self, *args, **kwargs)

    def begin(*_: object) -> None:
        active.append(Operations())
        active[-1].__enter__()

    def end(*_: object) -> None:
        operations = active.pop()
        operations.__exit__(None, None, None)
        launches.append(operations.names)

    with monkeypatch.context() as patched:
        patched.setattr(GridExecutor, "__call__", launched)
        hooks = [
            hook
            for layer in layers
            for hook in (layer.register_forward_pre_hook(begin), layer.register_forward_hook(end))
        ]
        yield launches
        for hook in hooks:
            hook.remove()


def layers_of(embedder: Embedder) -> dict[str, list[nn.Module]]:
    network = embedder._network
    stacks = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: list(stack) for name, stack in stacks.items()}


def test_layer_launches_are_bounded(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder, dims = family.embedder, [family.vectors.shape[1]] * len(family.rows)
    for stack, layers in layers_of(embedder).items():
        with record_launches(layers, monkeypatch) as launches:
            embedder._embed(embedder._network, embedder._head, family.rows, dims)
        assert len(launches) == len(layers)
        max_launches = TOWER_LAUNCHES if stack == "visual.blocks" else LAUNCHES[family.name.partition("-")[0]]
        for names in launches:
            assert len(names) <= max_launches, names
            torch_operations = {name for name in names if not name.endswith("_kernel")}
            assert torch_operations <= PRODUCTS, names
            assert any("attention" in name for name in names)


def test_unsupported_head_size_is_rejected_at_load(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bge: .*head.*10.*; set the parameter kernels to reference"):
        embedder("bge", write_xlm_roberta(tmp_path / "bge", hidden_size=60, num_attention_heads=6))


def test_kernels_that_disagree_with_torch_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = accelerated.varlen_attention
    monkeypatch.setattr(
        accelerated, "varlen_attention", lambda q, k, v, packed, causal, *rest: kernel(q, k, v, packed, True, *rest)
    )
    with pytest.raises(ConfigError, match=r"disagree on cpu: cosine 0\.\d+; set the parameter kernels to reference"):
        embedder("bge", write_xlm_roberta(tmp_path / "bge", hidden_size=96))


def test_prefix_that_gives_nan_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NanPrefix(PrefixCache):
        def __call__(self, rows: Sequence[Row]) -> tuple[torch.Tensor, Packed]:
            hidden, packed = super().__call__(rows)
            return hidden * float("nan"), packed

    monkeypatch.setattr(embedder_file, "PrefixCache", NanPrefix)
    with pytest.raises(ConfigError, match="disagree on cpu: cosine nan"):
        embedder("qwen3_embedding", write_decoder(tmp_path / "qwen3", "qwen3", num_hidden_layers=1))


def test_interpreter_is_rejected_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        choose("auto", "cuda:0", torch.float32)
    assert choose("reference", "cuda:0", torch.float32).name == "reference"
