"""How long one GPU, eight and a thousand need at least to score rows: `python -m bench.fleet`.

    python -m bench.fleet [--features 64 --hidden 256 256 256 --couplings 4 --share 1.0]

Computed from shapes and published peak rates; nothing is measured, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from nicefast.roofline import DEVICES, PRECISIONS, Published

from .work import flow_work

GPUS = (1, 8, 1000)
ROWS = (10**9, 10**12)
_UNITS = (("days", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet", description=__doc__)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument(
        "--hidden", type=int, nargs="*", action="extend", help="default: 256 256 256"
    )
    parser.add_argument("--couplings", type=int, default=4)
    parser.add_argument("--context", type=int, default=0, help="features of the context")
    parser.add_argument("--share", type=float, default=1.0, help="of the roofline that is reached")
    options = parser.parse_args(argv)
    try:
        print(table(**{k: v for k, v in vars(options).items() if v is not None}))
    except ValueError as e:
        parser.error(str(e))
    return 0


def seconds(
    device: Published,
    precision: str,
    rows: int,
    gpus: int,
    features: int,
    hidden: Sequence[int],
    couplings: int,
    context: int = 0,
    share: float = 1.0,
    fed: bool = False,
) -> float:
    """At least so long do ``gpus`` devices score ``rows`` rows (log_prob), dealt out evenly.

    ``fed``: rows come from the host, each GPU over its own link, while others are scored; else
    they are in device memory. ``share`` of the ceiling, or of the link, is reached.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    each = -(-rows // gpus)
    work = flow_work(each, features, hidden, couplings, "log_prob", context)
    least = device.ceilings(precision).seconds(*work)
    if fed:  # log_prob goes back over the link's other direction, and is never more
        least = max(least, 4 * each * (features + context) / device.host)
    return least / share


def table(
    features: int = 64,
    hidden: Sequence[int] = (256, 256, 256),
    couplings: int = 4,
    context: int = 0,
    share: float = 1.0,
) -> str:
    """Markdown: the least time to score 10^9 and 10^12 rows, by device and precision of products,
    and under it what is assumed.

    ValueError for sizes of no flow, or a share that is not in (0, 1].
    """
    flow = (features, hidden, couplings, context, share)
    return "\n".join((*_tables(flow), *_assumptions(*flow)))


def _tables(flow: tuple[int, Sequence[int], int, int, float]) -> Iterator[str]:
    counts = [f"{gpus:,} GPU{'s' * (gpus > 1)}" for gpus in GPUS]
    columns = [f"{c}, {how}" for how in ("in memory", "fed over PCIe") for c in counts]
    for rows in ROWS:
        yield f"Least time to score {_power(rows)} rows:"
        yield ""
        yield "| " + " | ".join(("device", "products", *columns)) + " |"
        yield "| --- | --- |" + " ---: |" * len(columns)
        for name, device in DEVICES.items():
            for precision in PRECISIONS:
                cells = [
                    duration(seconds(device, precision, rows, gpus, *flow, fed=fed))
                    for fed in (False, True)
                    for gpus in GPUS
                ]
                yield "| " + " | ".join((name, precision, *cells)) + " |"
        yield ""


def _assumptions(
    features: int, hidden: Sequence[int], couplings: int, context: int, share: float
) -> Iterator[str]:
    row = flow_work(1, features, hidden, couplings, "log_prob", context).flops
    each = 4 * (features + context)
    widths = " x ".join(map(str, hidden)) or "none"
    plus = f", context {context}" if context else ""
    links = ", ".join(f"{name} {d.host / 1e9:g} GB/s" for name, d in DEVICES.items())
    largest = each * max(ROWS) / 1e12
    reached = "all" if share == 1 else f"{share:.3g}"
    yield (
        f"- The flow: D = {features}, hidden {widths}{plus}, {couplings} couplings: {row:,} "
        f"operations of products and {each} bytes in for each row, all rows float32."
    )
    yield (
        f"- A bound, not a promise: {reached} of the roofline is reached, the longer of products "
        "at the peak rate and bytes at the bandwidth of memory, both published, dense, without "
        "sparsity. Nothing here is measured. Activations never leave the chip; what is "
        "element-wise costs no time."
    )
    yield (
        "- tf32x3 is float32 made of three TF32 products; fp32 is float32 without matrix units "
        "(MI300X: its matrix units have the same rate)."
    )
    yield (
        f"- In memory: each row is in its GPU's memory when its turn comes, however it got there; "
        f"{_power(max(ROWS))} rows are {largest:g} TB in all."
    )
    yield (
        "- Fed over PCIe: each GPU reads its rows over 16 lanes of its own, while it scores "
        f"others, and the host keeps up: {links}, one direction, published."
    )
    yield (
        "- Rows are independent: they are dealt out evenly, GPUs exchange nothing, and each reads "
        "the weights once. Starting up is not counted."
    )


def duration(seconds: float) -> str:
    """Three digits in the unit that suits: ms, s, min, h or days.

    >>> from bench.fleet import duration
    >>> duration(0.0125), duration(90), duration(86_400)
    ('12.5 ms', '1.5 min', '1 day')
    """
    in_units = [(float(f"{seconds / size:.3g}"), unit) for unit, size in _UNITS]
    # the unit is chosen by what is shown: never 1000 ms
    value, unit = next((v for v in in_units if v[0] >= 1), in_units[-1])
    if unit == "days" and value == 1:
        unit = "day"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:g} {unit}"


def _power(rows: int) -> str:
    return f"10^{len(str(rows)) - 1}"


if __name__ == "__main__":
    sys.exit(main())
