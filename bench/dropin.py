"""What `nf.accelerate` gains: `python -m bench dropin`.

Flows of nflows, normflows (both of its ways to NICE), FrEIA and zuko, before and after one line,
the same weights and rows, in turn: seconds of log_prob, sampling and a training step, and the
operators each asks PyTorch for. Then the glue of one coupling, from data to latent: what is no
product and no activation, as operators and as bytes of the tensors that go into and come out of
them (nicefast's own operations too count as one each); `--counts` gives that alone, in seconds.
`--out FILE` writes the tables as well.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nicefast as nf

from .measure import FREE, launches
from .providers import (
    FLOAT32,
    MLP,
    PROVIDERS,
    Provider,
    Shape,
    Weights,
    make_call,
    make_weights,
)
from .timing import Call, device_name, interleave, quantile

SHAPES = (
    Shape(64, (128, 128), 64),
    Shape(8, (64, 64), 16_384),
    Shape(64, (256, 256, 256), 4_096),
    Shape(784, (1000,) * 5, 256),
)
DIRECTIONS = ("log_prob", "sample", "training")
PRODUCTS = ("mm", "addmm", "bmm", "linear", "_linear_pointwise", "relu", "threshold_backward")


class NormflowsMasked(Provider):
    """normflows: MaskedAffineFlow(b, t, s=None), conditioners of full width."""

    def build(self, shape: Shape) -> None:
        import normflows

        masks = [(torch.arange(shape.features) < shape.half).float()]
        masks.append(1 - masks[0])
        widths = (shape.features, *shape.hidden, shape.features)
        self.nets = nn.ModuleList(MLP(widths) for _ in range(shape.couplings))
        flows = [normflows.flows.MaskedAffineFlow(masks[i % 2], n) for i, n in enumerate(self.nets)]
        base = normflows.distributions.DiagGaussian(shape.features, trainable=False)
        self.flow = normflows.NormalizingFlow(base, flows)

    def load(self, weights: Weights) -> None:
        """Its own initial weights: those of half the width do not fit."""

    def latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.forward_and_log_det(x)

    def data(self, h: Tensor) -> Tensor:
        return self.flow.inverse(h)


class Library(NamedTuple):
    """A flow of its couplings, and how one of them is called."""

    provider: type[Provider]
    call: Callable[[Any, Tensor], object]


LIBRARIES = {
    "nflows": Library(PROVIDERS["nflows"], lambda coupling, x: coupling(x)),
    "normflows": Library(PROVIDERS["normflows"], lambda coupling, x: coupling(x)),
    "normflows, masked": Library(NormflowsMasked, lambda coupling, x: coupling(x)),
    "zuko": Library(PROVIDERS["zuko"], lambda coupling, x: coupling().call_and_ladj(x)),
    "FrEIA": Library(PROVIDERS["FrEIA"], lambda coupling, x: coupling((x,))),
}


class Glue(TorchDispatchMode):
    """Counts operators that are no product and no activation, and the bytes they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        if name not in PRODUCTS and name not in FREE and "split" not in name:
            self.operators += 1
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
            touched = {id(t): t for t in leaves if isinstance(t, Tensor)}.values()
            self.bytes += sum(t.numel() * t.element_size() for t in touched)
        return out


class Row(NamedTuple):
    """One library at one size: seconds and operators of each direction, before and after; glue."""

    library: str
    shape: Shape
    seconds: dict[str, tuple[float, float]]
    gains: dict[str, float]
    operators: dict[str, tuple[int | None, int | None]]
    glue: tuple[tuple[int, int], tuple[int, int]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench dropin", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="at least so many of each")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least so long for each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a Markdown file for the tables")
    parser.add_argument("--counts", action="store_true", help="operators and bytes of the glue")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        print("python -m bench dropin: --rounds must be >= 1", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    directions = () if options.counts else DIRECTIONS
    rows = []
    for row in measure(SHAPES, options.rounds, options.seconds, device, directions):
        rows.append(row)
        if directions:
            gains = ", ".join(f"{d} {row.gains[d]:.2f}" for d in directions)
            print(f"{row.library}, {row.shape.title}: {gains} times faster", file=sys.stderr)
    text = tables(rows, options.device)
    print(text, end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return 0


def measure(
    shapes: Sequence[Shape],
    rounds: int,
    seconds: float,
    device: torch.device,
    directions: Sequence[str] = DIRECTIONS,
) -> Iterator[Row]:
    """An error where a flow gives other densities after it was accelerated."""
    FLOAT32.prepare()
    for shape in shapes:
        weights = make_weights(shape)
        x = torch.randn(shape.rows, shape.features, device=device)
        for library, (provider, call) in LIBRARIES.items():
            torch.manual_seed(0)
            before = provider(shape, weights).to(device)
            after = copy.deepcopy(before)
            report = nf.accelerate(after)
            if report.left or not report.replaced:
                raise RuntimeError(f"{library}: {report}")
            _check(library, before, after, x)
            models = {"before": before, "after": after}
            timed, gains, counted = {}, {}, {}
            for direction in directions:
                calls = {k: Call(make_call(m, FLOAT32, direction)) for k, m in models.items()}
                found = interleave(calls, [x], device, rounds, seconds)
                both = (found["before"], found["after"])
                timed[direction] = (both[0].median, both[1].median)
                pairs = zip(both[0].samples, both[1].samples, strict=True)
                gains[direction] = quantile([b / a for b, a in pairs], 0.5)
                counted[direction] = tuple(launches(c, x, library, device) for c in calls.values())
            name = report.replaced[0].name
            glued = tuple(glue(m.get_submodule(name), call, x) for m in models.values())
            yield Row(library, shape, timed, gains, counted, glued)


@torch.no_grad()
def _check(library: str, before: Provider, after: Provider, x: Tensor) -> None:
    torch.testing.assert_close(
        after.log_prob(x),
        before.log_prob(x),
        rtol=1e-5,
        atol=1e-3,
        msg=lambda text: f"{library}: other densities after accelerate: {text}",
    )


@torch.no_grad()
def glue(coupling: nn.Module, call: Callable[[Any, Tensor], object], x: Tensor) -> tuple[int, int]:
    """Operators and bytes of all but the products and activations of one coupling."""
    call(coupling, x)  # its partition is made
    with Glue() as seen:
        call(coupling, x)
    return seen.operators, seen.bytes


def tables(rows: Sequence[Row], device: str) -> str:
    """Markdown: times, where they were taken, and the glue."""
    about = f"{device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}."
    directions = list(rows[0].seconds)
    command = "python -m bench dropin" + ("" if directions else " --counts")
    lines = [
        "# One line: nf.accelerate\n",
        f"Written by `{command}`: float32, half split, {SHAPES[0].couplings} couplings. {about}\n",
    ]
    if directions:
        lines += [
            "Milliseconds before -> after, how many times faster (median over rounds in turn), and "
            "operators before -> after.\n",
            f"| flow | library | {' | '.join(directions)} |",
            f"| --- | --- |{' ---: |' * len(directions)}",
        ]
    for row in rows if directions else ():
        cells = []
        for direction in directions:
            a, b = (1e3 * s for s in row.seconds[direction])
            count = "{} -> {}".format(*row.operators[direction])
            cells.append(f"{a:.3g} -> {b:.3g} (**{row.gains[direction]:.2f}**), {count}")
        lines.append(f"| {row.shape.title} | {row.library} | {' | '.join(cells)} |")
    lines += [
        "\nThe glue of one coupling (FrEIA: of a block, which is two), before -> after.\n",
        "| flow | library | operators | KB a row |",
        "| --- | --- | ---: | ---: |",
    ]
    for row in rows:
        (a, a_bytes), (b, b_bytes) = row.glue
        kilobytes = " -> ".join(f"{n / row.shape.rows / 1e3:.3g}" for n in (a_bytes, b_bytes))
        lines.append(
            f"| {row.shape.title} | {row.library} | {a} -> {b} ({a / b:.1f} times fewer) | "
            f"{kilobytes} ({a_bytes / b_bytes:.1f} times fewer) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
