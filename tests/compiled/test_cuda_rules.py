"""What CUDA refuses and a CPU allows: every family runs on torch's device `meta` in place of a GPU.

Its tensors have a dtype and a shape, and no memory. They refuse operations together with tensors on the host, and that
a value is read on the host. `CudaRules` adds what CUDA's kernels demand beyond that.
"""

import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_networks import CHECKPOINTS, REPOSITORY, embedder, rows_and_vectors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from triton_embed.kernels.gpu import activation, attention, linear, norm, patchify, pooling, rotary
from triton_embed.kernels.ops import Ops
from triton_embed.python_backend.execution import embedder as embedder_file
from triton_embed.python_backend.execution.embedder import Embedder
from triton_embed.python_backend.execution.prefix_cache import PrefixCache
from triton_embed.python_backend.inputs.row import Row

DEVICE = "meta"
DTYPES = ("float32", "float16", "bfloat16")
# CUDA's kernels for these read every tensor in the dtype of the first one (pytorch, layer_norm_kernel.cu).
ONE_DTYPE = {"native_layer_norm", "layer_norm", "native_group_norm", "_fused_rms_norm"}


class CudaRules(TorchDispatchMode):
    """Refuses operations that CUDA refuses.

    Args:
        recording: Refuse also what must not happen while a CUDA graph is recorded: tensors on the host.
    """

    def __init__(self, recording: bool = False) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in ONE_DTYPE and len({tensor.dtype for tensor in tensors}) > 1:
            raise RuntimeError(f"CUDA: {name} over {[str(tensor.dtype) for tensor in tensors]}")
        result = func(*args, **(kwargs or {}))
        if self._recording:
            tensors += [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            if hosted := [tensor for tensor in tensors if tensor.device.type != DEVICE]:
                raise RuntimeError(f"CUDA graph: {name} over tensors on {hosted[0].device}")
        return result


@pytest.fixture(autouse=True)
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch no kernels, because tensors without memory have no address."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(embedder_file, "_min_cosine", lambda *_: 1.0)  # nothing is computed
    for file in (activation, attention, linear, norm, patchify, pooling, rotary):
        monkeypatch.setattr(file, "launch", lambda *_, **__: None)


def on_cuda(name: str, loaded: Embedder, kernels: str) -> tuple[Any, Any]:
    """Return the network and the head of a loaded model with weights without memory."""
    sys.modules.setdefault("triton_python_backend_utils", ModuleType("only inside Triton"))
    spec = runpy.run_path(str(REPOSITORY / name.partition("-")[0] / "1" / "model.py"))["TritonPythonModel"].spec
    loaded.device = DEVICE
    network, head = loaded._build(spec, Ops.on(DEVICE, loaded.dtype, kernels))
    for module, source in ((network, loaded._network), (head, loaded._head)):
        for key, weight in source.named_parameters():
            owner, _, name = key.rpartition(".")
            parameter = nn.Parameter(torch.empty_like(weight, device=DEVICE), requires_grad=False)
            module.get_submodule(owner).register_parameter(name, parameter)
    return network, head


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_families_do_nothing_that_cuda_refuses(name: str, dtype: str, kernels: str, tmp_path: Path) -> None:
    directory = CHECKPOINTS[name](tmp_path / "checkpoint")
    loaded = embedder(name, directory, dtype)
    rows, vectors = rows_and_vectors(name, directory)
    texts = [row for row in rows if not row.images]
    images = [row for row in rows if row.images]
    dims = vectors.shape[1]
    sharing = [Row(texts[2].ids, shared_prefix_tokens=9)] * 2
    with torch.inference_mode():
        network, head = on_cuda(name, loaded, kernels)
        with CudaRules():
            for batch in (texts[:1], texts, images, rows, sharing):
                if batch:
                    for sizes in ([dims] * len(batch), [dims // 2 + i % 2 for i in range(len(batch))]):
                        embedded = head(*network(batch), sizes)
                        assert (embedded.device.type, embedded.dtype) == (DEVICE, torch.float32)
                        assert len(embedded) == len(batch)
            if network.shareable:
                assert len(PrefixCache(network)([*sharing, *texts])[0]) == len(texts) + 2
        if network.recordable and kernels == "triton":
            batch = network.lay_out(texts).to(DEVICE)
            with CudaRules(recording=True):
                assert network.compute(batch).device.type == DEVICE


def test_rules_refuse_mixed_dtypes() -> None:
    x, weight = torch.empty(3, 8, dtype=torch.bfloat16, device=DEVICE), torch.empty(8, device=DEVICE)
    with CudaRules(), pytest.raises(RuntimeError, match="CUDA: native_layer_norm over"):
        torch.nn.functional.layer_norm(x, (8,), weight, weight)


def test_rules_refuse_two_devices_and_values_on_the_host() -> None:
    with CudaRules():
        x = torch.empty(8, device=DEVICE)
        with pytest.raises(RuntimeError, match="device"):
            x + torch.empty(8)
        with pytest.raises(RuntimeError, match="meta tensors"):
            x.max().item()


def test_rules_refuse_the_host_while_a_graph_is_recorded() -> None:
    with CudaRules(recording=True), pytest.raises(RuntimeError, match="CUDA graph: "):
        torch.empty(8, device=DEVICE).index_select(0, torch.arange(3).to(DEVICE))
