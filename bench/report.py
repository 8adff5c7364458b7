"""The stored measurements as tables and pictures: `python -m bench report`.

Everything comes from the JSON lines, so that a report can be made again without measuring again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nicefast.plots import ACCENT, INK, LINES, MUTED, SOFT

from . import records
from .records import Record, number

RESULTS = Path(__file__).parent / "results"
MINE = "nicefast"
STATES = ("no-faults", "null", "default")  # where one of an allocator's states is to be drawn
COLOURS = ("#b44d12", "#4d7c3a", "#8d6a9f", "#c9952b", "#2a9d8f", "#d1495b", "#7b8794", "#3d405b")
MARKERS = "osD^vP*X<>ph"
SIZES: dict[str, Callable[[Any], str]] = {
    "rows": lambda n: f"{n:,} rows",
    "features": lambda n: f"D={n}",
    "hidden": lambda h: f"hidden {records.widths(h)}" if h else "no hidden layer",
    "couplings": lambda n: f"{n} couplings",
}
Names = dict[str, str]  # a measurement's case as text -> what it is called in tables and pictures


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
    names = _names(newest)
    lines = [f"# Benchmark: {devices[0]}", "", *_header(newest)]
    lines += ["", f"## {MINE} and the best other", "", *_summary(groups, names)]
    pictures = [
        f"![{caption}]({name})\n\n{caption}"
        for name, (draw, caption) in PICTURES.items()
        if _drawn(draw, newest, names, folder / name)
    ]
    if pictures:
        lines += ["", "## Pictures", "", "\n\n".join(pictures)]
    lines += ["", "## All measurements", "", *NOTES]
    for group in groups:
        lines += ["", *_table(group)]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


NOTES = (
    "- ms: median of the rounds; 20-80 %: quantiles of the rounds. TFLOP/s counts matrix products, "
    "GB/s the least traffic to and from memory.",
    "- of ceiling: the least time that the measured ceilings allow, divided by the median.",
    "- x best other: median of the fastest other provider divided by this one's. Above 1, this one "
    "is faster.",
    "- launches: kernel launches of a call; faults: minor page faults of a call.",
    "- error: largest difference from float64.",
)


def _header(newest: Sequence[Record]) -> Iterator[str]:
    runs = [r["run"] for r in newest if isinstance(r.get("run"), dict)]
    commits = _distinct(
        f"`{str(run['commit'])[:12]}`"
        + (" with uncommitted changes" if run.get("uncommitted_changes") else "")
        for run in runs
        if run.get("commit")
    )
    dates = sorted(filter(None, map(records.date, newest)))
    versions = _distinct(
        ", ".join(f"{k} {v}" for k, v in (run.get("versions") or {}).items()) for run in runs
    )
    threads = _distinct(str(run["threads"]) for run in runs if run.get("threads"))
    yield from (
        f"- {what}: {text}"
        for what, text in (
            ("commit", "; ".join(commits)),
            ("date", " to ".join(_distinct([dates[0], dates[-1]])) if dates else ""),
            ("threads", "; ".join(threads)),
            ("versions", "; ".join(versions)),
            ("allocator", ", ".join(_distinct(r.get("allocator") or "" for r in newest))),
            ("timer", ", ".join(_distinct(r.get("timer") or "" for r in newest))),
        )
        if text
    )
    for precision, ceilings in _ceilings(newest).items():
        flops = _range([c["flops"] / 1e12 for c in ceilings])
        rate = _range([c["bytes"] / 1e9 for c in ceilings])
        yield f"- measured ceilings, {precision}: {flops} TFLOP/s, {rate} GB/s"


def _ceilings(newest: Iterable[Record]) -> dict[str, list[dict[str, float]]]:
    """By precision, each run's."""
    found: dict[str, list[dict[str, float]]] = {}
    for record in newest:
        given = record.get("ceilings") or {}
        rates = {k: number(given, k) for k in ("flops", "bytes")}
        known = {k: v for k, v in rates.items() if v}
        mine = found.setdefault(str(record.get("precision")), [])
        if len(known) == len(rates) and known not in mine:
            mine.append(known)
    return {precision: ceilings for precision, ceilings in found.items() if ceilings}


def _range(values: Sequence[float]) -> str:
    return " to ".join(_distinct(f"{v:.3g}" for v in (min(values), max(values))))


def _summary(groups: Iterable[Sequence[Record]], names: Names) -> Iterator[str]:
    """A row for each case, a column for each state of the allocator, both wins and losses."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    ratios: list[float] = []
    for group in groups:
        mine = next((r for r in group if r["provider"] == MINE), None)
        if mine is None:
            continue
        key = (_name(mine, names), str(mine.get("direction")), str(mine.get("precision")))
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
    states = _ordered(state for cells in rows.values() for state in cells)
    # a GPU has one state, without a name
    yield from _markdown(
        ["case", "direction", "precision", *(s or "x best other" for s in states)],
        ([*key, *(cells.get(s, "-") for s in states)] for key, cells in rows.items()),
        left=3,
    )


def _table(group: Sequence[Record]) -> Iterator[str]:
    first = group[0]
    kind = [first.get("direction"), first.get("precision"), first.get("allocator")]
    yield f"### {_title(first)}; {', '.join(str(k) for k in kind if k)}"
    yield ""
    rate, unit = ("flops_per_s", "TFLOP/s") if _is_flow(first) else ("bytes_per_s", "GB/s")
    scale = 1e12 if unit == "TFLOP/s" else 1e9
    timed = [r for r in group if records.is_timed(r)]
    if timed:
        header = ["provider", "ms", "20-80 %", "rows/s", unit, "of ceiling", "x best other"]
        header += ["launches", "faults", "peak MiB", "error", "mode"]
        yield from _markdown(header, (_row(r, rate, scale) for r in timed))
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


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(filter(None, texts)))


def _ordered(states: Iterable[str]) -> list[str]:
    """States of the allocator, each once, those in `STATES` first."""
    known = {state: i for i, state in enumerate(STATES)}
    return sorted(dict.fromkeys(states), key=lambda s: known.get(s, len(known)))


def _is_flow(record: Record) -> bool:
    """Whether it computes matrix products; the element-wise cases have no layers."""
    return bool(record.get("hidden"))


def _title(record: Record) -> str:
    return ": ".join(_distinct([record["case"], record.get("title") or ""]))


def _names(newest: Iterable[Record]) -> Names:
    """Each case in short: with those of its sizes that differ within the case."""
    by_case: dict[str, list[Record]] = {}
    for record in newest:
        by_case.setdefault(record["case"], []).append(record)
    names = {}
    for case, found in by_case.items():
        varying = [f for f in SIZES if len({str(r.get(f)) for r in found}) > 1]
        for r in found:
            sizes = [SIZES[f](r[f]) for f in varying if r.get(f) is not None]
            names[_identity(r)] = ", ".join([case, *sizes])
    return names


def _identity(record: Record) -> str:
    return str([record["case"], *(record.get(f) for f in SIZES)])


def _name(record: Record, names: Names) -> str:
    return names[_identity(record)]


def _drawn(draw: Callable[..., Any], newest: Sequence[Record], names: Names, path: Path) -> bool:
    """Draw a picture if there are data for it; a stale one would belie the tables."""
    figure = draw([r for r in newest if records.is_timed(r)], names)
    if figure is None:
        path.unlink(missing_ok=True)
        return False
    figure.savefig(path)
    return True


def _roofline(timed: Sequence[Record], names: Names) -> Any:
    """Flows below their ceilings, one panel a precision; element-wise cases beside them."""
    timed = _one_state(timed)
    flows = [
        r
        for r in timed
        if _is_flow(r) and all(number(r, f) for f in ("operations", "bytes", "flops_per_s"))
    ]
    others = [r for r in timed if not _is_flow(r) and number(r, "bytes_per_s")]
    precisions = list(dict.fromkeys(str(r.get("precision")) for r in flows))
    count = len(precisions) + bool(others)
    if not count:
        return None
    colours = _colours(timed)
    cases = list(dict.fromkeys(r["case"] for r in flows))
    markers = {case: MARKERS[i % len(MARKERS)] for i, case in enumerate(cases)}
    wide = [1.0] * len(precisions)
    if others:
        wide.append(max(0.4, 0.18 * len({_below(r) for r in others})))
    figure = _figure(5.2 * sum(wide) + 2.6, 5.4)
    panels = list(figure.subplots(1, count, squeeze=False, width_ratios=wide)[0])
    ceilings = _ceilings(timed)
    for axes, precision in zip(panels, precisions, strict=False):
        shown = [r for r in flows if str(r.get("precision")) == precision]
        for r in shown:
            colour, mine = colours[r["provider"]], r["provider"] == MINE
            axes.plot(
                r["operations"] / r["bytes"],
                r["flops_per_s"] / 1e12,
                markers[r["case"]],
                color=colour,
                markerfacecolor=colour if mine else "none",
                markersize=8 if mine else 7,
                zorder=4 if mine else 3,
            )
        intensities, levels = [r["operations"] / r["bytes"] for r in shown], []
        for ceiling in ceilings.get(precision, []):
            ridge = ceiling["flops"] / ceiling["bytes"]
            x = [min([ridge, *intensities]) / 2, ridge, max([ridge, *intensities]) * 2]
            y = [min(v * ceiling["bytes"], ceiling["flops"]) / 1e12 for v in x]
            axes.plot(x, y, color=INK, linewidth=1.5, zorder=2)
            levels += y
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations per byte (flop/B)")
        axes.set_ylabel("TFLOP/s")
        axes.set_title(f"flows, {precision}", loc="left", color=INK, fontsize=11)
        _readable_ticks(axes, axes.get_xlim(), vertical=False)
        _readable_ticks(axes, [*levels, *(r["flops_per_s"] / 1e12 for r in shown)])
        _tidy(axes)
    if others:
        _bandwidths(panels[-1], others, colours, ceilings)
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color=c,
            markerfacecolor=c if name == MINE else "none",
            label=name,
        )
        for name, c in colours.items()
    ]
    handles += [
        Line2D([], [], marker=m, linestyle="", color=MUTED, markerfacecolor="none", label=case)
        for case, m in markers.items()
    ]
    handles.append(Line2D([], [], color=INK, label="measured ceiling"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def _bandwidths(
    axes: Any,
    others: Sequence[Record],
    colours: Mapping[str, str],
    ceilings: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Cases without products, which only the traffic to memory bounds."""
    labels = list(dict.fromkeys(map(_below, others)))
    for r in others:
        colour, mine = colours[r["provider"]], r["provider"] == MINE
        axes.plot(
            labels.index(_below(r)),
            r["bytes_per_s"] / 1e9,
            "o",
            color=colour,
            markerfacecolor=colour if mine else "none",
            markersize=8 if mine else 7,
            zorder=4 if mine else 3,
        )
    precisions = {str(r.get("precision")) for r in others}
    levels = [c["bytes"] / 1e9 for p in precisions for c in ceilings.get(p, ())]
    for level in levels:
        axes.axhline(level, color=INK, linewidth=1.5, zorder=2)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_yscale("log")
    axes.set_ylabel("GB/s")
    axes.set_title("element-wise", loc="left", color=INK, fontsize=11)
    _readable_ticks(axes, [r["bytes_per_s"] / 1e9 for r in others] + levels)
    _tidy(axes)


def _below(r: Record) -> str:
    """What an element-wise case is called below its points."""
    parts = (r["case"], r.get("direction") or "", str(r.get("precision")))
    return "\n".join(_distinct(parts))


def _throughput(timed: Sequence[Record], names: Names) -> Any:
    return _curves(
        timed,
        x="rows",
        y="rows_per_s",
        panel=("case", "features", "hidden", "couplings", "direction", "precision"),
        labels=("rows in a call", "rows/s"),
    )


def _memory(timed: Sequence[Record], names: Names) -> Any:
    return _curves(
        [r for r in timed if r["case"] == "growth-couplings"],
        x="couplings",
        y="peak_bytes",
        panel=("case", "features", "hidden", "rows", "direction", "precision"),
        labels=("couplings", "peak memory of a call (MiB)"),
        scale=2.0**-20,
    )


def _curves(
    timed: Sequence[Record],
    x: str,
    y: str,
    panel: Sequence[str],
    labels: tuple[str, str],
    scale: float = 1.0,
) -> Any:
    """One panel for each case with several x, one line for each provider; both axes logarithmic."""
    panels: dict[str, list[Record]] = {}
    for r in _one_state(timed):
        if number(r, x) and number(r, y):
            panels.setdefault(str([r.get(f) for f in panel]), []).append(r)
    shown = [p for p in panels.values() if len({r[x] for r in p}) > 1]
    if not shown:
        return None
    colours = _colours([r for p in shown for r in p])
    columns = min(3, len(shown))
    height = -(-len(shown) // columns)
    figure = _figure(4.6 * columns + 1.8, 3.9 * height)
    grid = list(figure.subplots(height, columns, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for axes, found in zip(grid, shown, strict=False):
        for name, colour in colours.items():
            points = sorted((r[x], r[y] * scale) for r in found if r["provider"] == name)
            if points:
                mine = name == MINE
                (handles[name],) = axes.plot(
                    *zip(*points, strict=True),
                    "o-",
                    color=colour,
                    markerfacecolor=colour if mine else "white",
                    linewidth=2.4 if mine else 1.4,
                    markersize=5,
                    zorder=4 if mine else 3,
                    label=name,
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({r[x] for r in found})
        axes.set_xticks(ticks[:: -(-len(ticks) // 6)])  # as many as fit
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.minorticks_off()
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        sizes = [SIZES[f](found[0][f]) for f in panel if f in SIZES and found[0].get(f)]
        kind = [str(found[0].get(f)) for f in ("case", "direction", "precision")]
        title = ", ".join(kind) + "\n" + ", ".join(sizes)
        axes.set_title(title, loc="left", color=INK, fontsize=9)
        _readable_ticks(axes, [r[y] * scale for r in found])
        _tidy(axes)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    figure.legend(handles=list(handles.values()), loc="outside right upper", frameon=False)
    return figure


def _ratios(timed: Sequence[Record], names: Names) -> Any:
    """Bars from 1 to the right where nicefast is faster, to the left where it is slower."""
    bars: dict[str, dict[str, Record]] = {}
    for r in timed:
        if r["provider"] == MINE and number(r, "to_best_other"):
            label = f"{_name(r, names)}; {r.get('direction')}, {r.get('precision')}"
            bars.setdefault(label, {})[str(r.get("allocator") or "")] = r
    if not bars:
        return None
    states = _ordered(state for found in bars.values() for state in found)
    each = 0.8 / len(states)
    figure = _figure(9.6, 1.4 + len(bars) * (0.14 + 0.17 * len(states)))
    axes = figure.subplots()
    shades = (ACCENT, SOFT, MUTED)
    values = [1.0]
    for place, found in enumerate(bars.values()):
        for i, state in enumerate(states):
            if state not in found:
                continue
            ratio = float(found[state]["to_best_other"])
            values.append(ratio)
            y = place + (i - (len(states) - 1) / 2) * each
            colour, alpha = (shades[i % 3], 1.0) if ratio >= 1 else (COLOURS[0], 1 - 0.4 * (i % 2))
            axes.barh(y, ratio - 1, 0.9 * each, left=1, color=colour, alpha=alpha)
            text = f"{ratio:.2f} {found[state].get('best_other') or ''}"
            side = 1 if ratio >= 1 else -1
            axes.annotate(
                text,
                (ratio, y),
                (4 * side, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=7,
                color=INK,
            )
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_xscale("log")
    # room for the numbers beside the bars
    span = max(values) / min(values)
    low = min(values) / max(1.1, span**0.25) if min(values) < 1 else 0.95
    axes.set_xlim(low, max(values) * max(1.1, span**0.25))
    axes.minorticks_off()
    _readable_ticks(axes, axes.get_xlim(), vertical=False)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlabel("median of the fastest other / nicefast's (above 1, nicefast is faster)")
    _tidy(axes)
    if any(states):
        from matplotlib.patches import Patch

        handles = [
            Patch(color=shades[i % 3], label=f"allocator {state}") for i, state in enumerate(states)
        ]
        handles.append(Patch(color=COLOURS[0], label="nicefast is slower"))
        figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False)
    return figure


PICTURES: dict[str, tuple[Callable[..., Any], str]] = {
    "ratios.png": (
        _ratios,
        "nicefast and the fastest other provider, which is named at each bar; logarithmic.",
    ),
    "roofline.png": (
        _roofline,
        "Rates reached, and the ceilings measured in the same runs. nicefast is filled, others are "
        "hollow; one allocator state.",
    ),
    "throughput.png": (_throughput, "Throughput against batch size; one allocator state."),
    "memory.png": (_memory, "Peak memory against the number of couplings; one allocator state."),
}


def _one_state(timed: Iterable[Record]) -> list[Record]:
    """Of what was measured in several states of the allocator, the first by `STATES`."""
    chosen: dict[str, tuple[int, Record]] = {}
    for r in timed:
        state = r.get("allocator")
        rank = STATES.index(state) if state in STATES else len(STATES)
        same = str([r["provider"], *(r.get(f) for f in records.KEY if f != "allocator")])
        if same not in chosen or rank < chosen[same][0]:
            chosen[same] = rank, r
    return [r for _, r in chosen.values()]


def _colours(timed: Iterable[Record]) -> dict[str, str]:
    others = [p for p in dict.fromkeys(r["provider"] for r in timed) if p != MINE]
    return {MINE: ACCENT} | {p: COLOURS[i % len(COLOURS)] for i, p in enumerate(others)}


def _short(value: float) -> str:
    """A number as it fits below a tick.

    >>> _short(65536), _short(1000), _short(512), _short(0.5)
    ('64 Ki', '1,000', '512', '0.5')
    """
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:,.0f} Ki"
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _readable_ticks(axes: Any, values: Sequence[float], vertical: bool = True) -> None:
    """Labelled ticks of a logarithmic axis, the denser the fewer decades are shown."""
    from matplotlib.ticker import EngFormatter, LogLocator

    axis = axes.yaxis if vertical else axes.xaxis
    decades = math.log10(max(values) / min(values))
    subs = (1, 1.5, 2, 3, 4, 5, 6, 8) if decades < 0.9 else (1, 2, 5) if decades < 2 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    plain = max(values) < 1e5
    axis.set_major_formatter((lambda v, _: f"{v:,.6g}") if plain else EngFormatter(sep=" "))
    axis.set_minor_formatter(lambda *_: "")


def _figure(width: float, height: float) -> Any:
    """Without global state and without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the pictures need matplotlib: pip install 'nicefast[train]'") from error
    figure = Figure((width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Any) -> None:
    axes.grid(color=LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
