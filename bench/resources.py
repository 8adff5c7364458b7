"""What each kernel costs a GPU, read from the compiled code: no GPU needed.

    python -m bench.resources [--arch sm_90 ...] [--kernel NAME ...] [--full] [--json FILE]

Compiles ahead of time what :mod:`bench.cases` and :mod:`bench.flow_cases` enumerate and prints
registers, spills, shared memory and the number of 128-bit global accesses among all. ``--full``
is a matter of hours: narrow it down.

The exit status is 1 where a case spills, needs too much shared or tensor memory, reads or writes
narrowly what could go 128 bits at a time, multiplies without matrix instructions, or does not
compile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from nicefast.kernels import INTERPRETED

from . import cases as elementwise
from . import flow_cases
from .cases import Case
from .flow_cases import FlowCase
from .launches import TARGETS, jit_function

KERNELS = elementwise.KERNELS + flow_cases.KERNELS
KIB = 1024
TENSOR_MEMORY_LIMIT = 512
SHARED_LIMIT = {
    "sm_80": 163 * KIB,
    **dict.fromkeys(("sm_86", "sm_89", "sm_120"), 99 * KIB),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103"), 227 * KIB),
    "gfx942": 64 * KIB,
}
SASS_EVERY = 16  # disassembling takes longer than compiling: every 16th case, and what spills


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a case; every count in ``spills`` should be 0."""

    registers: int = 0
    spills: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    tensor_memory: int = 0  # columns, of Blackwell's for matrix products
    loads: int = 0
    stores: int = 0
    wide_loads: int = 0
    wide_stores: int = 0
    products: dict[str, int] = field(default_factory=dict)  # matrix instructions by kind
    sass: dict[str, int] | None = None  # the four counts in machine code, where it was read
    instructions: int = 0  # of machine code, where it was read
    barriers: int = 0  # of a program's threads
    error: str = ""


def problems(case: Case, r: Resources) -> list[str]:
    """What is wrong with the compiled case, in words; empty where nothing is."""
    if r.error:
        return [f"does not compile: {r.error}"]
    found = []
    # AMD keeps spilled scalars in lanes of vector registers; what spills from those is scratch
    flow = isinstance(case, FlowCase)
    if any(n for k, n in r.spills.items() if not (flow and k == "sgpr")):
        found.append("spills: " + ", ".join(f"{k} = {v}" for k, v in r.spills.items()))
    if r.shared > SHARED_LIMIT[case.arch]:
        found.append(f"shared memory: {r.shared} B of {SHARED_LIMIT[case.arch]} B")
    if r.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"tensor memory: {r.tensor_memory} columns of {TENSOR_MEMORY_LIMIT}")
    for what in ("loads", "stores"):
        least, got = getattr(case, f"wide_{what}"), getattr(r, f"wide_{what}")
        if got < least:
            found.append(f"narrow {what}: {got} of 128 bits, at least {least} expected")
    if flow:
        got = sum(n for k, n in r.products.items() if k.startswith(case.instructions))
        if got < case.least_products:
            found.append(f"matrix instructions: {got}, at least {case.least_products} expected")
    # ptxas cuts a load of which it needs a part alone, as of biases beside which masks are constant
    if r.sass and (
        r.sass["wide_loads"] < min(case.wide_loads, r.wide_loads)
        or r.sass["wide_stores"] < r.wide_stores
    ):
        found.append(f"machine code narrower than its assembly: {r.sass}")
    return found


def compile_case(case: Case, disassemble: bool = False) -> Resources:
    """Compile ahead of time and read the result. A failure is reported, not raised."""
    attrs = {(i,): [list(pair) for pair in pairs] for i, pairs in case.attrs}
    source = ASTSource(
        jit_function(case.kernel), dict(case.signature), dict(case.constexprs), attrs
    )
    try:
        compiled = triton.compile(source, target=TARGETS[case.arch], options=dict(case.options))
    except Exception as e:  # whatever a compiler may raise
        return Resources(error=f"{type(e).__name__}: {e}")
    read = _read_amd if "amdgcn" in compiled.asm else _read_nvidia
    found = read(compiled.asm, compiled.metadata.shared, disassemble)
    return replace(found, tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0)


def _read_amd(asm: dict[str, str], shared: int, disassemble: bool) -> Resources:
    text = asm["amdgcn"]
    used = {k: int(v) for k, v in re.findall(r"\.(\w+_(?:count|size)):\s*(\d+)", text)}
    spills = {
        "vgpr": used["vgpr_spill_count"],
        "sgpr": used["sgpr_spill_count"],
        "scratch": used["private_segment_fixed_size"],
    }
    found = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", text)
    counts = _count((kind, size.endswith("dwordx4")) for kind, size in found)
    products = dict(Counter(re.findall(r"\bv_s?mfma\w*", text)))
    return Resources(
        used["vgpr_count"], spills, shared, **counts, products=products,
        instructions=len(re.findall(r"^\t[vs]_|^\t(?:ds|global|buffer|flat)_", text, re.MULTILINE)),
        barriers=len(re.findall(r"\bs_barrier\b", text)),
    )  # fmt: skip


def _read_nvidia(asm: dict[str, bytes], shared: int, disassemble: bool) -> Resources:
    kinds, sass = {"ld": "load", "st": "store", "LD": "load", "ST": "store"}, None
    instructions = 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _run("cuobjdump", "-res-usage", file.name))
        spills = {k: int(v) for k, v in usage}
        registers = spills.pop("REG")
        if disassemble or any(spills.values()):
            text = _run("nvdisasm", "-c", "-ndf", file.name)
            local = Counter(re.findall(r"\b(LDL|STL)\b", text))
            spills |= {"LDL": local["LDL"], "STL": local["STL"]}
            instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", text, re.MULTILINE))
            found = re.findall(r"\b(LD|ST)G\b([.\w]*)", text)
            sass = _count(
                (kinds[kind], bool(re.search(r"\.(128|256)\b", size))) for kind, size in found
            )
    # ptxas keeps the widths it is given, and its input is read at no cost
    found = re.findall(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[busf](\d+)\b", str(asm["ptx"]))
    counts = _count((kinds[k], int(vector or 1) * int(bits) >= 128) for k, vector, bits in found)
    kinds_of = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", str(asm["ptx"]))
    products = dict(Counter(kinds_of))
    return Resources(
        registers, spills, shared, **counts, products=products, sass=sass,
        instructions=instructions,
        barriers=len(re.findall(r"\b(?:bar|barrier)\.(?:cta\.)?sync\b", str(asm["ptx"]))),
    )  # fmt: skip


def _count(accesses: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    seen = Counter(accesses)
    return {
        "loads": seen["load", True] + seen["load", False],
        "stores": seen["store", True] + seen["store", False],
        "wide_loads": seen["load", True],
        "wide_stores": seen["store", True],
    }


def _run(tool: str, *arguments: str) -> str:
    command = [getattr(triton.knobs.nvidia, tool).path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_all(todo: list[Case], jobs: int = 2) -> Iterator[tuple[Case, Resources]]:
    """Compile in ``jobs`` processes, in order, saying on stderr how far it is."""
    start = time.monotonic()
    disassemble = [i % SASS_EVERY == 0 for i in range(len(todo))]
    # not fork: PyTorch has threads
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        results = pool.map(compile_case, todo, disassemble, chunksize=4)
        for done, (case, resources) in enumerate(zip(todo, results, strict=True), 1):
            if done % 100 == 0 or done == len(todo):
                elapsed = time.monotonic() - start
                print(f"{done} of {len(todo)} compiled, {elapsed:.0f} s", file=sys.stderr)
            yield case, resources


def all_cases(
    full: bool = False, archs: Iterable[str] = TARGETS, kernels: Iterable[str] = KERNELS
) -> list[Case]:
    """Those of :mod:`bench.cases` and of :mod:`bench.flow_cases`."""
    kernels = list(kernels)
    simple = [k for k in kernels if k in elementwise.KERNELS]
    flows = [k for k in kernels if k in flow_cases.KERNELS]
    return [
        *elementwise.cases(full, archs, simple),
        *flow_cases.flow_cases(full, archs, flows),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, known in (("arch", TARGETS), ("kernel", KERNELS)):
        parser.add_argument(
            f"--{name}", nargs="+", action="extend", choices=known, help="default: all"
        )
    parser.add_argument("--full", action="store_true", help="the full product: hours")
    parser.add_argument("--every", type=int, default=1, help="one case in so many (default 1)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--json", type=Path, help="also write names and resources to this file")
    options = parser.parse_args()
    if INTERPRETED:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    rows, bad = [], []
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        todo = all_cases(
            options.full, options.arch or list(TARGETS), options.kernel or list(KERNELS)
        )[:: options.every]
        print("regs spill shared  loads 128/all  stores 128/all  case")
        for case, r in compile_all(todo, options.jobs):
            print(
                f"{r.registers:4} {max(r.spills.values(), default=0):5} {r.shared:6}"
                f" {r.wide_loads:9}/{r.loads:<3} {r.wide_stores:11}/{r.stores:<3}  {case.name}"
            )
            rows.append((case, r))
            bad += [f"PROBLEM {case.name}: {problem}" for problem in problems(case, r)]
    if options.json:
        results = [{"name": case.name, **asdict(r)} for case, r in rows]
        options.json.write_text(json.dumps(results, indent=1))
    print(*bad, sep="\n")
    most = max((r.registers for _, r in rows), default=0)
    print(f"{len(rows)} cases, {len(bad)} problems, at most {most} registers")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
