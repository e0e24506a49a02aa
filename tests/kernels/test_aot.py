"""The Triton kernels compiled ahead of time, with no GPU: a covering subset here, everything by `make test-kernels`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from vwn_ref.kernels import aot

KEPT = Path(__file__).resolve().parents[2] / "figures" / "data" / "gpu" / "aot.json"


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A process of its own: these tests are interpreted, and interpreted kernels cannot be compiled. Its cache is its
    own too, so that everything is compiled and not found."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(folder, process) of `python -m vwn_ref.kernels.aot --covering`, which left aot.json there."""
    folder = tmp_path_factory.mktemp("aot")
    return folder, python(
        folder, "-m", "vwn_ref.kernels.aot", "--covering", "--jobs", "1", "--out", str(folder / "aot.json")
    )


def test_every_kernel_compiles_and_fits(compiled):
    folder, done = compiled
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((folder / "aot.json").read_text())["rows"]
    assert [aot.job_of(row) for row in rows] == sorted(aot.covering())
    assert {row["kernel"] for row in rows} == set(aot.KERNELS) and {row["target"] for row in rows} == set(aot.TARGETS)
    for row in rows:
        assert "error" not in row and 0 < row["registers"] <= 512, row
        assert row["kernel"] in aot.ONCE or row["shared"] > 0, row
        assert row["shared"] <= aot.TARGETS[row["target"]][1], row
        assert not aot.faults(row), row
        counted = row["target"] != "gfx942" and row["kernel"] not in aot.ONCE
        assert 100 < row["instructions"] < 20_000 if counted else "instructions" not in row, row
        assert aot.line(row) in done.stdout


def test_what_is_kept_is_not_compiled_again_unless_it_changed_and_spills_show(compiled):
    folder, done = compiled
    assert done.returncode == 0, done.stdout + done.stderr
    code = f"""
        import sys
        from pathlib import Path
        from vwn_ref.kernels import aot, launch
        path = Path({str(folder / "aot.json")!r})
        sys.argv = ["aot", "--covering", "--out", str(path)]
        assert aot.main() == 0
        sources = aot.code(launch.KERNELS["few_width"])
        assert any("FunctionDef(name='packed_size'" in t for t in sources)  # it is no kernel
        launch.tile = lambda *shape: launch.Tile(4, 128, 1)  # a tile too large for one warp
        job = aot.Job("depth", 4, 8, 1024, "fp32", "sm_90", dynamic=False)
        assert aot.digest(job) != aot.read(path).get(job, {{}}).get("digest")
        row = aot.compile_one(job)
        print("FAULT", aot.faults(row))
    """
    again = python(folder, "-c", textwrap.dedent(code))
    assert again.returncode == 0, again.stdout + again.stderr
    count = len(aot.covering())
    assert f"{count} configurations, {count} of them kept" in again.stdout
    assert "FAULT spilled = " in again.stdout and "must be 0 on sm_90" in again.stdout


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000fe20000000800 */
        /*0010*/                   MOV R2, R1 ;
        /*0020*/                   FADD R3, R2, R1 ;
        /*0030*/              @!P0 BRA 0x60 ;
        /*0040*/                   FADD R3, R3, R1 ;
        /*0050*/               @P1 BRA 0x40 ;
        /*0060*/                   MOV R4, R3 ;
        /*0070*/               @P2 BRA `(.L_x_0) 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_instructions_by_hand():
    # the inner loop is two instructions long; the outer one has seven, the inner one's first turn included
    assert aot.instructions(SASS, 5, "width_backward_kernel") == 7 + 4 * 2
    assert aot.instructions(SASS, 1, "weights_kernel") == aot.instructions(SASS, 1, "few_width_kernel") == 7
    # forward there is no loop over blocks: all ten, four more turns of the loop along d_b, and in each of its five
    # turns two more of the inner one
    assert aot.instructions(SASS, 5, "width_kernel", 3) == 10 + 4 * 7 + 5 * 2 * 2


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, ""),
        ({"spilled": 8, "m": 2, "n": 3}, "spilled = 8: must be 0 on sm_90"),
        ({"spilled": 8, "m": 2, "n": 3, "kernel": "step_backward"}, "spilled = 8: must be 0 on sm_90"),
        ({"spilled": 16, "m": 2, "n": 3, "kernel": "width_backward"}, "spilled = 16: must be ≤ 8 on sm_90"),
        ({"spilled": 8, "kernel": "weights"}, "spilled = 8: must be 0 on sm_90"),
        ({"spilled": 8, "dtype": "fp32"}, "spilled = 8: must be 0 on sm_90"),
        ({"spilled": 64}, ""),  # by tiles of bfloat16, which were chosen by time
        ({"spilled": 72}, "spilled = 72: must be ≤ 64 on sm_90"),
        ({"spilled": 216, "kernel": "step_backward"}, ""),
        ({"spilled": 224, "kernel": "step_backward"}, "spilled = 224: must be ≤ 216 on sm_90"),
        ({"spilled": 8, "m": 2, "n": 3, "shared": 0, "target": "sm_80"}, ""),
        ({"shared": 232_449}, "shared = 232449: must be ≤ 232448"),
        ({"shared": 65_537, "target": "gfx942"}, "shared = 65537: must be ≤ 65536"),
        ({"error": "CompilationError: at 3:4\nx"}, "CompilationError: at 3:4"),
    ],
    ids=str,
)
def test_what_counts_as_a_fault(change, fault):
    row = {"kernel": "step", "m": 4, "n": 8, "D": 1024, "dtype": "bf16", "target": "sm_90", "spilled": 0}
    row["shared"] = 232_448
    assert aot.faults(row | change) == fault


def test_the_kept_table_is_without_faults(monkeypatch):
    """It may hold a part of all, and rows of code that has changed since: `make test-kernels` compiles the rest."""
    monkeypatch.setattr(aot.launch, "INTERPRETED", False)  # then other kernels are launched than on a GPU
    rows = json.loads(KEPT.read_text())["rows"]
    kept = {aot.job_of(row) for row in rows}
    assert kept <= set(aot.everything())
    assert kept >= set(aot.matrix(shapes=((2, 3), (4, 8)), widths=(1024,), targets=("sm_90",)))
    assert [aot.line(row) for row in rows if aot.faults(row)] == []


def test_the_kept_table_of_an_older_triton():
    """No sums of 8 there; spills are small, and in backward kernels only, or where tiles were chosen by time."""
    kept = json.loads(KEPT.with_name("aot-triton-3.6.json").read_text())
    assert kept["triton"] == "3.6.0" and {(row["m"], row["n"]) for row in kept["rows"]} == set(aot.SHAPES)
    for row in kept["rows"]:
        fault = aot.faults(row | {"spilled": 0})
        assert not fault, aot.line(row)
        many = row["n"] > 4 and row["dtype"] == "bf16"  # as they were timed, with this Triton
        timed = {"width": 8, "depth": 128, "step": 128, "depth_backward": 104, "step_backward": 400}
        most = timed.get(row["kernel"], 0) if many else 0
        small = row["kernel"].endswith("backward") and row["spilled"] <= {"bf16": 80, "fp32": 240}[row["dtype"]]
        assert row["spilled"] <= most or small, aot.line(row)


def test_no_product_is_fused_with_the_addition_of_a_neighbours(tmp_path):
    """See `launch.projections_gradient_sizes`; of a walk for few slots nothing is fused."""
    code = """
        from unittest import mock
        import triton
        from vwn_ref.kernels import aot, launch
        walks = [aot.Job(name, 2, 4, 1024, "fp32", "sm_90") for name in ("width", "width_backward")]
        for job in (aot.Job("projections_gradient", 2, 3, 1024, "bf16", "sm_90"), *walks):
            with mock.patch.object(launch, "whole_rows", lambda *_, **__: 0):
                source, gpu, options, _ = aot.build(job)
            for given in (options, options | {"enable_fp_fusion": True}):
                cubin = triton.compile(source, target=gpu, options=given).asm["cubin"]
                print(job.kernel, "FFMA" in aot.cuobjdump(cubin, "-sass"))
    """
    done = python(tmp_path, "-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    names = ("projections_gradient", "width", "width_backward")
    assert done.stdout.splitlines() == [f"{name} {fused}" for name in names for fused in (False, True)]


@pytest.mark.skipif(not aot.launch.INTERPRETED, reason="nothing is interpreted here")
def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aot"])
    with pytest.raises(SystemExit, match="2"):
        aot.main()
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--shapes 4", "4: must be m,n such as 4,8"),
        ("--shapes 2,3 3,2", "3,2: must be m,n with 1 ≤ m ≤ n"),
        ("--shapes 0,3", "0,3: must be m,n with 1 ≤ m ≤ n"),
        ("--widths 512 0", "0: must be an integer ≥ 1"),
        ("--jobs -1", "-1: must be an integer ≥ 1"),
        ("--shapes 2,3 --widths 512 7", "D = 7: must be a multiple of m = 2; choose --widths"),
        ("--shapes 2,3 --kernels group_norm", "no kernel of these --kernels is launched for such a GHC"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(aot.launch, "INTERPRETED", False)
    monkeypatch.setattr(sys, "argv", ["aot", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        aot.main()
    assert message in capsys.readouterr().err
