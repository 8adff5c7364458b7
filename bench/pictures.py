"""The stored measurements as pictures: rates, throughput, memory, ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nicefast.plots import ACCENT, INK, LINES, MUTED, SOFT, figure_of

from . import records
from .naming import MINE, SIZES, Names, distinct, is_flow, name_of, one_state, ordered
from .records import Record, number

COLOURS = ("#b44d12", "#4d7c3a", "#8d6a9f", "#c9952b", "#2a9d8f", "#d1495b", "#7b8794", "#3d405b")
MARKERS = "osD^vP*X<>ph"


def drawn(draw: Callable[..., Any], newest: Sequence[Record], names: Names, path: Path) -> bool:
    """Draw a picture if there are data for it; a stale one would belie the tables."""
    figure = draw([r for r in newest if records.is_timed(r)], names)
    if figure is None:
        path.unlink(missing_ok=True)
        return False
    figure.savefig(path)
    return True


def _roofline(timed: Sequence[Record], names: Names) -> Any:
    """Flows below their ceilings, one panel a precision; element-wise cases beside them."""
    timed = one_state(timed)
    flows = [
        r
        for r in timed
        if is_flow(r) and all(number(r, f) for f in ("operations", "bytes", "flops_per_s"))
    ]
    others = [r for r in timed if not is_flow(r) and number(r, "bytes_per_s")]
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
    figure = figure_of(5.2 * sum(wide) + 2.6, 5.4)
    panels = list(figure.subplots(1, count, squeeze=False, width_ratios=wide)[0])
    ceilings = records.ceilings(timed)
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
    return "\n".join(distinct(parts))


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
    for r in one_state(timed):
        if number(r, x) and number(r, y):
            panels.setdefault(str([r.get(f) for f in panel]), []).append(r)
    shown = [p for p in panels.values() if len({r[x] for r in p}) > 1]
    if not shown:
        return None
    colours = _colours([r for p in shown for r in p])
    columns = min(3, len(shown))
    height = -(-len(shown) // columns)
    figure = figure_of(4.6 * columns + 1.8, 3.9 * height)
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
            label = f"{name_of(r, names)}; {r.get('direction')}, {r.get('precision')}"
            bars.setdefault(label, {})[str(r.get("allocator") or "")] = r
    if not bars:
        return None
    states = ordered(state for found in bars.values() for state in found)
    each = 0.8 / len(states)
    figure = figure_of(9.6, 1.4 + len(bars) * (0.14 + 0.17 * len(states)))
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
