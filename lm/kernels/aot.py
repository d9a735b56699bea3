"""Compile every kernel without a GPU, and check the machine code: ``python -m lm.kernels.aot``.

The real launchers are called on small CPU tensors, with a driver that claims to be the GPU and with launches replaced
by compilations. So this compiles what a real call would, with the same specializations, for every entry of the table of
tile sizes. The result is compared with what ``aot.json`` has for this version of Triton, which ``--update`` rewrites: a
change of registers or tensor-core instructions then shows as a line in a diff instead of surprising someone on a GPU.

This is a gate as well: code that spills, needs more shared memory than the chip has, or, on Hopper, waits for each
product before the next (ptxas reports such serialized ``wgmma`` as C7510) is refused without being timed.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch

from lm.kernels import dispatch, masks

SNAPSHOT = Path(__file__).with_name("aot.json")
ARCHITECTURES = (80, 90, 120)
# The most shared memory a block may use. Triton compiles kernels that exceed it, whose launch then fails.
SHARED_MEMORY_BYTES = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
# What most models use: these must not spill, and must use the tensor cores (on Hopper, its wgmma instructions).
MAIN_WIDTHS, MAIN_KERNELS = (64, 128), ("attention_forward", "attention_query_gradient", "attention_key_gradient")
# The exception: on an H200 it was faster with some bytes spilled than with any tile sizes that spill none.
MAY_SPILL = {("sm_90", "attention_key_gradient"): 256}

TENSOR_OPCODE = re.compile(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b")
# A loop ends with a conditional jump; where a kernel has waited for a load, it returns to its loop by a plain one.
LOOP_END = re.compile(r"@!?U?P\w+\s+BRA\b.*?(\.L_\w+)")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: registers per thread, bytes, and counts of instructions in the machine code.

    ``loop`` is the number of instructions of the hot loop, with products of tensor cores and no mask (0: none found);
    ``serialized`` counts the loops in which each ``wgmma`` waits for the one before.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    wgmma: int
    mma: int
    tma: int
    loop: int
    serialized: int


def fake_driver(architecture: int) -> Any:
    """The part of Triton's driver that compilation needs."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_current_device=lambda: architecture,  # Triton caches compiled kernels by device
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )


@contextmanager
def compiling_for(architecture: int) -> Iterator[list[tuple[str, Any]]]:
    """Make launches compile for ``architecture`` without running; yield the list of (name, compiled kernel)."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    made: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        made.append((self.__name__, kernel))
        return kernel

    before = driver._active
    driver.set_active(fake_driver(architecture))
    JITFunction.run = compile_only
    try:
        yield made
    finally:
        JITFunction.run = run
        driver._active = before


def inspect_kernel(kernel: Any) -> Compiled:
    """Read the machine code of a compiled kernel with the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, options in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["-c"]))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    registers, stack = map(int, found.groups())
    wgmma, mma, tma = (len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", r"(?:HMMA|UTC\w*MMA)", "UTMALDG"))
    loops = tensor_loops(code)
    return Compiled(
        registers, stack, kernel.metadata.shared, kernel.metadata.num_warps, wgmma, mma, tma,
        loop=min(map(len, loops), default=0), serialized=sum(map(is_serialized, loops)),
    )  # fmt: skip


def tensor_loops(code: str) -> list[list[str]]:
    """The opcodes of each innermost loop that uses the tensor cores, from a disassembly."""
    lines = code.splitlines()
    labels = {line.strip().removesuffix(":"): i for i, line in enumerate(lines) if re.match(r"\s*\.L_\w+:", line)}
    spans = []
    for end, line in enumerate(lines):
        jump = LOOP_END.search(line)
        if jump and labels.get(jump[1], end) < end and TENSOR_OPCODE.search("\n".join(lines[labels[jump[1]] : end])):
            spans.append((labels[jump[1]], end))
    innermost = [
        (start, end)
        for start, end in spans
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in spans)
    ]
    return [
        [found[1] for line in lines[start : end + 1] if (found := INSTRUCTION.match(line))] for start, end in innermost
    ]


def is_serialized(opcodes: list[str]) -> bool:
    """Whether each ``wgmma`` of a loop stands between a fence and a wait of its own."""
    products = sum(opcode.startswith("HGMMA") for opcode in opcodes)
    fences = sum(opcode.startswith("WARPGROUP") for opcode in opcodes)
    return products > 0 and fences >= 2 * products


def attention_case(dtype: torch.dtype, width: int, heads: int, kv_heads: int, softcap: float) -> None:
    """Compile forward and backward over a batch, then a step of decoding."""
    from lm.kernels import attention_triton, decoding_triton

    q, k, v = (torch.zeros(2, 128, count, width, dtype=dtype) for count in (heads, kv_heads, kv_heads))
    lo, hi = masks.causal(2, 128)
    out, lse = attention_triton.forward(q, k, v, lo, hi, 0.1, softcap)
    attention_triton.backward(out, q, k, v, out, lse, lo, hi, 0.1, softcap)
    cache = torch.zeros(2, 1024, kv_heads, width, dtype=dtype)
    lo, hi = masks.causal(2, 1, past=1023)
    decoding_triton.forward(q[:, :1], cache, cache, lo, hi, 0.1, softcap)


def cross_entropy_case(dtype: torch.dtype, softcap: float, needs_grad: bool) -> None:
    from lm.kernels import cross_entropy_triton

    logits, targets = torch.zeros(2, 32768, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    cross_entropy_triton.differentiate(logits, targets, torch.ones(2), softcap, 0.0, needs_grad)


def rotary_case(dtype: torch.dtype, width: int, normed: bool) -> None:
    from lm.kernels import rotary_triton

    x, table = torch.zeros(2, 128, 8, width, dtype=dtype), torch.zeros(2, 128, 1, width // 2)
    weight = torch.ones(width) if normed else None
    rotary_triton.forward(x, table, table, weight, 1e-6)
    rotary_triton.backward(x, x, table, table, weight, 1e-6)


def product_case(
    dtype: torch.dtype, outputs: int, activation: str, normed: bool, added: bool, result: torch.dtype
) -> None:
    """Compile a product of a decoding step, of 768 inputs."""
    from lm.kernels import decoding_step_triton

    x, weight = torch.zeros(4, 768, dtype=torch.float32 if normed else dtype), torch.zeros(outputs, 768, dtype=dtype)
    norm, residual = torch.ones(768) if normed else None, torch.zeros(4, outputs) if added else None
    decoding_step_triton.product(x, weight, norm, 1e-6, activation, residual, result)


def storing_case(dtype: torch.dtype, width: int, normed: bool) -> None:
    from lm.kernels import decoding_step_triton

    qkv, cache = torch.zeros(4, 12, width, dtype=dtype), torch.zeros(2, 4, 2, 1024, width, dtype=dtype)
    table, numbers = torch.zeros(4, 1, width // 2), torch.zeros(4, dtype=torch.int32)
    norms = (torch.ones(width), torch.ones(width)) if normed else None
    decoding_step_triton.rotate_and_store(qkv, table, table, numbers, numbers, cache, norms, 1e-6)


Case = tuple[str, Callable[..., None], tuple[Any, ...]]


def cases() -> list[Case]:
    """(name, function, arguments): every entry of the table, and every branch of a kernel once."""
    sizes: list[Case] = [
        (f"{name} {width}", attention_case, (dtype, width, 8, 8, 0.0))
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
        for width in (16, 32, 64, 128, 256)
    ]
    return [
        *sizes,
        ("float16 64", attention_case, (torch.float16, 64, 8, 8, 0.0)),
        ("bfloat16 80", attention_case, (torch.bfloat16, 80, 8, 8, 0.0)),
        ("bfloat16 64 grouped", attention_case, (torch.bfloat16, 64, 8, 2, 0.0)),
        ("bfloat16 64 softcap", attention_case, (torch.bfloat16, 64, 8, 8, 30.0)),
        ("bfloat16 128 softcap", attention_case, (torch.bfloat16, 128, 8, 8, 30.0)),
        ("bfloat16 loss", cross_entropy_case, (torch.bfloat16, 0.0, True)),
        ("bfloat16 loss softcap", cross_entropy_case, (torch.bfloat16, 30.0, True)),
        ("bfloat16 loss only", cross_entropy_case, (torch.bfloat16, 0.0, False)),
        ("float32 loss", cross_entropy_case, (torch.float32, 0.0, True)),
        ("bfloat16 64 plain", rotary_case, (torch.bfloat16, 64, False)),
        ("bfloat16 64 normed", rotary_case, (torch.bfloat16, 64, True)),
        ("bfloat16 256 normed", rotary_case, (torch.bfloat16, 256, True)),
        ("float32 64 normed", rotary_case, (torch.float32, 64, True)),
        ("bfloat16 product normed", product_case, (torch.bfloat16, 1536, "", True, False, torch.bfloat16)),
        ("bfloat16 product swiglu", product_case, (torch.bfloat16, 1536, "swiglu", True, False, torch.bfloat16)),
        ("bfloat16 product relu2", product_case, (torch.bfloat16, 1536, "relu2", True, False, torch.bfloat16)),
        ("bfloat16 product added", product_case, (torch.bfloat16, 1536, "", False, True, torch.bfloat16)),
        ("bfloat16 product head", product_case, (torch.bfloat16, 50304, "", True, False, torch.float32)),
        ("float32 product swiglu", product_case, (torch.float32, 1536, "swiglu", True, False, torch.float32)),
        ("float32 product added", product_case, (torch.float32, 1536, "", False, True, torch.float32)),
        ("bfloat16 64 stored", storing_case, (torch.bfloat16, 64, False)),
        ("bfloat16 64 stored normed", storing_case, (torch.bfloat16, 64, True)),
        ("bfloat16 80 stored normed", storing_case, (torch.bfloat16, 80, True)),
        ("float32 128 stored", storing_case, (torch.float32, 128, False)),
    ]


def compile_case(architecture: int, case: Case) -> dict[str, Compiled]:
    """The compiled kernels of a case by name, such as "sm_90 bfloat16 64 attention_forward"."""
    name, function, arguments = case
    with compiling_for(architecture) as made:
        function(*arguments)
    return {f"sm_{architecture} {name} {kernel}": inspect_kernel(compiled) for kernel, compiled in made}


def problems(result: dict[str, Compiled]) -> list[str]:
    """What violates the limits above, one sentence each."""
    found = []
    for name, compiled in result.items():
        architecture, dtype, width, *variant, kernel = name.split()
        limit = SHARED_MEMORY_BYTES[int(architecture.removeprefix("sm_"))]
        if compiled.shared_bytes > limit:
            found.append(f"{name} needs {compiled.shared_bytes:,} bytes of shared memory; a block has {limit:,}")
        if compiled.serialized:
            found.append(f"{name} waits for each product of the tensor cores in {compiled.serialized} loops")
        if kernel in MAIN_KERNELS and dtype != "float32" and int(width) in MAIN_WIDTHS and not variant:
            if compiled.spilled_bytes > MAY_SPILL.get((architecture, kernel), 0):
                found.append(f"{name} spills {compiled.spilled_bytes} bytes of registers")
            if not (compiled.wgmma if architecture == "sm_90" else compiled.mma):
                found.append(f"{name} does not use the tensor cores")
    return found


def changes(result: dict[str, Compiled], snapshot: dict[str, Any]) -> list[str]:
    """How the result differs from the snapshot of this version of Triton, one line each; none if it has none."""
    import triton

    if triton.__version__ not in snapshot["versions"]:
        return []
    before = {name: Compiled(*numbers) for name, numbers in snapshot["versions"][triton.__version__].items()}
    lines = [f"{name} is new" for name in sorted(result.keys() - before.keys())]
    lines += [f"{name} is gone" for name in sorted(before.keys() - result.keys())]
    for name in sorted(result.keys() & before.keys()):
        now, then = asdict(result[name]), asdict(before[name])
        lines += [f"{name}: {what} {then[what]} → {now[what]}" for what in now if now[what] != then[what]]
    return lines


def table(result: dict[str, Compiled]) -> str:
    width = max(map(len, result))
    titles = [f.name.replace("_", " ") for f in fields(Compiled)]
    lines = [f"{'':{width}}  " + "  ".join(titles)]
    for name, compiled in result.items():
        cells = (f"{value:>{len(title)},}" for value, title in zip(astuple(compiled), titles, strict=True))
        lines.append(f"{name:{width}}  " + "  ".join(cells))
    return "\n".join(lines)


def to_json(versions: dict[str, dict[str, list[int]]]) -> str:
    """The text of a snapshot: Triton's version → kernel → its numbers, one line per kernel, so that a change shows as
    one line. Of each minor version only the newest is kept."""
    newest = {version.rpartition(".")[0]: version for version in sorted(versions, key=lambda v: v.split("."))}
    parts = []
    for version in sorted(newest.values()):
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(n)}" for name, n in versions[version].items())
        parts.append(f"  {json.dumps(version)}: {{\n{lines}\n  }}")
    joined = ",\n".join(parts)
    columns = json.dumps([f.name for f in fields(Compiled)])
    return f'{{"columns": {columns},\n "versions": {{\n{joined}\n }}\n}}\n'


def compile_all(tasks: Iterable[tuple[int, Case]]) -> dict[str, Compiled]:
    """Compile cases, each for an architecture, in a process for each core."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return {name: made for part in pool.starmap(compile_case, tasks, chunksize=1) for name, made in part.items()}


def settle(result: dict[str, Compiled], wrong: list[str], snapshot: Path, *, update: bool, whole: bool) -> None:
    """Print the result and what is wrong with it, and update its version in the snapshot or compare with it.

    If the result is not the ``whole`` one, an update leaves the other kernels as they are, and nothing is compared.

    Raises:
        SystemExit: there are problems, or differences from the snapshot.
    """
    import triton

    click.echo(f"triton {triton.__version__}")
    click.echo(table(result))
    recorded = json.loads(snapshot.read_text(encoding="utf-8")) if snapshot.exists() else {"versions": {}}
    if update and not wrong:
        mine = {} if whole else recorded["versions"].get(triton.__version__, {})
        mine |= {name: list(astuple(compiled)) for name, compiled in result.items()}
        text = to_json(recorded["versions"] | {triton.__version__: mine})
        snapshot.write_text(text, encoding="utf-8", newline="\n")
    elif whole and not update:
        wrong = wrong + changes(result, recorded)
    for sentence in wrong:
        click.echo(sentence, err=True)
    if wrong:
        raise SystemExit("the kernels have problems or differ from the snapshot (see above); --update accepts changes")
    click.echo(f"{len(result)} kernels compiled")


@click.command()
@click.option("--update", is_flag=True, help="Write the result to the snapshot instead of comparing it.")
@click.option("--arch", "architectures", multiple=True, type=click.Choice([str(a) for a in SHARED_MEMORY_BYTES]))
@click.option("--only", default="", help="Only cases whose name begins with this; not compared.")
def main(update: bool, architectures: tuple[str, ...], only: str) -> None:
    """Compile every kernel for sm_80, sm_90 and sm_120, without a GPU."""
    if dispatch.interpreted():
        raise click.UsageError("unset TRITON_INTERPRET: the interpreter compiles no kernels")
    chosen = [case for case in cases() if case[0].startswith(only)]
    result = compile_all(itertools.product(map(int, architectures or ARCHITECTURES), chosen))
    settle(result, problems(result), SNAPSHOT, update=update, whole=not (only or architectures))


if __name__ == "__main__":
    main()
