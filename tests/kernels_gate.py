"""Every kernel compiled ahead of time, without a GPU, for each architecture that has a table of block sizes.

`python tests/kernels_gate.py` prints a line per build, then the problems, and exits with 1 if there are any
(`python tests/kernels_gate.py norm sm90`: only the kernels of this file, only for this architecture). The ops are
called with the sizes of real models over uninitialized memory, and each launch is compiled instead of run.

Problems are: a build that fails, spills registers, needs more shared memory than the architecture has, does not use the
tensor cores or 128-bit loads that make it fast, lets tensor core instructions of Hopper wait for each other, or leaves
room for one program on a multiprocessor where two would hide each other's epilogues; a kernel or a table entry that no
call reaches; a number whose value would trigger compilation in a request; and a deliberately bad build that passes.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_embed.kernels.gpu import activation, attention, blocks, linear, norm, patchify, pooling, rotary
from triton_embed.kernels.gpu import backend as ops
from triton_embed.kernels.gpu.blocks import Config, Table
from triton_embed.kernels.packed import Packed

PROCESSES = 2
FILES = {
    file.__name__.rpartition(".")[2]: file for file in (activation, attention, linear, norm, patchify, pooling, rotary)
}
TENSOR_CORES = {"attention", "linear"}  # in 2-byte types
WIDE_LOADS = {"activation", "norm", "pooling", "rotary"}

ARCHITECTURES = {"sm80": 80, "sm90": 90, "sm100": 100}
# Bytes for a block. The table of sm80 serves 8.6, 8.9 and 12.x too, which have less than the 166,912 of an A100.
SHARED = {80: 101_376, 90: 232_448, 100: 232_448}
HIP = "gfx942"
# Of a multiprocessor, by architecture: shared memory and its part that each program loses to the system, threads.
SHARED_ALL, SHARED_LOST, THREADS = {80: 167_936, 90: 233_472, 100: 233_472}, 1_024, 2_048
REGISTERS = 65_536  # of a multiprocessor, given to warps in units of 256
# Tensor core operation in PTX -> the instruction that ptxas generates for it.
INSTRUCTIONS = {"tcgen05.mma": "UTCHMMA", "wgmma.mma_async": "HGMMA", "mma.sync": "HMMA"}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
ALIGNED = [["tt.divisibility", 16]]  # `launch` checks it


@dataclass(frozen=True)
class Launch:
    """A kernel as an op launches it: the type of each parameter, and the values of the constant ones."""

    case: str = field(compare=False, repr=False)
    file: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int

    @property
    def dtype(self) -> str:
        return next(kind[1:] for kind in self.signature.values() if "fp" in kind or "bf" in kind)

    @property
    def config(self) -> str:
        blocks = "x".join(str(value) for name, value in self.constants.items() if name.startswith("BLOCK_"))
        return f"{blocks} {self.num_warps}w {self.num_stages}s"


@dataclass(frozen=True)
class Build:
    """A launch for a target (a compute capability, or HIP), and the instructions it must use."""

    launch: Launch
    target: int | str
    tensor_cores: bool = False
    wide_loads: bool = False
    two_programs: bool = False

    @classmethod
    def of(cls, launch: Launch, target: int | str) -> "Build":
        halves = launch.dtype in {"bf16", "fp16"}
        one_row = launch.constants.get("MODE") in {"cls", "last"}  # per sequence: little to read
        tensor_cores = launch.file in TENSOR_CORES and halves
        wide_loads = launch.file in WIDE_LOADS and not one_row
        # The epilogue of a product with an activation is half as long as its loop: another program hides it.
        two_programs = launch.file == "linear" and halves and target == 90
        return cls(launch, target, tensor_cores, wide_loads, two_programs)

    def __str__(self) -> str:
        launch, target = self.launch, self.target if self.target == HIP else f"sm_{self.target}"
        name = launch.kernel.removeprefix("_").removesuffix("_kernel")
        return f"{name:<17}{launch.case:<15}{launch.dtype:<5}{launch.config:<19}{target:<7}"


@dataclass(frozen=True)
class Built:
    """The result of a build.

    Attributes:
        spills: Instructions that spill registers.
        instruction: That of the tensor cores, if any.
        products: How many of them there are, on Hopper.
        waits: How often they wait until earlier ones have ended.
        programs: How many fit on a multiprocessor.
    """

    registers: int = 0
    spills: int = 0
    shared: int = 0  # bytes
    instruction: str = ""
    products: int = 0
    waits: int = 0
    programs: int = 0
    wide_loads: int = 0
    seconds: float = 0.0
    error: str = ""

    def problems(self, build: Build) -> list[str]:
        """Return why the build is bad; for HIP only whether it compiles."""
        if self.error or isinstance(build.target, str):
            return [self.error] if self.error else []
        room = SHARED[build.target]
        checks = {
            f"{self.spills} spills": self.spills > 0,
            f"{self.shared} bytes of shared memory, of {room}": self.shared > room,
            "no tensor cores": build.tensor_cores and not self.instruction,
            "no 128-bit loads": build.wide_loads and not self.wide_loads,
            f"{self.waits} waits for {self.products} products": 2 * self.waits > self.products,
            f"room for {self.programs} program": build.two_programs and self.programs < 2,
        }
        return [problem for problem, failed in checks.items() if failed]

    def __str__(self) -> str:
        waits = f"{self.waits}/{self.products}" if self.products else ""
        counts = f"{self.registers:>5}{self.spills:>7}{self.shared:>8}{self.programs:>9}"
        counts += f"  {self.instruction:<8}{waits:>6}{self.wide_loads:>5}"
        return f"{counts}{self.seconds:>8.2f}"


HEADER = (
    f"{'kernel':<17}{'case':<15}{'type':<5}{'config':<19}target "
    " regs spills  shared programs  matrix   waits wide seconds"
)


class Watched(Table):
    """A table that records which of its entries were used."""

    def __init__(self, table: Table) -> None:
        super().__init__(table.architecture, {})
        self.kernels = table.kernels
        self.used: list[Config | None] = []

    def find_config(self, kernel: str, **sizes: int) -> Config | None:
        self.used.append(super().find_config(kernel, **sizes))
        return self.used[-1]

    def unreached(self, kernel: str) -> list[dict[str, int]]:
        """Return the limits of the entries that were not used yet."""
        return [
            limits
            for limits, config in self.kernels[kernel]
            if config is not None and not any(config is used for used in self.used)
        ]


@contextmanager
def recording(table: Table) -> Iterator[list[Launch]]:
    """Record the launches of ops instead of running them, with block sizes from `table`."""
    launches: list[Launch] = []

    def launch(
        kernel: Any,
        _: tuple[int, ...],
        arguments: tuple[Tensor | int | float | None, ...],
        constants: dict[str, object],
        num_warps: int = 4,
        num_stages: int = 1,
    ) -> None:
        names, constants = kernel.arg_names, dict(constants)
        assert names[len(arguments) :] == list(constants), f"{kernel.__name__} takes {names}, got {list(constants)}"
        signature = dict.fromkeys(names, "constexpr")
        for parameter, argument in zip(kernel.params, arguments, strict=False):
            if argument is None:
                constants[parameter.name] = None
            elif isinstance(argument, Tensor):
                signature[parameter.name] = TYPES[argument.dtype]
            else:
                assert parameter.do_not_specialize, f"{kernel.__name__} compiles for each value of {parameter.name}"
                signature[parameter.name] = "fp32" if isinstance(argument, float) else "i32"
        file = kernel.__module__.rpartition(".")[2]
        launches.append(Launch("", file, kernel.__name__, signature, constants, num_warps, num_stages))

    real = blocks.table_for
    blocks.table_for = lambda _: table  # type: ignore[assignment]
    for file in FILES.values():
        file.launch = launch  # type: ignore[attr-defined]
    yield launches
    blocks.table_for = real


@dataclass(frozen=True)
class Model:
    """The sizes of a common transformer. The activation silu is gated."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    act: str
    causal: bool = False
    window: int | None = None
    normed_heads: bool = False
    rotary: bool = True
    prefix: bool = False


MODELS = {
    "MiniLM": Model(384, 12, 12, 32, 1536, "gelu_erf", rotary=False),
    "bge-large": Model(1024, 16, 16, 64, 4096, "gelu_erf", rotary=False),
    "Qwen3-0.6B": Model(1024, 16, 8, 128, 3072, "silu", causal=True, normed_heads=True, prefix=True),
    "e5-mistral": Model(4096, 32, 8, 128, 14336, "silu", causal=True, window=4096, prefix=True),
    "gte-1.5B": Model(1536, 12, 2, 128, 8960, "silu", causal=True, prefix=True),
    "CLIP": Model(1024, 16, 16, 64, 4096, "quick_gelu", rotary=False),
    "CLIP text": Model(768, 12, 12, 64, 3072, "quick_gelu", causal=True, rotary=False),
    "GME vision": Model(1280, 16, 16, 80, 5120, "quick_gelu"),
}
PACKED = Packed.from_lengths((700, 300, 17, 7))
Calls = Iterator[Callable[[], object]]


def attention_calls(model: Model, dtype: torch.dtype) -> Calls:
    shape = PACKED.tokens, model.heads + 2 * model.kv_heads, model.head_dim
    q, k, v = torch.empty(shape, dtype=dtype).split([model.heads, model.kv_heads, model.kv_heads], dim=1)
    rows, scale = torch.empty(len(PACKED.lengths), dtype=torch.int32), model.head_dim**-0.5
    prefix = (k[:32], v[:32]) if model.prefix else None
    yield lambda: ops.varlen_attention(q, k, v, PACKED, model.causal, model.window, scale, prefix)
    yield lambda: ops.pooled_attention(q, k, v, PACKED, rows, model.window, scale, prefix)


def row_calls(model: Model, dtype: torch.dtype) -> Calls:
    x, weight = torch.empty(PACKED.tokens, model.hidden, dtype=dtype), torch.empty(model.hidden, dtype=dtype)
    sequences, eps = len(PACKED.lengths), 1e-6
    rows = torch.empty(sequences, dtype=torch.int32)
    if model.rotary:
        yield rotary_call(model, dtype)
    if model.act == "silu":
        yield lambda: ops.add_rms_norm(x, x, weight, eps)
        yield lambda: ops.gated_activation(torch.empty(PACKED.tokens, 2 * model.inner, dtype=dtype))
        yield lambda: ops.segment_pool(x, PACKED, "last", [model.hidden] * sequences)
    else:
        yield lambda: ops.post_layer_norm(x[:sequences], x, weight, weight, eps, rows)
        yield lambda: ops.embed_layer_norm(rows, rows, None, x, x, x, weight, weight, eps)
        yield lambda: ops.segment_pool(x, PACKED, "mean", range(1, sequences + 1), torch.nn.Identity())


def rotary_call(model: Model, dtype: torch.dtype) -> Callable[[], object]:
    qkv = torch.empty(PACKED.tokens, (model.heads + 2 * model.kv_heads) * model.head_dim, dtype=dtype)
    angles = torch.empty(PACKED.tokens, model.head_dim // 2)
    weight = torch.empty(model.head_dim, dtype=dtype) if model.normed_heads else None
    return lambda: ops.qk_norm_rope_(qkv, (model.heads, model.kv_heads), angles, angles, weight, weight, 1e-6)


def linear_calls(model: Model, dtype: torch.dtype, table: Table) -> Calls:
    """Yield calls at the maximum tokens of each entry, and at a full batch."""
    weight, bias = torch.empty(model.inner, model.hidden, dtype=dtype), torch.empty(model.inner, dtype=dtype)
    for tokens in sorted({limits.get("tokens", 16_384) for limits, _ in table.kernels["linear"]}):
        yield lambda tokens=tokens: ops.linear(torch.empty(tokens, model.hidden, dtype=dtype), weight, bias, model.act)


def patchify_call(patch: int) -> Callable[[], object]:
    image, three = torch.empty(2 * patch, 2 * patch, 3, dtype=torch.uint8), torch.empty(3)
    return lambda: ops.patchify(image, patch, 2, 2, three, three)


def calls(table: Watched) -> Iterator[tuple[str, Calls]]:
    """Yield named calls: those of the models in bfloat16, then those that reach the remaining entries of the table."""
    half, single = torch.bfloat16, torch.float32
    small, decoder = MODELS["MiniLM"], MODELS["Qwen3-0.6B"]
    for name, model in MODELS.items():
        yield name, attention_calls(model, half)
        if name == "Qwen3-0.6B":  # also without a prefix, which compiles other code
            yield name, attention_calls(replace(model, prefix=False), half)
        if name != "CLIP text":  # another model has rows of the same width
            yield name, row_calls(model, half)
        if name in {"bge-large", "CLIP"}:
            yield name, linear_calls(model, half, table)
    yield "MiniLM", chain(row_calls(small, single), linear_calls(small, single, table))
    yield "Qwen3-0.6B", iter([rotary_call(decoder, single)])
    for kernel in ("attention", "pooled_attention"):
        for limits in table.unreached(kernel):
            dtype = single if limits["itemsize"] == 4 else half
            yield f"D{limits['head_dim']}", attention_calls(replace(small, head_dim=limits["head_dim"]), dtype)
    for limits in table.unreached("rotary"):
        size = 2 * limits.get("half", 128)
        yield f"D{size}", iter([rotary_call(replace(decoder, head_dim=size), half)])
    for kernel in ("rowwise", "pooling", "elementwise"):
        for limits in table.unreached(kernel):
            width = limits.get("width", 8192)
            x, weight = torch.empty(PACKED.tokens, width, dtype=half), torch.empty(width, dtype=half)
            yield (
                f"E{width}",
                iter(
                    [
                        partial(ops.post_layer_norm, x, None, weight, weight, 1e-6),
                        partial(ops.segment_pool, x, PACKED, "max", [width] * len(PACKED.lengths)),
                        partial(ops.activation, x, "gelu_tanh"),
                    ]
                ),
            )
    for limits in table.unreached("patchify"):
        yield "pixels", iter([patchify_call(math.isqrt(limits.get("values", 8192) // 3))])


def launches(table: Table, cases: Iterable[tuple[str, Calls]]) -> list[Launch]:
    """Return each distinct launch once, even if several models share it."""
    distinct: dict[str, Launch] = {}
    for case, case_calls in cases:
        with recording(table) as recorded:
            for call in case_calls:
                call()
        for launch in recorded:
            distinct.setdefault(str(launch), replace(launch, case=case))
    return list(distinct.values())


def compiled(build: Build) -> Built:
    """Compile a build (in a worker process). A failure is a result, not an exception."""
    launch, began = build.launch, time.monotonic()
    kernel = getattr(FILES[launch.file], launch.kernel)
    pointers = [i for i, name in enumerate(kernel.arg_names) if launch.signature[name].startswith("*")]
    source = ASTSource(kernel, launch.signature, launch.constants, {(i,): ALIGNED for i in pointers})
    target = GPUTarget("hip", HIP, 64) if build.target == HIP else GPUTarget("cuda", build.target, 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    try:
        kernel_build = triton.compile(source, target=target, options=options)
    except Exception as error:  # noqa: BLE001 - the compiler raises many types
        return Built(error=f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    seconds = time.monotonic() - began
    if build.target == HIP:
        text = kernel_build.asm["amdgcn"]
        registers, spills = (int(re.findall(rf"\.vgpr_{name}:\s+(\d+)", text)[0]) for name in ("count", "spill_count"))
        instruction = next(iter(re.findall(r"\bv_mfma", text)), "")
        return Built(registers, spills, kernel_build.metadata.shared, instruction, seconds=seconds)
    usage = _cuobjdump(kernel_build.asm["cubin"], "-res-usage")
    registers, stack = map(int, re.findall(r"\bREG:(\d+) STACK:(\d+)", usage)[0])
    instruction = next((INSTRUCTIONS[name] for name in INSTRUCTIONS if name in kernel_build.asm["ptx"]), "")
    # Spilled registers are on the stack. Disassembly takes as long as compilation, so it is skipped if not needed.
    asynchronous = instruction == "HGMMA"
    code = _cuobjdump(kernel_build.asm["cubin"], "-sass") if stack or asynchronous else ""
    return Built(
        registers=registers,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=kernel_build.metadata.shared,
        instruction=instruction,
        products=len(re.findall(r"\bHGMMA\b", code)),
        waits=len(re.findall(r"\bWARPGROUP\.ARRIVE\b", code)) if asynchronous else 0,
        programs=_programs(build.target, launch.num_warps, registers, kernel_build.metadata.shared),
        wide_loads=len(re.findall(r"\bld\.global\S*\.(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)\b", kernel_build.asm["ptx"])),
        seconds=seconds,
    )


def _programs(capability: int, warps: int, registers: int, shared: int) -> int:
    """Return how many programs fit on a multiprocessor (CUDA's occupancy calculator)."""
    by_threads = THREADS // (32 * warps)
    by_registers = REGISTERS // (math.ceil(32 * registers / 256) * 256) // warps
    return min(by_threads, by_registers, SHARED_ALL[capability] // (shared + SHARED_LOST))


def serialized_attention() -> ModuleType:
    """Return attention with the masked blocks before the unmasked ones."""
    text = Path(attention.__file__).read_text()
    unmasked, masked = (
        text.index("    for i in range(unmasked_from"),
        text.index("    for i in tl.range(block_count - un"),
    )
    end = text.index("    return", masked)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serialized.py"
        file.write_text(text[:unmasked] + text[masked:end] + text[unmasked:masked] + text[end:])
        spec = spec_from_file_location("serialized", file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOL, option, file.name], check=True, capture_output=True, text=True).stdout


def bad_builds() -> dict[str, Build]:
    """Return builds that the gate must reject, by a part of the problem it must report."""
    x, bias = torch.empty(512, 1024, dtype=torch.bfloat16), torch.empty(1024, dtype=torch.bfloat16)
    weight, odd = torch.empty(1024, 1024, dtype=torch.bfloat16), torch.empty(99, 1023, dtype=torch.bfloat16)

    def launch_of(call: Callable[[], object]) -> Launch:
        return launches(blocks.load_table("sm80"), [("", iter([call]))])[0]

    large, deep, small = Config(128, 256, 32, 4, 2), Config(128, 128, 64, 8, 6), Config(64, 64, 16)
    single = launch_of(lambda: ops.linear(x.float(), weight.float(), bias.float(), None, small))
    large_head = replace(MODELS["Qwen3-0.6B"], prefix=False)
    (attend, *_) = launches(blocks.load_table("sm90"), [("", attention_calls(large_head, torch.bfloat16))])
    FILES["serialized"] = serialized_attention()
    four_stages = Config(128, 128, 64, 8, 4)
    return {
        "waits for": Build.of(replace(attend, file="serialized"), 90),
        "room for": Build.of(launch_of(lambda: ops.linear(x, weight, bias, "gelu_erf", four_stages)), 90),
        "spills": Build.of(launch_of(lambda: ops.linear(x, weight, bias, None, large)), 80),
        "shared memory": Build.of(launch_of(lambda: ops.linear(x, weight, bias, None, deep)), 80),
        "tensor cores": Build(single, 80, tensor_cores=True),
        "128-bit loads": Build.of(launch_of(lambda: ops.activation(odd, "relu")), 80),
    }


def finished(builds: list[Build]) -> Iterator[Built]:
    """Yield the result of each build in order, as soon as it is done. The cache of earlier runs is not used."""
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(PROCESSES, get_context("fork")) as pool:
        os.environ["TRITON_CACHE_DIR"] = cache
        futures = [pool.submit(compiled, build) for build in builds]
        for future in futures:
            try:
                yield future.result()
            except BrokenProcessPool:
                yield Built(error="the compiler crashed in this build or the one that ran at the same time")


def unreached(launches: list[Launch]) -> list[str]:
    """Return the kernels that no call reached, in all files of `kernels/gpu/`."""
    sources = {path.stem: path.read_text() for path in Path(blocks.__file__).parent.glob("*.py")}
    launched = {(name, kernel) for name, text in sources.items() for kernel in re.findall(r"launch\(\s*(\w+)", text)}
    missed = launched - {("launch", "kernel")} - {(launch.file, launch.kernel) for launch in launches}
    return [f"kernels/{name}.py: no call reaches {kernel}" for name, kernel in sorted(missed)]


def main(names: Collection[str]) -> int:
    unknown = set(names) - {*FILES, *ARCHITECTURES, HIP}
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join([*FILES, *ARCHITECTURES, HIP])}")
        return 2
    files = set(FILES).intersection(names) or set(FILES)
    architectures = {*ARCHITECTURES, HIP}.intersection(names) or {*ARCHITECTURES, HIP}
    began, builds, problems = time.monotonic(), [], []
    for architecture, capability in ARCHITECTURES.items():
        table = Watched(blocks.load_table(architecture))
        reached = launches(table, calls(table))
        problems += [
            f"{architecture}.json: no call reaches the entry of '{kernel}' up to {limits}"
            for kernel in table.kernels
            for limits in table.unreached(kernel)
        ]
        selected = [launch for launch in reached if launch.file in files]
        if architecture in architectures:
            builds += [Build.of(launch, capability) for launch in selected]
    problems += unreached(reached)
    if HIP in architectures:
        builds += [Build.of(launch, HIP) for launch in {launch.kernel: launch for launch in selected}.values()]
    bad = bad_builds()
    print(f"triton {triton.__version__}\n{HEADER}", flush=True)
    results = finished([*builds, *bad.values()])
    for build, built in zip(builds, results, strict=False):
        found_here = built.problems(build)
        print(f"{build}{built}", *(f"  <- {problem}" for problem in found_here), flush=True)
        problems += [f"{build}: {problem}" for problem in found_here]
    print("bad on purpose:", flush=True)
    for (expected, build), built in zip(bad.items(), results, strict=True):
        found_here = built.problems(build)
        print(f"{build}{built}", *(f"  <- {problem}" for problem in found_here), flush=True)
        if not any(expected in problem for problem in found_here):
            problems.append(f"{build}: passed, although it is bad on purpose ({expected})")
    print(f"{len(builds)} builds in {time.monotonic() - began:.0f} s, {len(problems)} problems", *problems, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
