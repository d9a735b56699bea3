from __future__ import annotations

import json
from dataclasses import astuple, replace

import pytest
import torch
import triton
import triton.language as tl
from click.testing import CliRunner

from lm.kernels import aot, attention_triton, masks
from lm.kernels.aot import Compiled

GOOD = Compiled(
    registers=128, spilled_bytes=0, shared_bytes=65536, warps=8, wgmma=24, mma=0, tma=0, loop=300, serialized=0
)
MAIN = "sm_90 bfloat16 64 attention_forward"


def snapshot_of(result: dict[str, Compiled]) -> dict:
    return json.loads(aot.to_json({triton.__version__: {name: list(astuple(c)) for name, c in result.items()}}))


@triton.jit
def doubled(X, N: tl.constexpr):  # noqa: N803
    i = tl.arange(0, N)
    tl.store(X + i, 2 * tl.load(X + i))


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_a_launch_compiles_for_an_absent_gpu(architecture):
    before = triton.runtime.driver._active
    x = torch.ones(64)
    with aot.compiling_for(architecture) as made:
        doubled[(1,)](x, 64)
    assert [name for name, _ in made] == ["doubled"]
    assert (x == 1).all()
    assert f"sm_{architecture}" in made[0][1].asm["ptx"]
    compiled = aot.inspect_kernel(made[0][1])
    assert compiled.registers > 0
    assert (compiled.spilled_bytes, compiled.wgmma, compiled.mma) == (0, 0, 0)
    assert triton.runtime.driver._active is before


def test_other_lengths_and_documents_compile_nothing_new():
    with aot.compiling_for(90) as made:
        for rows, queries, keys in ((2, 128, 128), (1, 1, 1), (3, 1000, 1000), (2, 999, 999), (5, 33, 80)):
            q, k = (torch.zeros(rows, length, 2, 16, dtype=torch.bfloat16) for length in (queries, keys))
            lo, hi = masks.causal(rows, queries, past=keys - queries)
            out, lse = attention_triton.forward(q, k, k, lo, hi, 0.25, 0.0)
            attention_triton.backward(out, q, k, k, out, lse, lo, hi, 0.25, 0.0)
    assert len(made) == 20
    assert len({id(kernel) for _, kernel in made}) == 4


def test_shared_memory_over_the_chips_limit_is_a_problem():
    assert aot.problems({MAIN: replace(GOOD, shared_bytes=300_000)}) == [
        f"{MAIN} needs 300,000 bytes of shared memory; a block has 232,448"
    ]


def test_main_kernels_must_not_spill_and_must_use_the_tensor_cores():
    assert aot.problems({MAIN: GOOD}) == []
    assert "spills 8 bytes" in aot.problems({MAIN: replace(GOOD, spilled_bytes=8)})[0]
    of_keys = MAIN.replace("forward", "key_gradient")
    assert aot.problems({of_keys: replace(GOOD, spilled_bytes=256)}) == []
    assert "spills 260 bytes" in aot.problems({of_keys: replace(GOOD, spilled_bytes=260)})[0]
    assert "does not use the tensor cores" in aot.problems({MAIN: replace(GOOD, wgmma=0, mma=64)})[0]
    on_ampere = MAIN.replace("sm_90", "sm_80")
    assert aot.problems({on_ampere: replace(GOOD, wgmma=0, mma=64)}) == []
    assert aot.problems({on_ampere: replace(GOOD, wgmma=0)}) != []
    for other in ("sm_90 float32 64 attention_forward", "sm_90 bfloat16 256 attention_forward", "sm_90 x loss row"):
        assert aot.problems({other: replace(GOOD, spilled_bytes=8, wgmma=0)}) == []


def test_changes_from_the_snapshot_are_listed_line_by_line():
    snapshot = snapshot_of({MAIN: GOOD, "sm_80 old kernel": GOOD})
    lines = aot.changes({MAIN: replace(GOOD, registers=200, wgmma=0), "sm_80 new kernel": GOOD}, snapshot)
    assert lines == [
        "sm_80 new kernel is new",
        "sm_80 old kernel is gone",
        f"{MAIN}: registers 128 → 200",
        f"{MAIN}: wgmma 24 → 0",
    ]
    assert aot.changes({}, {"versions": {"2.0.0": snapshot["versions"][triton.__version__]}}) == []


def test_the_snapshot_keeps_the_newest_of_each_minor_version():
    versions = {version: {MAIN: [version]} for version in ("3.7.1", "3.6.0", "3.7.0")}
    assert json.loads(aot.to_json(versions))["versions"] == {"3.6.0": {MAIN: ["3.6.0"]}, "3.7.1": {MAIN: ["3.7.1"]}}


def test_an_update_of_some_kernels_leaves_the_others(tmp_path):
    file, other = tmp_path / "aot.json", MAIN.replace("64", "128")
    aot.settle({MAIN: GOOD, other: GOOD}, [], file, update=True, whole=True)
    aot.settle({MAIN: replace(GOOD, loop=200)}, [], file, update=True, whole=False)
    recorded = json.loads(file.read_text())["versions"][triton.__version__]
    assert [Compiled(*recorded[name]).loop for name in (MAIN, other)] == [200, 300]
    with pytest.raises(SystemExit):
        aot.settle({MAIN: GOOD}, ["it spills"], file, update=True, whole=True)
    assert json.loads(file.read_text())["versions"][triton.__version__] == recorded


def disassembly(loop: list[str]) -> str:
    """Code like nvdisasm's: some instructions, a loop, and a return to the one around it, from where it waited."""
    body = ["S2R R0, SR_TID.X", ".L_x_9:", "FADD R1, R1, R2", ".L_x_1:", *loop, "@!P0 BRA `(.L_x_1)", "BRA `(.L_x_9)"]
    return "\n".join(
        line if line.startswith(".") else f"        /*{i:04x}*/    {line} ;" for i, line in enumerate(body)
    )


def test_the_hot_loop_is_the_innermost_with_products_and_serialized_ones_are_found():
    product = ["WARPGROUP.ARRIVE", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24", "HGMMA.64x64x16 R24, R24"]
    alone = ["WARPGROUP.ARRIVE", "HGMMA.64x64x16 R24, R24", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "@P1 FMUL R1, R1, R2"]
    for loop, serialized in (([*product, "FMUL R1, R1, R2"], False), (alone * 2, True)):
        (found,) = aot.tensor_loops(disassembly(loop))
        assert found == [line.removeprefix("@P1 ").split()[0] for line in loop] + ["BRA"]
        assert aot.is_serialized(found) == serialized
    assert aot.tensor_loops(disassembly(["FMUL R1, R1, R2"])) == []
    assert "waits for each product" in aot.problems({MAIN: replace(GOOD, serialized=1)})[0]


RECORDED = json.loads(aot.SNAPSHOT.read_text(encoding="utf-8"))["versions"]


def test_the_snapshot_names_every_case():
    for name, _, _ in aot.cases():
        for architecture in aot.ARCHITECTURES:
            case = f"sm_{architecture} {name}"
            assert any(kernel.rsplit(" ", 1)[0] == case for kernel in RECORDED[max(RECORDED)])


@pytest.mark.parametrize("version", RECORDED)
def test_the_snapshot_itself_has_no_problems(version):
    assert aot.problems({name: Compiled(*numbers) for name, numbers in RECORDED[version].items()}) == []


def test_the_command_prints_a_table_and_refuses_the_interpreter(monkeypatch):
    result = CliRunner().invoke(aot.main, ["--arch", "90", "--only", "bfloat16 loss only"])
    assert result.exit_code == 0, result.output
    assert "sm_90 bfloat16 loss only cross_entropy_row" in result.output
    assert "1 kernels compiled" in result.output
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = CliRunner().invoke(aot.main, [])
    assert result.exit_code == 2
    assert "unset TRITON_INTERPRET" in result.output
