"""Our own ways against each other and plain PyTorch: `python -m bench ablation`.

Each variant changes one decision of the row engine (a threshold, a library, what is kept) and
leaves the rest as it is shipped; a few are other ways altogether. The library has no options for
this: variants replace names of nicefast.engine while they run. Everybody passes a gate against
float64 first (at most twice plain PyTorch's error) and takes turns, in rotated order, in one
process; times are medians, on the CPU, in float32. JSON lines and a table go to
bench/results/ablation/MACHINE/.

Allocator states: *fresh* is glibc as it starts, and kept so: every block from 128 KiB up is mapped
and faulted in anew. *settled* is glibc after nicefast.runtime.threads.settle_allocator, as every
process is in which nicefast has computed. `--quick` takes seconds, with tiny flows, to see that it
runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

import nicefast as nf
from nicefast.engine import Plan, linear, plan
from nicefast.engine.backward import Wanted, log_prob_vjp
from nicefast.engine.rows import Residuals, RowEngine
from nicefast.engine.stack import CouplingStack, read
from nicefast.likelihood import sum_log_prior
from nicefast.runtime.threads import settle_allocator

from . import records, timing
from .gate import Gate
from .providers import FLOAT32, Frozen, Nicefast, Plain, Provider, Shape, make_weights
from .timing import Call

RESULTS = Path(__file__).parent / "results" / "ablation"
MODULES = ("autograd", "backward", "frozen", "linear", "plan", "rows", "stack", "thresholds")
DIRECTIONS = {"log_prob": "log_prob", "gradient": "training", "sample": "sample"}  # as the gate's
INFERENCE = ("log_prob", "sample")
SMALL = 256  # rows: from here on blocks and thresholds can matter, up to here calls' overhead
SHIPPED, PLAIN = "shipped", "plain"
LEAST_SECONDS = 5e-3  # of a turn: shorter calls are repeated
INPUTS = 64  # at most, that calls take in turn
MIB = 1 << 20

FLOWS: dict[str, tuple[Shape, tuple[int, ...]]] = {
    "8": (Shape(8, (64, 64), 1), (1, 16, 256, 4_096, 65_536)),
    "64": (Shape(64, (256, 256, 256), 1), (1, 16, 256, 4_096, 16_384)),
    "64-deep": (Shape(64, (128, 128), 1, couplings=8), (1, 16, 128, 2_048, 16_384)),
    "784": (Shape(784, (1000,) * 5, 1), (1, 16, 128, 512)),
}
TINY: dict[str, tuple[Shape, tuple[int, ...]]] = {"tiny": (Shape(8, (16, 16), 1), (3, 300))}


class Variant(NamedTuple):
    """One way to compute a flow.

    Attributes:
        what: it changes, for people.
        provider: that makes the calls.
        context: in which it builds, passes the gate and is timed.
        directions: that it is for, of :data:`DIRECTIONS`.
        rows: from ... to ..., that it is for.
    """

    what: str
    provider: type[Provider] = Nicefast
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    directions: Sequence[str] = tuple(DIRECTIONS)
    rows: tuple[int, float] = (0, math.inf)

    def fits(self, shape: Shape, direction: str) -> bool:
        least, most = self.rows
        return direction in self.directions and least <= shape.rows <= most


@contextmanager
def patched(names: Mapping[str, Any]) -> Iterator[None]:
    """Replaces each name, wherever a module of nicefast.engine (or nicefast.flow) has it; a name
    with a dot is that of a class and its attribute. LookupError for a name that nobody has."""
    with ExitStack() as undo:
        for name, value in names.items():
            owners = list(_owners(name))
            attribute = name.rpartition(".")[2]
            if not owners:
                raise LookupError(f"no module of nicefast.engine has the name {name!r}")
            for owner in owners:
                undo.callback(setattr, owner, attribute, vars(owner)[attribute])
                setattr(owner, attribute, value)
        yield


def _owners(name: str) -> Iterator[Any]:
    modules = [sys.modules[f"nicefast.engine.{m}"] for m in MODULES] + [
        sys.modules["nicefast.flow"]
    ]
    of_class, _, attribute = name.rpartition(".")
    if not of_class:
        yield from (m for m in modules if attribute in vars(m))
        return
    classes = {vars(m)[of_class] for m in modules if of_class in vars(m)}
    yield from (c for c in classes if attribute in vars(c))


# --- Ways that the library does not have ---


def _relu_fused(h: Tensor, weight: Tensor, bias: Tensor, activation: Any = None) -> Tensor:
    """The library's ``linear``, with oneDNN's relu where oneDNN computes: NaN becomes 0 there."""
    work = 2 * h.numel() * weight.shape[0]
    if activation is None or work < vars(linear)["_forward_flops"]:
        return _shipped_linear(h, weight, bias, activation)
    return linear._pointwise(h, weight, bias.contiguous(), "relu", [], "")


def _linear_by_feature(h: Tensor, weight: Tensor, bias: Tensor, activation: Any = None) -> Tensor:
    """The library's ``linear`` in feature-major layout: h^T and the result's transpose are
    contiguous, and products are ``W h^T``."""
    y = _shipped_product(weight, h.t()).add_(bias[:, None]).t()
    return y if activation is None else activation(y)


def _product_by_feature(a: Tensor, b: Tensor) -> Tensor:
    return _shipped_product(b.t(), a.t()).t()


def _weight_gradient_by_feature(d: Tensor, h: Tensor) -> Tensor:
    return _shipped_product(d.t(), h)


def _split_by_feature(self: CouplingStack, x: Tensor) -> list[Tensor]:
    return [half.t().contiguous().t() for half in _shipped_split(self, x)]


def _log_prob_by_feature(
    self: RowEngine, x: Tensor, context: Tensor | None = None, save: list[Any] | None = None
) -> Tensor:
    scale, rest = self.density
    out = []
    for rows in self.blocks(len(x), save is not None):
        kept = None
        if save is not None:
            kept = Residuals([], [], [])
            save.append(kept)
        halves = self._couple(x[rows], None, False, kept)
        z = torch.cat([half.t() for half in halves]).mul_(scale[:, None]).t()
        if kept is not None:
            kept.z.append(z)
        out.append(sum_log_prior(z, self.prior).add_(rest))
    return torch.cat(out)


_shipped_linear, _shipped_product = linear.linear, linear.product
_shipped_split = CouplingStack.split
BY_FEATURE = {
    "linear": _linear_by_feature,
    "product": _product_by_feature,
    "weight_gradient": _weight_gradient_by_feature,
    "input_major": lambda weight: weight,
    "CouplingStack.split": _split_by_feature,
    "RowEngine.log_prob": _log_prob_by_feature,
}


class CounterNoise(Plain):
    """Plain PyTorch, whose samples have nicefast's noise: the same however they are cut."""

    def sample(self, rows: int) -> Tensor:
        seed = nf.functional.draw_seed()
        return self.data(nf.functional.sample_prior(self.log_scale, rows, "logistic", seed=seed))


class InNumPy(Nicefast):
    """log_prob by NumPy, whose calls cost less than PyTorch's."""

    def log_prob(self, x: Tensor) -> Tensor:
        stack = read(self.flow.couplings, x.device, torch.float32)
        log_scale = stack.by_half(self.log_scale.detach()).numpy()
        halves = [half.numpy() for half in stack.split(x)]
        for side, layers in zip(stack.conditioning, stack.couplings, strict=True):
            h = halves[side]
            for k, (weight, bias) in enumerate(layers):
                h = h @ weight.detach().numpy().T
                h += bias.detach().numpy()
                if k < len(layers) - 1:
                    np.maximum(h, 0, out=h)
            halves[1 - side] = halves[1 - side] + h
        size = np.abs(np.concatenate(halves, 1) * np.exp(log_scale))
        size += 2 * np.log1p(np.exp(-size))
        return torch.from_numpy(log_scale.sum() - size.sum(1))


class GradientInForward(Nicefast):
    """The gradient of a mean, computed block by block as the rows go forwards: nothing is kept, but
    all of it is for nothing where the gradient that comes is another."""

    def log_prob(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.flow.log_prob(x)
        engine = self.flow.plan(x).engine
        return _AtOnce.apply(engine, x, self.log_scale, *engine.stack.parameters)


class _AtOnce(Function):
    @staticmethod
    def forward(
        ctx: Any, engine: RowEngine, x: Tensor, log_scale: Tensor, *parameters: Tensor
    ) -> Tensor:
        wanted = Wanted(False, False, True, [True] * len(parameters))
        out: list[Tensor] = []
        ctx.sums = []
        for rows in engine.blocks(len(x), training=True):
            kept: list[Any] = []
            out.append(engine.log_prob(x[rows], None, kept))
            ones = torch.ones_like(out[-1])
            found = log_prob_vjp(engine, ones, x[rows], None, kept, wanted)
            gradients = [found.log_scale, *found.parameters]
            if ctx.sums:
                torch._foreach_add_(ctx.sums, gradients)
            else:
                ctx.sums = gradients
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if not (grad == grad[0]).all():
            raise RuntimeError("only of a gradient that is the same for every row")
        return None, None, *torch._foreach_mul(ctx.sums, grad[0])


def _layer_by_layer(*_: Any) -> Plan:
    return Plan("layers", "the ablation asks for it")


_plans: weakref.WeakKeyDictionary[Any, Plan] = weakref.WeakKeyDictionary()


def _kept_plan(flow: Any, x: Tensor, context: Tensor | None = None) -> Plan:
    """The plan of the flow's first call: wrong as soon as anything changes."""
    if flow not in _plans:
        _plans[flow] = plan(flow, x, context)
    return _plans[flow]


# --- Variants ---


def _with(**names: Any) -> Callable[[], AbstractContextManager[None]]:
    return partial(patched, names)


def _bytes(size: int) -> dict[str, int]:
    return {"cpu": size, "cuda": size}


@cache
def variants() -> dict[str, Variant]:
    """By name. Those of oneDNN are other ones where the library leaves all to MKL."""
    large = (SMALL, math.inf)
    gradient = ("gradient",)
    found = {
        PLAIN: Variant("half-split PyTorch; samples of nicefast's noise", CounterNoise),
        "plain, torch's noise": Variant(
            "half-split PyTorch; samples of torch's generator", Plain, directions=("sample",)
        ),
        SHIPPED: Variant("the row engine as it is shipped"),
        "frozen": Variant("a frozen flow", Frozen, directions=INFERENCE),
    }
    never = math.inf
    if vars(linear)["_gradient_flops"] < never:
        found |= {
            "oneDNN forward only": Variant(
                "MKL computes the backward pass's products",
                context=_with(_gradient_flops=never),
                directions=gradient,
            ),
            "relu in oneDNN": Variant(
                "oneDNN applies relu, too: NaN becomes 0",
                context=_with(linear=_relu_fused),
                directions=INFERENCE,
                rows=large,
            ),
            "weights as stored": Variant(
                "no input-major copies of weights",
                context=_with(input_major=lambda weight: weight),
                rows=large,
            ),
        }
    elif vars(linear)["_pointwise"] is not None:
        found["oneDNN backward"] = Variant(
            "oneDNN takes the backward pass's large products, too",
            context=_with(_gradient_flops=linear.ONEDNN_FLOPS),
            directions=gradient,
        )
    if vars(linear)["_forward_flops"] < never:
        found["no oneDNN"] = Variant(
            "MKL computes every product", context=_with(_forward_flops=never, _gradient_flops=never)
        )
        for size in (1, 4, 16, 64):
            found[f"oneDNN from {size} MFLOP"] = Variant(
                "oneDNN takes forward products of so many operations",
                context=_with(_forward_flops=size * MIB),
                rows=large,
            )
    elif vars(linear)["_pointwise"] is not None:
        found["oneDNN"] = Variant(
            "oneDNN takes large products, as on AMD's processors",
            context=_with(_forward_flops=linear.ONEDNN_FLOPS, _gradient_flops=linear.ONEDNN_FLOPS),
        )
    if vars(linear)["_few_rows"]:
        found["rows as rows"] = Variant(
            "h W^T for few rows, too", context=_with(_few_rows=0), rows=(0, 64)
        )
    else:
        found["few rows"] = Variant(
            "W h^T for few rows", context=_with(_few_rows=linear.FEW_ROWS), rows=(0, 64)
        )
    found["one block"] = Variant(
        "all rows in one block", context=_with(BLOCK_BYTES=_bytes(1 << 50)), rows=large
    )
    for size in (1, 2, 8, 16):
        found[f"blocks of {size} MiB"] = Variant(
            "blocks of this size, instead of 4 MiB",
            context=_with(BLOCK_BYTES=_bytes(size * MIB)),
            rows=large,
        )
    found["recomputed"] = Variant(
        "residuals recomputed, in blocks of 32 MiB",
        context=_with(RESIDUAL_BYTES=0),
        directions=gradient,
        rows=large,
    )
    for size in (8, 128):
        found[f"recomputed, {size} MiB"] = Variant(
            "residuals recomputed, in blocks of this size",
            context=_with(RESIDUAL_BYTES=0, RECOMPUTED_BYTES=_bytes(size * MIB)),
            directions=gradient,
            rows=large,
        )
    found |= {
        "gradient in forward": Variant(
            "the forward pass computes a mean's gradient",
            GradientInForward,
            directions=gradient,
            rows=large,
        ),
        "feature-major": Variant(
            "h^T = W h^T, each block on its side from first to last",
            context=partial(patched, BY_FEATURE),
        ),
        "plan kept": Variant(
            "modules are read once, not at each call",
            context=_with(plan_call=_kept_plan),
            rows=(0, SMALL),
        ),
        "NumPy": Variant("NumPy computes", InNumPy, directions=("log_prob",), rows=(0, SMALL)),
        "layers": Variant(
            "layer by layer: modules are called in turn", context=_with(plan_call=_layer_by_layer)
        ),
        "reference": Variant(
            "layer by layer, by the definition", context=partial(nf.set_backend, "reference")
        ),
    }
    return found


class Switch(ExitStack):
    """In the context of one variant at a time, until it is left."""

    def to(self, variant: Variant) -> None:
        self.close()
        self.enter_context(variant.context())


# --- Measuring ---


def make_call(model: Provider, direction: str) -> Callable[[Tensor], object]:
    """What is timed: a call without gradients, or log_prob and the gradient of its mean."""
    if direction != "gradient":
        method = getattr(model.ready(FLOAT32), direction)

        @torch.no_grad()
        def infer(x: Tensor) -> Tensor:
            return method(len(x) if direction == "sample" else x)

        return infer
    parameters = list(model.parameters())

    def learn(x: Tensor) -> None:
        for parameter in parameters:
            parameter.grad = None
        (-model.log_prob(x).mean()).backward()

    return learn


def measure(
    shape: Shape, directions: Sequence[str], names: Sequence[str], rounds: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """A record for each variant and direction; those not timed say why."""
    weights = make_weights(shape)
    device = torch.device("cpu")
    sets = min(INPUTS, timing.input_sets(4 * shape.rows * shape.features, device))
    inputs = [torch.randn(shape.rows, shape.features) for _ in range(sets)]
    gate = Gate(shape, weights, inputs[0])
    for direction in directions:
        found: dict[str, str] = {}
        calls: dict[str, Call] = {}
        with Switch() as switch:
            for name in names:
                variant = variants()[name]
                if not variant.fits(shape, direction):
                    continue
                switch.to(variant)
                model = variant.provider(shape, weights)
                failure = _failure(gate, model, direction)
                found[name] = failure or "timed"
                if failure is None:
                    prepare = partial(switch.to, variant)
                    calls[name] = Call(make_call(model, direction), prepare)
            # the gate has run everything once
            timings = timing.interleave(
                calls, inputs, device, rounds, seconds, warmup=1, least=LEAST_SECONDS
            )
        plain = timings[PLAIN].median if PLAIN in timings else None
        about = {"flow": replace(shape, rows=1).title.rpartition(",")[0], "rows": shape.rows}
        for name, status in found.items():
            record = about | {"direction": direction, "variant": name, "status": status}
            if name in timings:
                record |= asdict(timings[name])
                record["times_plain"] = plain and plain / timings[name].median
            yield record


def _failure(gate: Gate, model: Provider, direction: str) -> str | None:
    """What is wrong with a variant's results, if anything; of samples, with an inverse, too, since
    little can be said of draws."""
    for asked in (DIRECTIONS[direction], *(["inverse"] if direction == "sample" else [])):
        try:
            _, failure = gate.check(model, "float32", FLOAT32, asked)
        except Exception as error:  # whatever a variant raises, it is out and the others go on
            failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if failure:
            return f"failed: {failure}"
    return None


# --- The table ---


def tables(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown of all records of one machine."""
    run = found[0]["run"]
    changed = ", with uncommitted changes" if run["uncommitted_changes"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    yield "# Ablation: our own ways against each other and plain PyTorch"
    yield ""
    yield "Written by `python -m bench ablation`; how it measures is said in bench/ablation.py."
    yield ""
    yield f"- processor: {run['cpu']}, {run['cores']} cores, {run['isa']}"
    yield f"- commit: `{str(run['commit'])[:12]}`{changed}; date: {run['date']}"
    yield f"- versions: {versions}; {run['libc']}"
    for threads, rates in {r["threads"]: r["rates"] for r in found}.items():
        said = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
        yield f"- large float32 products, threads {threads}: {said}"
    used = {r["variant"] for r in found}
    yield ""
    yield "| variant | what it changes |"
    yield "| --- | --- |"
    yield from (f"| {name} | {v.what} |" for name, v in variants().items() if name in used)
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for r in found:
        groups.setdefault((r["direction"], r["threads"], r["allocator"]), []).append(r)
    for (direction, threads, allocator), group in groups.items():
        yield ""
        yield f"## {direction}, threads: {threads}, allocator: {allocator}"
        yield ""
        yield from _times(group)
        yield ""
        yield from _against_shipped(group)
    failed = [r for r in found if r["status"] != "timed"]
    if failed:
        yield ""
        yield "## Not timed"
        yield ""
        for r in failed:
            case = f"{r['flow']}, {r['rows']:,} rows, {r['direction']}"
            yield f"- {r['variant']}, {case}: {r['status']}"


def _times(group: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Times as fast as plain PyTorch, by case and variant."""
    names = [n for n in variants() if n != PLAIN and any(r["variant"] == n for r in group)]
    yield f"| times plain PyTorch | rows | plain, ms | {' | '.join(names)} |"
    yield f"| --- | ---: | ---: |{' ---: |' * len(names)}"
    cases: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for r in group:
        cases.setdefault((r["flow"], r["rows"]), {})[r["variant"]] = r
    for (flow, rows), own in cases.items():
        plain = own.get(PLAIN, {}).get("median")
        cells = [own.get(name, {}).get("times_plain") for name in names]
        said = " | ".join("" if c is None else f"{c:.2f}" for c in cells)
        yield f"| {flow} | {rows:,} | {'' if plain is None else f'{plain * 1e3:.3g}'} | {said} |"


def _against_shipped(group: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What each variant is worth over all cases."""
    shipped = {
        (r["flow"], r["rows"]): r["median"]
        for r in group
        if r["variant"] == SHIPPED and "median" in r
    }
    yield (
        "| times as fast as shipped | cases | least | median | most | 10 % faster in | "
        "10 % slower in |"
    )
    yield f"| --- |{' ---: |' * 6}"
    for name in variants():
        ratios = [
            shipped[r["flow"], r["rows"]] / r["median"]
            for r in group
            if r["variant"] == name and "median" in r and (r["flow"], r["rows"]) in shipped
        ]
        if ratios and name != SHIPPED:
            middle = timing.quantile(ratios, 0.5)
            faster, slower = sum(r >= 1.1 for r in ratios), sum(r <= 0.9 for r in ratios)
            range_of = f"{min(ratios):.2f} | {middle:.2f} | {max(ratios):.2f}"
            yield f"| {name} | {len(ratios)} | {range_of} | {faster} | {slower} |"


# --- The command ---


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    level = "quick" if options.quick else "ablation"
    if options.child:
        return _child(options)
    folder = options.out or RESULTS / records.slug(timing.device_name("cpu"))
    lines = folder / f"{level}.ndjson"
    if not options.report:
        part = lines.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        code = 0
        for state in options.allocator or (["settled"] if options.quick else list(STATES)):
            child = [*arguments, "--child", state, "--lines", str(part)]
            code = code or timing.rerun("bench", ["ablation", *child], STATES[state])
        if code or not part.exists():
            print("python -m bench ablation: not all was measured", file=sys.stderr)
            return code or 1
        part.replace(lines)
    try:
        found = [json.loads(line) for line in lines.read_text().splitlines()]
    except OSError as error:
        print(f"python -m bench ablation: {error}", file=sys.stderr)
        return 2
    text = "\n".join(tables(found)) + "\n"
    lines.with_suffix(".md").write_text(text)
    print(text, end="")
    print(f"{lines} and {lines.with_suffix('.md').name} beside it", file=sys.stderr)
    return 0


STATES = {"fresh": "fresh", "settled": "default"}  # and the allocator's that they begin in


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="seconds: tiny flows, one thread")
    parser.add_argument("--flow", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--variant", nargs="+", choices=variants(), default=list(variants()))
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1, and all")
    parser.add_argument("--allocator", nargs="+", choices=STATES, help="default: both")
    parser.add_argument("--rounds", type=int, default=5, help="at least so many of each table")
    parser.add_argument("--seconds", type=float, default=1.0, help="at least so long a table")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: by processor")
    parser.add_argument("--report", action="store_true", help="the table of stored lines again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser


def _child(options: argparse.Namespace) -> int:
    """Everything that is asked for in one allocator state, in this process."""
    torch.manual_seed(0)
    all_threads = torch.get_num_threads()
    if options.child == "settled":
        settle_allocator()
    about = {
        "allocator": options.child,
        "run": timing.machine(torch.device("cpu"), ("numpy", "nicefast")),
    }
    if options.quick:
        flows, rounds, seconds, several = TINY, 1, 0.0, [1]
    else:
        flows = {name: FLOWS[name] for name in options.flow}
        rounds, seconds = options.rounds, options.seconds
        several = sorted({1, all_threads})
    for threads in options.threads or several:
        torch.set_num_threads(threads)
        about |= {"threads": threads, "rates": _rates(256 if options.quick else 2048)}
        for shape, rows in flows.values():
            for own in (replace(shape, rows=n) for n in rows):
                clock = time.strftime("%H:%M:%S")
                print(f"{clock} {options.child}, threads {threads}: {own.title}", file=sys.stderr)
                for record in measure(own, options.direction, options.variant, rounds, seconds):
                    records.append(options.lines, record | about)
    return 0


def _rates(size: int) -> dict[str, float]:
    """Floating-point operations a second of large products, by library."""
    cpu = torch.device("cpu")
    calls, operations = timing.product_calls(torch.float32, size, cpu)
    found = timing.interleave(calls, [None], cpu, rounds=5)
    return {name: operations / t.median for name, t in found.items()}
