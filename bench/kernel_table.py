"""What typical kernels need of a GPU before and after a change, read from the compiled code.

    python -m bench.kernel_table --json before.json
    python -m bench.kernel_table --before before.json

The second call prints a table in Markdown. Nothing is measured: a count of instructions is no time.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nicefast.kernels import INTERPRETED
from nicefast.kernels.flow_tile import FlowShape, flow_tile

from .cases import Case, simple_case
from .flow_cases import flow_case, resident_case, resident_tiles
from .launches import TARGETS
from .resources import Resources, compile_case

RESIDENT = (  # hidden units, precision
    (32, "bf16"), (64, "bf16"), (32, "tf32"),
)  # fmt: skip
FLOWS = (  # features, hidden units, precision, architectures
    (16, 64, "bf16", tuple(TARGETS)),
    (64, 64, "bf16", tuple(TARGETS)),
    (64, 128, "bf16", ("sm_80", "sm_90", "sm_100")),
    (16, 64, "tf32", ("sm_80", "sm_90")),
    (64, 128, "tf32", ("sm_90",)),
    (16, 64, "fp32", ("sm_80", "sm_90")),
)
ELEMENTWISE = {
    "scale_log_prob_fwd_kernel": {"prior": "logistic", "with_z": False, "partner": "same"},
    "enter_kernel": {"sides": "~alternating", "biases": "first", "scaled": False, "inverse": False},
    "leave_kernel": {
        "sides": "~alternating", "biases": "second", "outputs": "log_prob", "prior": "logistic",
        "inverse": False,
    },
}  # fmt: skip
FIELDS = ("registers", "shared", "instructions", "barriers")


def typical() -> Iterator[tuple[str, Case]]:
    """Each case with its name in the table."""
    for d, hidden, precision, archs in FLOWS:
        for arch in archs:
            shape = FlowShape(d, 0, (hidden,) * 2, 4, "relu", "logistic")
            tile = flow_tile(shape, precision, arch)
            assert not isinstance(tile, str), tile
            variant = {
                "activation": "relu", "prior": "logistic", "context": 0, "width": "full",
                "rows": 1_000_000, "layout": "dense", "outputs": "log_prob",
            }  # fmt: skip
            name = f"log_prob, {d} features, {hidden} units, {precision}, {arch}"
            yield name, flow_case("flow_fwd_kernel", arch, precision, tile, variant)
    for hidden, precision in RESIDENT:
        for arch in ("sm_80", "sm_90", "sm_100", "sm_120"):
            wanted = precision, hidden, 0
            tile = next(t for p, t in resident_tiles(arch) if (p, t.hidden, t.context) == wanted)
            variant = {
                "activation": "relu", "prior": "logistic", "width": "full", "rows": 1_000_000,
                "layout": "dense", "call": "log_prob", "sides": "half",
            }  # fmt: skip
            name = f"log_prob, weights on the chip, {2 * tile.half} features, {hidden} units, "
            case = resident_case("resident_kernel", arch, precision, tile, variant)
            yield f"{name}4 couplings, {precision}, {arch}", case
    for kernel, flags in ELEMENTWISE.items():
        for width in (64, 784):
            for arch in ("sm_80", "sm_90"):
                variant = flags | {"rows": 1_000_000, "layout": "dense"}
                name = f"{kernel.removesuffix('_kernel')}, {width} features, fp32, {arch}"
                yield name, simple_case(kernel, arch, "fp32", width, variant)


def cells(r: Resources) -> dict[str, int]:
    return {f: getattr(r, f) for f in FIELDS} | {"spills": max(r.spills.values(), default=0)}


def table(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> str:
    heads = (*FIELDS, "spills")
    lines = ["| kernel | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for name, new in after.items():
        old = before.get(name, new)
        shown = [str(new[h]) if old[h] == new[h] else f"{old[h]} → {new[h]}" for h in heads]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, help="figures that an earlier call wrote")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if INTERPRETED:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        found = {}
        for name, case in typical():
            resources = compile_case(case, disassemble=True)
            if resources.error:
                parser.error(f"{name}: {resources.error}")
            found[name] = cells(resources)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print(table(json.loads(options.before.read_text()) if options.before else {}, found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
