"""The stored measurements as tables and pictures: `python -m bench report`.

Everything comes from the JSON lines, so that a report can be made again without measuring again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TypeVar

from nicefast.roofline import DEVICES, Ceilings

from . import fleet, records
from .naming import MINE, Names, distinct, is_flow, name_of, names_of, one_state, ordered, title
from .pictures import PICTURES, drawn
from .providers import FROZEN, OWN, Shape
from .records import Record, number
from .work import flow_work
from .workloads import DIRECTIONS, FLOWS

C = TypeVar("C")
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """One report for each device that the files speak of."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument(
        "paths", nargs="*", default=[RESULTS], help="files or folders of JSON lines"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="default: beside the input")
    options = parser.parse_args(argv)
    devices: dict[str, list[Record]] = {}
    beside: dict[str, Path] = {}
    try:
        for path in records.files(options.paths):
            for record in records.read([path]):
                devices.setdefault(record["device"], []).append(record)
                beside.setdefault(record["device"], path.parent)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for device, found in devices.items():
        slug = records.slug(device)
        if options.out:
            folder = options.out / slug if len(devices) > 1 else options.out
        else:
            folder = beside[device]
            folder = folder if folder.name == slug else folder / slug
        print(report(found, folder))
    return 0


def report(found: Sequence[Record], folder: str | Path) -> Path:
    """Write ``folder``/report.md and its pictures, and return the former.

    Args:
        found: measurements of one device.
        folder: made if need be; pictures of an earlier report are replaced or removed.
    """
    devices = list(dict.fromkeys(r["device"] for r in found))
    if len(devices) != 1:
        raise ValueError(f"a report is of one device, got {len(devices)}: {'; '.join(devices)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = list(records.groups(found).values())
    newest = [record for group in groups for record in group]
    names = names_of(newest)
    lines = [f"# Benchmark: {devices[0]}", "", *_header(newest)]
    lines += ["", f"## {MINE} and the best other", "", *headline(newest)]
    lines += ["", *without_compile(newest)]
    lines += ["", *across(newest)]
    lines += ["", *small_batches(newest)]
    lines += ["", *_summary(groups, names)]
    lines += ["", "## At least so long", "", *_bounds(newest)]
    pictures = [
        f"![{caption}]({name})\n\n{caption}"
        for name, (draw, caption) in PICTURES.items()
        if drawn(draw, newest, names, folder / name)
    ]
    if pictures:
        lines += ["", "## Pictures", "", "\n\n".join(pictures)]
    lines += ["", "## All measurements", "", *NOTES]
    for group in groups:
        lines += ["", *_table(group)]
    lines += ["", "## What one GPU, eight and 1,000 need to score 10^9 and 10^12 rows", ""]
    lines += [fleet.table()]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def headline(newest: Sequence[Record]) -> Iterator[str]:
    """Whole flows at their own batch sizes: how many times faster than the fastest other."""
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for flow, r in _whole_flows(newest):
        ratio = number(r, "to_best_other") if r["provider"] == MINE else None
        if ratio is not None:
            own = cells.setdefault(flow.title, {})
            own.setdefault((r["precision"], r["direction"]), f"{ratio:.2f} ({r['best_other']})")
    columns = [(p, d) for p in ("float32", "tf32", "bf16") for d in DIRECTIONS]
    yield from _by_flow(cells, {c: f"{c[1]}, {c[0]}" for c in columns})


def across(newest: Sequence[Record]) -> Iterator[str]:
    """Whole flows with bfloat16 operands, beside the fastest other in float32: what both the
    precision and the library are good for."""
    others = {r["provider"] for r in newest} - set(OWN)
    yield from _beside(newest, "bf16", others, DIRECTIONS, "{}, bf16 / others in float32")


def without_compile(newest: Sequence[Record]) -> Iterator[str]:
    """Whole flows in float32 beside the fastest that needs no C++ compiler, where one did."""
    others = {r["provider"] for r in newest} - set(OWN)
    compiled = {name for name in others if name.startswith("compile")}
    timed = {r["direction"] for r in newest if r["provider"] in compiled and records.is_timed(r)}
    directions = [d for d in DIRECTIONS if d in timed]
    heading = "{}, float32, without torch.compile"
    yield from _beside(newest, "float32", others - compiled, directions, heading)


def small_batches(newest: Sequence[Record]) -> Iterator[str]:
    """Inference of small batches: an ordinary call and a frozen flow, beside the fastest other."""
    ratios: dict[tuple[str, str], dict[str, str]] = {}
    for r in one_state(newest):
        ratio = number(r, "to_best_other")
        if r["case"] in FLOWS and r["provider"] in OWN and ratio is not None:
            key = r.get("title") or r["case"], f"{r['direction']}, {r['precision']}"
            ratios.setdefault(key, {})[r["provider"]] = f"{ratio:.2f}"
    cells: dict[str, dict[str, str]] = {}
    for (flow, call), found in ratios.items():
        if FROZEN in found:
            cells.setdefault(flow, {})[call] = f"{found.get(MINE, '-')} / {found[FROZEN]}"
    calls = dict.fromkeys(call for own in cells.values() for call in own)
    yield from _by_flow(cells, {call: f"{call}: call / frozen" for call in calls})


def _beside(
    newest: Sequence[Record],
    precision: str,
    others: Set[str],
    directions: Sequence[str],
    heading: str,
) -> Iterator[str]:
    """Whole flows in ``precision``, beside the fastest of ``others`` in float32."""
    mine: dict[tuple[str, str], float] = {}
    fastest: dict[tuple[str, str], tuple[float, str]] = {}
    for flow, r in _whole_flows(filter(records.is_timed, newest)):
        if r["direction"] not in directions:
            continue
        key, found = (flow.title, r["direction"]), (r["median"], r["provider"])
        if r["provider"] == MINE and r["precision"] == precision:
            mine[key] = r["median"]
        elif r["provider"] in others and r["precision"] == "float32":
            fastest[key] = min(fastest.get(key, found), found)
    cells: dict[str, dict[str, str]] = {}
    for flow, direction in mine.keys() & fastest.keys():
        seconds, provider = fastest[flow, direction]
        ratio = seconds / mine[flow, direction]
        cells.setdefault(flow, {})[direction] = f"{ratio:.2f} ({provider})"
    order = [title for title in dict.fromkeys(f.title for f in FLOWS.values()) if title in cells]
    yield from _by_flow(
        {title: cells[title] for title in order}, {d: heading.format(d) for d in directions}
    )


def _whole_flows(newest: Iterable[Record]) -> Iterator[tuple[Shape, Record]]:
    """Measurements of whole flows at their own batch sizes."""
    for r in one_state(newest):
        flow = FLOWS.get(r["case"])
        if flow is not None and (r["rows"], r["features"]) == (flow.rows, flow.features):
            yield flow, r


def _by_flow(cells: Mapping[str, Mapping[C, str]], columns: Mapping[C, str]) -> Iterator[str]:
    """A table with a row for each flow; columns that have nothing are left out."""
    used = [c for c in columns if any(c in own for own in cells.values())]
    if used:
        yield from _markdown(
            ["", *(columns[c] for c in used)],
            ([flow, *(own.get(c, "") for c in used)] for flow, own in cells.items()),
        )


def _bounds(newest: Sequence[Record]) -> Iterator[str]:
    """The least time of whole flows: here by measured ceilings, on named devices by published."""
    yield (
        "Milliseconds in which no implementation does the products, or moves the least bytes, of "
        "one call (nicefast.roofline): on this device by the ceilings measured in the same run, "
        "on others by published rates, float32 as three TF32 products / bf16."
    )
    yield ""
    rows: dict[tuple[str, str], list[str]] = {}
    for flow, r in _whole_flows(newest):
        found = r.get("ceilings")
        if not found or r["precision"] != "float32" or r["provider"] != MINE:
            continue
        work = flow_work(flow.rows, flow.features, flow.hidden, flow.couplings, r["direction"])
        cells = [f"{Ceilings(**found).seconds(*work) * 1e3:.3g}"]
        for device in DEVICES.values():
            both = (device.ceilings(kind).seconds(*work) * 1e3 for kind in ("tf32x3", "bf16"))
            cells.append(" / ".join(f"{ms:.3g}" for ms in both))
        rows[flow.title, r["direction"]] = cells
    yield from _markdown(
        ["flow", "call", "here, float32", *DEVICES],
        ([*key, *cells] for key, cells in rows.items()),
        left=2,
    )


NOTES = (
    "- ms: median of the rounds; 20-80 %: quantiles of the rounds. TFLOP/s counts matrix products, "
    "GB/s the least traffic to and from memory.",
    "- of ceiling: the least time that the measured ceilings allow, divided by the median.",
    "- x best other: median of the fastest other provider divided by this one's. Above 1, this one "
    "is faster.",
    "- launches: of kernels in a call, on a CPU the operators that PyTorch is asked for; faults: "
    "minor page faults of a call.",
    "- launches alone: what a call launches on a GPU, replayed as a CUDA graph; ms has the host's "
    "time in it, too.",
    "- error: largest difference from float64.",
)


def _header(newest: Sequence[Record]) -> Iterator[str]:
    runs = [r["run"] for r in newest if isinstance(r.get("run"), dict)]
    commits = distinct(
        f"`{str(run['commit'])[:12]}`"
        + (" with uncommitted changes" if run.get("uncommitted_changes") else "")
        for run in runs
        if run.get("commit")
    )
    dates = sorted(filter(None, map(records.date, newest)))
    versions = distinct(
        ", ".join(f"{k} {v}" for k, v in (run.get("versions") or {}).items()) for run in runs
    )
    threads = distinct(str(run["threads"]) for run in runs if run.get("threads"))
    yield from (
        f"- {what}: {text}"
        for what, text in (
            ("commit", "; ".join(commits)),
            ("date", " to ".join(distinct([dates[0], dates[-1]])) if dates else ""),
            ("threads", "; ".join(threads)),
            ("versions", "; ".join(versions)),
            ("allocator", ", ".join(distinct(r.get("allocator") or "" for r in newest))),
            ("timer", ", ".join(distinct(r.get("timer") or "" for r in newest))),
        )
        if text
    )
    for precision, ceilings in records.ceilings(newest).items():
        flops = _range([c["flops"] / 1e12 for c in ceilings])
        rate = _range([c["bytes"] / 1e9 for c in ceilings])
        yield f"- measured ceilings, {precision}: {flops} TFLOP/s, {rate} GB/s"


def _range(values: Sequence[float]) -> str:
    return " to ".join(distinct(f"{v:.3g}" for v in (min(values), max(values))))


def _summary(groups: Iterable[Sequence[Record]], names: Names) -> Iterator[str]:
    """A row for each case, a column for each state of the allocator, both wins and losses."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    ratios: list[float] = []
    for group in groups:
        mine = next((r for r in group if r["provider"] == MINE), None)
        if mine is None:
            continue
        key = (name_of(mine, names), str(mine.get("direction")), str(mine.get("precision")))
        ratio = number(mine, "to_best_other")
        if not records.is_timed(mine):
            cell = _one_line(mine["status"])
        elif ratio is None:
            cell = "no other timed in this run"
        else:
            ratios.append(ratio)
            cell = f"{ratio:.2f} ({_one_line(mine.get('best_other') or '?')})"
            cell = f"**{cell}, slower**" if ratio < 1 else cell
        rows.setdefault(key, {})[str(mine.get("allocator") or "")] = cell
    if not rows:
        yield f"{MINE} was not measured."
        return
    slower = sum(ratio < 1 for ratio in ratios)
    yield (
        "Median of the fastest other provider divided by nicefast's; below 1, nicefast is slower. "
        f"Of {len(ratios)} comparisons, it is slower in {slower}."
    )
    yield ""
    states = ordered(state for cells in rows.values() for state in cells)
    # a GPU has one state, without a name
    yield from _markdown(
        ["case", "direction", "precision", *(s or "x best other" for s in states)],
        ([*key, *(cells.get(s, "-") for s in states)] for key, cells in rows.items()),
        left=3,
    )


def _table(group: Sequence[Record]) -> Iterator[str]:
    first = group[0]
    kind = [first.get("direction"), first.get("precision"), first.get("allocator")]
    yield f"### {title(first)}; {', '.join(str(k) for k in kind if k)}"
    yield ""
    rate, unit = ("flops_per_s", "TFLOP/s") if is_flow(first) else ("bytes_per_s", "GB/s")
    scale = 1e12 if unit == "TFLOP/s" else 1e9
    timed = [r for r in group if records.is_timed(r)]
    if timed:
        header = ["provider", "ms", "20-80 %", "rows/s", unit, "of ceiling", "x best other"]
        header += ["launches", "faults", "peak MiB", "error", "mode"]
        rows = [_row(r, rate, scale) for r in timed]
        if any("bare" in r for r in timed):
            header.append("launches alone, ms")
            for row, r in zip(rows, timed, strict=True):
                alone = number(r, "bare")
                row.append("-" if alone is None else f"{alone * 1e3:.4g}")
        yield from _markdown(header, rows)
        yield ""
    for record in group:
        if record not in timed:
            status = "no time stored" if record["status"] == "timed" else record["status"]
            yield f"- {record['provider']}: {_one_line(status)}"
    dates = {records.date(r) for r in group}
    if older := [r["provider"] for r in group if records.date(r) < max(dates)]:
        yield f"- measured in an earlier run than the others: {', '.join(older)}"


def _row(record: Record, rate: str, scale: float) -> list[str]:
    def show(field: str, form: str, factor: float = 1.0) -> str:
        value = number(record, field)
        return "-" if value is None else format(value * factor, form)

    low, high = show("low", ".4g", 1e3), show("high", ".4g", 1e3)
    name = record["provider"]
    return [
        f"**{name}**" if name == MINE else name,
        show("median", ".4g", 1e3),
        "-" if "-" in (low, high) else f"{low}-{high}",
        show("rows_per_s", ",.0f"),
        show(rate, ".3g", 1 / scale),
        show("share", ".0%"),
        show("to_best_other", ".2f"),
        show("launches", ",.0f"),
        show("faults", ",.0f"),
        show("peak_bytes", ",.1f", 2**-20),
        show("error", ".1e"),
        str(record.get("mode") or "-"),
    ]


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Iterator[str]:
    yield _line(header)
    yield _line(["---" if i < left else "---:" for i in range(len(header))])
    yield from map(_line, rows)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _one_line(text: str) -> str:
    return " ".join(text.split())
