"""Every family on Triton's kernels: transformers' vectors, and no more launches a layer than were promised."""

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

from triton_embed.kernels import accelerated, ops
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend import embedder as embedder_file
from triton_embed.python_backend.config import ServingConfig
from triton_embed.python_backend.embedder import Embedder
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.images import ClipImages, Qwen2VLImages
from triton_embed.python_backend.prefix import PrefixReuse
from triton_embed.python_backend.row import Row

REPOSITORY = Path(__file__).parents[2] / "model_repository"
LENGTHS = (5, 1, 19, 2)
# Heads are multiples of 16, as the kernels want them; everything else is as odd as may be.
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
TOWER_LAUNCHES = 8  # of GME: an encoder's 7, and the turning of q and k
FREE = {
    "view", "_unsafe_view", "split", "split_with_sizes", "unbind", "slice", "select", "transpose", "t", "expand",
    "as_strided", "alias", "detach", "empty", "empty_like", "new_empty", "unsqueeze", "squeeze", "permute", "reshape",
    "flatten",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "linear"}


@dataclass(frozen=True)
class Family:
    name: str
    ours: Embedder
    rows: list[Row]  # pictures among them
    vectors: np.ndarray  # transformers'


@pytest.fixture(scope="module", params=CHECKPOINTS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    directory = CHECKPOINTS[request.param](tmp_path_factory.mktemp("checkpoint") / request.param)
    rows, vectors = rows_and_vectors(request.param, directory)
    yield Family(request.param, embedder(request.param, directory), rows, vectors)
    ops.use("auto")


def embedder(name: str, directory: Path) -> Embedder:
    sys.modules.setdefault("triton_python_backend_utils", ModuleType("only inside Triton"))
    model = runpy.run_path(str(REPOSITORY / name.partition("-")[0] / "1" / "model.py"))["TritonPythonModel"]
    kind = AutoConfig.from_pretrained(directory).model_type
    serving = ServingConfig(
        name=name, checkpoint="", checkpoint_root=Path("/nonexistent"), model_types=(kind,), threads=1,
        kernels="triton", max_tokens=20, min_image_tokens=1, max_image_tokens=4,
    )  # fmt: skip
    return Embedder(model.spec, directory, serving)


def texts(name: str, vocabulary: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, vocabulary - 2, size=length).tolist() for length in LENGTHS]
    # CLIP pools the highest id, which is the last of its vocabulary.
    return [[*row, vocabulary - 1] for row in rows] if name == "clip" else rows


def picture() -> Image.Image:
    draw = np.random.default_rng(1)
    return Image.fromarray(draw.integers(0, 255, (30, 60, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def rows_and_vectors(name: str, directory: Path) -> tuple[list[Row], np.ndarray]:
    vocabulary = AutoConfig.from_pretrained(directory).get_text_config().vocab_size
    ids = texts(name, vocabulary)
    rows = [Row(np.array(one, dtype=np.int32)) for one in ids]
    if name.startswith("bge"):
        return rows, oracles.encoder_vectors(directory, ids, "mean" if "mean" in name else "cls")
    data = png(picture())
    if name == "clip":
        pixels = ClipImages.from_checkpoint(directory).read(data, 0)
        wanted = oracles.clip_text_vectors(directory, ids), oracles.clip_image_vectors(directory, [picture()])
        return [*rows, Row(np.empty(0, dtype=np.int32), (pixels,), 1)], np.concatenate(wanted)
    if name == "gme_qwen2_vl":
        (inputs,) = oracles.gme_inputs(directory, [{"text": "a cat", "images": [picture()]}], 1, 4)
        pixels = Qwen2VLImages.from_checkpoint(directory, 1, 4).read(data, 0)
        row = Row(inputs["input_ids"][0].numpy().astype(np.int32), (pixels,), 1)
        plain = [{"input_ids": torch.tensor([one])} for one in ids]
        return [*rows, row], oracles.gme_vectors(directory, [*plain, inputs])
    return rows, oracles.decoder_vectors(directory, ids)


def test_vectors_are_transformers_own(family: Family) -> None:
    assert family.ours.kernels == "triton"
    found = family.ours.embed(family.rows, [family.vectors.shape[1]] * len(family.rows))
    assert np.abs(found - family.vectors).max() < 2e-6


class Operations(TorchDispatchMode):
    """Everything that would be a launch on a GPU: kernels of ours, and torch's that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(layers: Sequence[nn.Module], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """What each layer launches, in the order they run."""
    found: list[list[str]] = []
    open_: list[Operations] = []
    call = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        if open_:
            open_[-1].names.append(self.fn.__name__)
        with _disable_current_modes():
            call(self, *args, **kwargs)

    def begin(*_: object) -> None:
        open_.append(Operations())
        open_[-1].__enter__()

    def end(*_: object) -> None:
        operations = open_.pop()
        operations.__exit__(None, None, None)
        found.append(operations.names)

    with monkeypatch.context() as patched:
        patched.setattr(GridExecutor, "__call__", launched)
        hooks = [
            hook
            for layer in layers
            for hook in (layer.register_forward_pre_hook(begin), layer.register_forward_hook(end))
        ]
        yield found
        for hook in hooks:
            hook.remove()


def layers_of(ours: Embedder) -> dict[str, list[nn.Module]]:
    network = ours._network
    stacks = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: list(stack) for name, stack in stacks.items()}


def test_a_layer_launches_no_more_than_was_promised(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, dims = family.ours, [family.vectors.shape[1]] * len(family.rows)
    for stack, layers in layers_of(ours).items():
        with counted(layers, monkeypatch) as found:
            ours._embed(ours._network, family.rows, dims)
        assert len(found) == len(layers)
        most = TOWER_LAUNCHES if stack == "visual.blocks" else LAUNCHES[family.name.partition("-")[0]]
        for names in found:
            assert len(names) <= most, names
            torchs = {name for name in names if not name.endswith("_kernel")}
            assert torchs <= PRODUCTS, names
            assert any("attention" in name for name in names)


def test_a_head_that_no_kernel_fits_is_refused_when_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bge: .*head.*10.*; the parameter kernels: torch"):
        embedder("bge", write_xlm_roberta(tmp_path / "bge", hidden_size=60, num_attention_heads=6))


def test_kernels_that_disagree_with_torch_serve_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = accelerated.varlen_attention
    monkeypatch.setattr(
        accelerated, "varlen_attention", lambda q, k, v, packed, causal, *rest: kernel(q, k, v, packed, True, *rest)
    )
    with pytest.raises(ConfigError, match=r"disagree on cpu: cosine 0\.\d+; the parameter kernels: torch"):
        embedder("bge", write_xlm_roberta(tmp_path / "bge", hidden_size=96))


def test_a_way_that_gives_no_numbers_serves_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoiled(PrefixReuse):
        def __call__(self, rows: Sequence[Row]) -> tuple[torch.Tensor, Packed]:
            hidden, packed = super().__call__(rows)
            return hidden * float("nan"), packed

    monkeypatch.setattr(embedder_file, "PrefixReuse", Spoiled)
    with pytest.raises(ConfigError, match="disagree on cpu: cosine nan"):
        embedder("qwen3_embedding", write_decoder(tmp_path / "qwen3", "qwen3", num_hidden_layers=1))


def test_a_gpu_is_not_served_by_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ops.use("auto")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        ops.require("cuda:0", torch.float32)
    ops.use("torch")
    ops.require("cuda:0", torch.float32)
    ops.use("auto")
