"""Every kernel, tile, dtype and architecture, compiled ahead of time: no GPU needed.

Compiling has to happen outside the interpreter, so it runs in a process of its own. All cases take
a quarter of an hour: without --all, one in EVERY is compiled.
"""

import dataclasses
import fcntl
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, whose compiler this is about")

from bench.cases import (
    DENSE_ALONE,
    KERNELS,
    NARROW_LAYOUTS,
    VARIANTS,
    WIDE_LAYOUTS,
    cases,
    dtypes_of,
)
from bench.flow_cases import KERNELS as FLOW_KERNELS
from bench.flow_cases import VARIANTS as FLOW_VARIANTS
from bench.flow_cases import flow_cases
from bench.launches import DTYPES, LEVELS, TARGETS, output
from bench.resources import Resources, problems

ROOT = Path(__file__).parent.parent
CASES = {case.name: case for case in cases()}
FLOWS = {case.name: case for case in flow_cases()}
ALL = CASES | FLOWS
EVERY = 73
# of what comes out: of levels, float32
ITEMSIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8} | dict.fromkeys(LEVELS, 4)


@pytest.fixture(scope="module")
def every(request):
    return 1 if request.config.getoption("--all") else EVERY


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, every):
    """What the compiler made of the cases, by name: computed once, whichever worker is first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    file = folder / "resources.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
            run = subprocess.run(
                [sys.executable, "-m", "bench.resources", "--json", str(file),
                 "--every", str(every)],
                cwd=ROOT, env=env, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert file.exists(), run.stderr
    return {r.pop("name"): Resources(**r) for r in json.loads(file.read_text())}


def failures(compiled, about):
    return [f"{n}: {p}" for n, r in compiled.items() for p in problems(ALL[n], r) if about in p]


def test_everything_compiles(compiled, every):
    assert list(compiled) == list(ALL)[::every]
    assert {ALL[name].arch for name in compiled} == set(TARGETS)
    assert not failures(compiled, "does not compile")


def test_nothing_spills(compiled):
    assert not failures(compiled, "spills")


def test_shared_memory_suffices(compiled):
    assert not failures(compiled, "shared memory")


def test_every_launch_says_whether_products_and_sums_are_fused():
    """What happens unsaid depends on the version of Triton."""
    fused = {c.kernel: dict(c.options).get("enable_fp_fusion") for c in ALL.values()}
    assert fused == {k: k != "dequantise_kernel" for k in (*KERNELS, *FLOW_KERNELS)}


def test_tensor_memory_suffices(compiled):
    assert not failures(compiled, "tensor memory")


@pytest.mark.long
def test_tensor_memory_is_counted(compiled):
    assert any(r.tensor_memory for r in compiled.values())


def test_global_accesses_are_128_bits_wide(compiled):
    assert not failures(compiled, "narrow")


def test_machine_code_is_as_wide_as_its_assembly(compiled, every):
    read = [r for r in compiled.values() if r.sass]
    assert len(read) >= 40 // every
    assert not failures(compiled, "machine code")


@pytest.mark.long
def test_a_narrow_kernel_is_seen_to_be_narrow(compiled):
    """Odd rows cannot be accessed 128 bits at a time: a counter that says so counts something."""
    odd = [n for n, c in CASES.items() if c.kernel == "couple_kernel" and c.width % 2]
    assert len({CASES[n].arch for n in odd}) == len(TARGETS)
    assert all(compiled[n].wide_stores == 0 < compiled[n].stores for n in odd)


def test_cases_cover_every_tile_dtype_and_architecture(monkeypatch):
    from nicefast.kernels.tile import tile

    tiles = set()
    for warp_size in (32, 64):
        archs = [arch for arch, target in TARGETS.items() if target.warp_size == warp_size]
        monkeypatch.setattr("nicefast.kernels.tile.WARP_SIZE", warp_size)
        tiles |= {
            (arch, dtype, tile(width, itemsize))
            for arch in archs
            for dtype, itemsize in ITEMSIZES.items()
            for width in range(2, 100_001)
        }
    assert {t.columns for *_, t in tiles} == {2**i for i in range(1, 11)}
    wanted = {
        (kernel, arch, dtype, t)
        for kernel in KERNELS
        for arch, dtype, t in tiles
        if dtype in dtypes_of(kernel)
        # noise comes four features at a time
        if kernel not in {"sample_fwd_kernel", "dequantise_kernel"} or t.columns >= 4
    }
    assert {(c.kernel, c.arch, c.dtype, c.tile) for c in CASES.values()} == wanted


def test_doubles_are_accumulated_in_double_and_the_rest_in_single_precision():
    for c in CASES.values():
        if c.kernel == "dequantise_kernel" or dtypes_of(c.kernel).keys() == {"fp32"}:
            continue  # to float32, always
        double = c.dtype == "fp64" or (c.kernel.startswith("scale") and "partner=fp64" in c.name)
        assert str(dict(c.constexprs)["ACC"]) == ("fp64" if double else "fp32")


@pytest.mark.parametrize("kernel", KERNELS)
def test_cases_cover_every_variant_on_every_architecture(kernel):
    wanted = {(flag, v) for flag, values in VARIANTS[kernel].items() for v in values}
    if kernel not in DENSE_ALONE:
        wanted |= {("layout", v) for v in WIDE_LAYOUTS + NARROW_LAYOUTS}
    if kernel == "couple_inplace_kernel":
        wanted.remove(("layout", "expanded"))  # an expanded tensor is not written in place
    for arch in TARGETS:
        of_kernel = [c for c in CASES.values() if (c.kernel, c.arch) == (kernel, arch)]
        assert wanted <= {pair for c in of_kernel for pair in c.variant}
        steps = {dict(c.constexprs).get("STEP") for c in of_kernel}
        assert steps == ({0, 1, 2} if "side" in VARIANTS[kernel] else {None})


def test_every_kernel_in_the_package_is_checked():
    from nicefast.kernels import (
        coupling,
        dequantise,
        flow,
        flow_resident,
        likelihood,
        sampling,
        sides,
    )

    modules = (coupling, likelihood, sampling, dequantise, flow, flow_resident, sides)
    kernels = {name for m in modules for name in vars(m) if name.endswith("_kernel")}
    assert kernels == {*KERNELS, *FLOW_KERNELS}


def test_width_is_asked_of_every_tile_that_can_have_it():
    asked = {}
    for c in CASES.values():
        # halves in memory are aligned in few cases: one of any architecture will do
        arch = None if c.kernel in {"enter_kernel", "leave_kernel"} else c.arch
        key = (c.kernel, arch, c.dtype, c.tile)
        loads, stores = asked.get(key, (0, 0))
        asked[key] = max(loads, c.wide_loads), max(stores, c.wide_stores)
    for (kernel, _, dtype, t), (loads, stores) in asked.items():
        wide = t.columns * output((DTYPES | LEVELS)[dtype]).itemsize >= 16
        if kernel in {"couple_kernel", "scale_log_prob_bwd_kernel", "add_kernel"}:
            assert (loads > 0) == (stores > 0) == wide
        elif kernel in {"scale_log_prob_fwd_kernel", "sample_bwd_kernel", "leave_kernel"}:
            assert (loads > 0) == wide
        elif kernel in {"sample_fwd_kernel", "dequantise_kernel"}:
            assert (stores > 0) == wide
        elif kernel == "enter_kernel":
            # of four features, an alternating side has two: 8 bytes
            assert (stores > 0) == wide or t.columns == 4


def test_the_check_can_fail():
    case = next(c for c in CASES.values() if c.wide_loads and c.wide_stores and c.arch == "sm_80")
    good = Resources(
        registers=64, spills={"STACK": 0, "LOCAL": 0}, shared=163 * 1024, loads=case.wide_loads,
        stores=case.wide_stores, wide_loads=case.wide_loads, wide_stores=case.wide_stores,
    )  # fmt: skip
    assert not problems(case, good)
    for doctored, said in (
        ({"spills": {"STACK": 8, "LOCAL": 0}}, "spills: STACK = 8"),
        ({"shared": 163 * 1024 + 1}, "shared memory"),
        ({"wide_loads": 0}, "narrow loads"),
        ({"wide_stores": case.wide_stores - 1}, "narrow stores"),
        ({"sass": {"wide_loads": 0, "wide_stores": 0}}, "machine code"),
        ({"error": "CompilationError"}, "does not compile"),
    ):
        (problem,) = problems(case, dataclasses.replace(good, **doctored))
        assert said in problem


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120"])
def test_small_chips_have_99_kilobytes_of_shared_memory(arch):
    case = next(c for c in CASES.values() if c.arch == arch)
    good = Resources(loads=999, stores=999, wide_loads=999, wide_stores=999, shared=99 * 1024)
    assert not problems(case, good)
    (problem,) = problems(case, dataclasses.replace(good, shared=99 * 1024 + 1))
    assert problem == f"shared memory: {99 * 1024 + 1} B of {99 * 1024} B"


def test_matrix_instructions_do_the_products(compiled):
    assert not failures(compiled, "matrix instructions")


def test_flow_cases_cover_every_tile_of_every_architecture():
    from nicefast.kernels.flow_tile import ARCHS, PRECISIONS, FlowShape, flow_tile

    assert set(ARCHS) == set(TARGETS)
    wanted = set()
    for arch in ARCHS:
        for precision in PRECISIONS:
            for d in range(2, 129):
                for hidden in (*range(1, 257, 5), 16, 32, 64, 128, 256):
                    shape = FlowShape(d, 0, (3, hidden), 5, "relu", "normal")
                    tile = flow_tile(shape, precision, arch)
                    if not isinstance(tile, str):
                        wanted.add((arch, precision, tile))
    assert len(wanted) > 100
    cases = [c for c in FLOWS.values() if c.kernel != "resident_kernel"]
    assert {(c.arch, c.dtype, c.flow) for c in cases} == wanted


def test_flow_cases_cover_every_tile_whose_weights_stay_on_the_chip():
    from bench.flow_cases import resident_shape
    from nicefast.kernels.flow_tile import PRECISIONS, ResidentTile, flow_tile

    wanted = set()
    for arch, precision in itertools.product(TARGETS, PRECISIONS):
        for d, c, h in itertools.product(range(2, 100, 7), (0, 1, 16, 17), range(1, 257, 15)):
            for couplings in (1, 4, 5):
                shape = resident_shape(d, c, h, couplings, "tanh", "normal", "alternating")
                tile = flow_tile(shape, precision, arch)
                if isinstance(tile, ResidentTile):
                    assert couplings < 5
                    wanted.add((arch, precision, tile))
    assert len(wanted) > 40
    cases = [c for c in FLOWS.values() if c.kernel == "resident_kernel"]
    assert {(c.arch, c.dtype, c.flow) for c in cases} == wanted


@pytest.mark.parametrize("kernel", FLOW_KERNELS)
def test_flow_cases_cover_every_variant_and_precision(kernel):
    of_kernel = [c for c in FLOWS.values() if c.kernel == kernel]
    variants = {pair for c in of_kernel for pair in c.variant}
    assert variants == {(flag, v) for flag, vs in FLOW_VARIANTS[kernel].items() for v in vs}
    for arch in {c.arch for c in of_kernel}:
        assert len({c.dtype for c in of_kernel if c.arch == arch}) >= 2
        assert len({c.flow for c in of_kernel if c.arch == arch}) >= 5


def test_the_check_of_flows_can_fail():
    case = next(c for c in FLOWS.values() if c.arch == "sm_90" and c.dtype == "bf16")
    good = Resources(
        registers=255, spills={"STACK": 0, "LOCAL": 0}, shared=227 * 1024,
        products={"wgmma.mma_async": case.least_products}, loads=1000, stores=1000,
        wide_loads=1000, wide_stores=1000,
    )  # fmt: skip
    assert not problems(case, good)
    for doctored, said in (
        ({"products": {}}, "matrix instructions: 0"),
        ({"products": {"mma.sync": 100}}, "matrix instructions: 0"),
        ({"spills": {"STACK": 8, "LOCAL": 0}}, "spills: STACK = 8"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"tensor_memory": 513}, "tensor memory"),
    ):
        (problem,) = problems(case, dataclasses.replace(good, **doctored))
        assert said in problem


def test_a_tile_that_is_too_large_is_seen_to_spill():
    """What the tile function refuses does spill: the compiler is asked, in a process of its own."""
    program = """
from bench.flow_cases import flow_case
from bench.resources import compile_case, problems
from nicefast.kernels.flow_tile import FlowTile
tile = FlowTile(128, 4, 1, 128, 256, "bf16", 255, False, True)
variant = dict(activation="relu", prior="logistic", context=0, width="full", rows=1000,
               layout="ragged", outputs="both")
case = flow_case("flow_fwd_kernel", "sm_90", "bf16", tile, variant)
print(problems(case, compile_case(case)))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "spills: STACK" in run.stdout, run.stderr
