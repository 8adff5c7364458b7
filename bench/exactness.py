"""What an exact inverse costs, and what it saves: `python -m bench exact`.

First how far `inverse(forward(x))` is from x, in ordinary arithmetic and with a grid, as flows get
deeper. Then seconds of log_prob, inverse and a training step (forward and backward) of the same
flow, ordinary and exact, in turn, the inverse having been checked in every bit. Float32. `--out
FILE` writes the tables as well.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import nicefast as nf

from .providers import Shape
from .timing import Call, device_name, interleave, quantile

GRID = 2.0**-16
DEPTHS = (4, 32, 256, 1000)
GAINS = {"PyTorch's initial weights": 1.0, "doubled": 2.0}
SHAPES = (
    Shape(8, (64, 64), 65_536),
    Shape(64, (256, 256, 256), 16_384),
    Shape(784, (1000,) * 5, 512),
)
DIRECTIONS = ("log_prob", "inverse", "training")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench exact", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="at least so many of each")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least so long for each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a Markdown file for the tables")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        print("python -m bench exact: --rounds must be >= 1", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    lines = [
        "# An exact inverse: how far off, and at what cost\n",
        f"Written by `python -m bench exact`: float32, a grid of 2^-16. "
        f"{device_name(options.device)}, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}.\n",
        "Largest difference between `inverse(forward(x))` and x (with a grid: the rounded x); "
        "D=64, hidden 64 x 2, 1,000 rows of a normal distribution.\n",
        f"| weights | | {' | '.join(f'{depth} couplings' for depth in DEPTHS)} |",
        f"| --- | --- |{' ---: |' * len(DEPTHS)}",
    ]
    for name, gain in GAINS.items():
        found = [drift(depth, gain, device) for depth in DEPTHS]
        for kind, column in zip(("ordinary", "exact"), zip(*found, strict=True), strict=True):
            lines.append(f"| {name} | {kind} | {' | '.join(column)} |")
    lines += [
        "\nMilliseconds, ordinary -> exact, and how many times slower (median over rounds in "
        "turn).\n",
        f"| flow | {' | '.join(DIRECTIONS)} |",
        f"| --- |{' ---: |' * len(DIRECTIONS)}",
    ]
    for shape in SHAPES:
        lines.append(f"| {shape.title} | {' | '.join(cost(shape, options, device))} |")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return 0


@torch.no_grad()
def drift(couplings: int, gain: float, device: torch.device) -> tuple[str, str]:
    """Largest error of the round trip, ordinary and exact; or why there is none."""
    torch.manual_seed(0)
    model = nf.NICE(64, hidden=(64, 64), couplings=couplings)
    for coupling in model.couplings:
        coupling.conditioner.linears[-1].reset_parameters()  # not close to the identity
    for parameter in model.couplings.parameters():
        parameter.mul_(gain)
    model.to(device)
    x = torch.randn(1000, 64, device=device)
    back, _ = model.inverse(model(x)[0])
    exact = model.with_grid(GRID)
    try:
        again, _ = exact.inverse(exact(x)[0])
    except ValueError:
        there = "refused: out of the grid's range"
    else:
        there = f"{(again - torch.round(x / GRID) * GRID).abs().max().item():.2g}"
    return f"{(back - x).abs().max().item():.2g}", there


def cost(shape: Shape, options: argparse.Namespace, device: torch.device) -> list[str]:
    """A cell for each direction. RuntimeError where the inverse is not exact."""
    torch.manual_seed(0)
    plain = nf.NICE(shape.features, hidden=shape.hidden, couplings=shape.couplings).to(device)
    models = {"ordinary": plain, "exact": plain.with_grid(GRID)}
    x = torch.randn(shape.rows, shape.features, device=device)
    with torch.no_grad():
        back, _ = models["exact"].inverse(models["exact"](x)[0])
    if not torch.equal(back, torch.round(x / GRID) * GRID):
        raise RuntimeError(f"{shape.title}: the inverse is not exact")

    def call(model: nf.NICE, direction: str) -> Call:
        def infer(given: Tensor) -> None:
            with torch.no_grad():
                model.log_prob(given) if direction == "log_prob" else model.inverse(given)

        def train(given: Tensor) -> None:
            model.log_prob(given).mean().backward()

        return Call(train if direction == "training" else infer, model.zero_grad)

    cells = []
    for direction in DIRECTIONS:
        calls = {name: call(model, direction) for name, model in models.items()}
        found = interleave(calls, [x], device, options.rounds, options.seconds)
        pairs = zip(found["exact"].samples, found["ordinary"].samples, strict=True)
        ratio = quantile([b / a for b, a in pairs], 0.5)
        a, b = (1e3 * found[name].median for name in ("ordinary", "exact"))
        cells.append(f"{a:.3g} -> {b:.3g} (**{ratio:.1f}**)")
    return cells


if __name__ == "__main__":
    sys.exit(main())
