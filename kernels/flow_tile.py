"""Which whole flows one kernel can serve, and with which tile: pure functions of the shape.

A tile of ``rows`` rows stays on the chip through the whole flow, so what limits a flow is its
widths, padded to few buckets: the running x takes ``rows * features`` registers of a program, a
layer's activations ``rows * hidden`` and its operand as many again. The tile does not depend on
the number of rows: a row's result is the same bits whatever batch it comes in.
"""

from typing import NamedTuple

FEATURES = (16, 32, 64, 128)  # padded widths: at least 16, the least K of a matrix instruction
HIDDEN = (32, 64, 128, 256)
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "gelu", "silu", "elu")
PRIORS = ("logistic", "normal")
PRECISIONS = ("bf16", "tf32", "fp32")
PARTS = {"bf16": 1, "tf32": 1, "tf32x3": 2, "ieee": 1}  # of each packed weight
MAX_ELEMENTS = 2**31 - 1  # of a packed weight: its offsets are 32 bits wide
PRODUCTS = {"bf16": "bf16", "tf32": "tf32", "fp32": "tf32x3"}  # of a precision
# by hidden: rows of a tile for 16, 32, 64, 128 features, 0 where every tile spills or is too small
# to be worth a launch; what compiles without a spill, see bench/flow_cases.py
ROWS = {
    "sm_80": {
        "bf16": {32: (128, 128, 128, 64), 64: (128, 128, 128, 64), 128: (128, 128, 128, 64)},
        "tf32": {32: (128, 128, 128, 64), 64: (128, 128, 128, 64), 128: (128, 128, 128, 64)},
        "fp32": {32: (128, 128, 128, 0), 64: (32, 32, 32, 0)},
    },
    "sm_90": {
        "bf16": {
            32: (128, 128, 128, 64), 64: (128, 128, 128, 64), 128: (128, 128, 128, 64),
            256: (64, 64, 64, 0),
        },
        "tf32": {32: (128, 128, 128, 64), 64: (128, 128, 128, 64), 128: (128, 128, 128, 64)},
        "fp32": {32: (128, 128, 128, 0), 64: (128, 128, 128, 0)},
    },
    "sm_100": {
        "bf16": {
            32: (128, 128, 128, 64), 64: (128, 128, 128, 64), 128: (128, 128, 128, 64),
            256: (64, 64, 64, 64),
        },
        "tf32": {32: (128, 128, 128, 64), 64: (128, 128, 128, 64), 128: (128, 128, 128, 64)},
        "fp32": {32: (128, 128, 128, 0), 64: (128, 64, 64, 0)},
    },
    "gfx942": {
        "bf16": {32: (64, 64, 64, 64), 64: (64, 64, 64, 0), 128: (32, 32, 0, 0)},
        "tf32": {32: (64, 64, 64, 32), 64: (64, 64, 64, 0), 128: (32, 32, 0, 0)},
        "fp32": {32: (64, 64, 64, 0), 64: (64, 64, 32, 32), 128: (64, 64, 64, 0)},
    },
}  # fmt: skip
# sm_80's tiles where a program has 99 KB of shared memory: TF32 needs half the rows
_NARROW = {128: (64, 64, 64, 64)}
ROWS |= dict.fromkeys(
    ("sm_86", "sm_89", "sm_120"), ROWS["sm_80"] | {"tf32": ROWS["sm_80"]["tf32"] | _NARROW}
)
ROWS["sm_103"] = ROWS["sm_100"]
ARCHS = tuple(ROWS)
# Weights stay on the chip, on NVIDIA's GPUs, of flows that have at most so many couplings, hidden
# layers of a conditioner, features of context and of each side, and by precision, hidden units.
RESIDENT_COUPLINGS, RESIDENT_LAYERS, RESIDENT_CONTEXT, RESIDENT_SIDE = 4, 2, 16, 16
RESIDENT_HIDDEN = {"bf16": 64, "tf32": 32, "fp32": 0}


class Side(NamedTuple):
    """Features ``start + step * j`` for ``j < size``, or, with step 0, those of a map."""

    size: int
    start: int
    step: int


class FlowShape(NamedTuple):
    """Everything a whole-flow kernel is compiled for, but the precision and the tile.

    ``sides`` are those of the couplings' one partition, and ``reads`` says which of them each
    coupling conditions on. Where they are not said, no weights stay on the chip.
    """

    features: int
    context: int
    hidden: tuple[int, ...]
    couplings: int
    activation: str
    prior: str
    sides: tuple[Side, ...] = ()
    reads: tuple[int, ...] = ()


class FlowTile(NamedTuple):
    """``rows`` rows by ``warps`` warps, widths padded to ``features`` and ``hidden``.

    ``products`` is how a matrix product is made of the hardware's, a key of :data:`PARTS`;
    ``stages``, how many layers' weights are on their way at once; ``registers``, how many a thread
    may have where that has to be said: left alone, ptxas settles for fewer and spills. ``carries``:
    layers hand on their operands, not their sums; ``halves``: how a row is folded for its
    logarithms (see :mod:`.flow_rows` and :mod:`.prior`).
    """

    rows: int
    warps: int
    stages: int
    features: int
    hidden: int
    products: str
    registers: int | None
    carries: bool
    halves: bool

    @property
    def widths(self) -> str:
        return f"features padded to {self.features}"


class ResidentTile(NamedTuple):
    """A tile of a kernel that keeps every weight on the chip (see :mod:`.flow_resident`): each
    side's features padded to ``half``, the context to ``context``, 0 where there is none.

    The rest is as in :class:`FlowTile`. ``programs``: for each multiprocessor, whose registers are
    enough for two; where its memory has room for one alone, they take turns.
    """

    rows: int
    warps: int
    half: int
    hidden: int
    context: int
    products: str
    registers: int
    programs: int
    halves: bool

    @property
    def widths(self) -> str:
        return f"weights that stay on the chip, each side padded to {self.half} features"


def tiles_of(arch: str) -> str:
    """The architecture whose tiles ``arch`` takes: its own, or the nearest older one's of NVIDIA's.

    >>> tiles_of("sm_90"), tiles_of("sm_121"), tiles_of("sm_75"), tiles_of("gfx1100")
    ('sm_90', 'sm_120', 'sm_75', 'gfx1100')
    """
    if arch in ARCHS or not arch.startswith("sm_"):
        return arch
    older = (int(known[3:]) for known in ARCHS if known.startswith("sm_"))
    return f"sm_{max((n for n in older if n < int(arch[3:])), default=arch[3:])}"


def flow_tile(shape: FlowShape, precision: str, arch: str) -> FlowTile | str:
    """The tile of a whole-flow kernel, or, for a user to read, why there is none.

    >>> flow_tile(FlowShape(21, 3, (100, 50), 4, "relu", "logistic"), "bf16", "sm_90")[:2]
    (128, 8)
    """
    d, c, hidden = shape.features, shape.context, shape.hidden
    for name, value, known in (
        ("architecture", arch, ARCHS),
        ("precision", precision, PRECISIONS),
        ("activation", shape.activation, ACTIVATIONS),
        ("prior", shape.prior, PRIORS),
    ):
        if value not in known:
            return f"no whole-flow kernel for {name} {value}, only for {', '.join(known)}"
    if not hidden:
        return "a whole-flow kernel needs conditioners with a hidden layer"
    width = f"{d} features and {c} of context" if c else f"{d} features"
    if d + c > FEATURES[-1]:
        return f"{width}: a whole-flow kernel holds at most {FEATURES[-1]}"
    rows_of = ROWS[arch][precision]
    if max(hidden) > max(rows_of):
        return (
            f"hidden layers of up to {max(hidden)} units: in {precision} on {arch} a whole-flow "
            f"kernel holds at most {max(rows_of)}"
        )
    dp = next(b for b in FEATURES if b >= d + c)
    hp = next(b for b in HIDDEN if b >= max(hidden))
    products = "ieee" if (arch, precision) == ("gfx942", "fp32") else PRODUCTS[precision]
    rows = rows_of[hp][FEATURES.index(dp)]
    if not rows:
        return (
            f"{width} with hidden layers of up to {max(hidden)} units: in {precision} on {arch} "
            "no tile of a whole-flow kernel stays in the registers"
        )
    resident = resident_tile(shape, precision, arch)
    if resident is not None:
        return resident
    layers = shape.couplings * max(len(hidden) - 1, 1)
    if layers * PARTS[products] * hp * max(hp, dp) > MAX_ELEMENTS:
        return f"{shape.couplings} couplings: a whole-flow kernel holds at most 2^31 weights"
    nvidia = arch.startswith("sm_")
    # two layers' weights in shared memory, where those of one leave registers to be saved
    ahead = nvidia and PARTS[products] == 1 and hp in (64, 128) and (dp, products) != (128, "tf32")
    warps = 8 if nvidia and rows >= 64 else 4
    return FlowTile(
        rows, warps, 2 if ahead else 1, dp, hp, products, 255 if nvidia else None,
        carries=arch != "sm_90", halves=arch not in ("sm_100", "sm_103"),
    )  # fmt: skip


def resident_tile(shape: FlowShape, precision: str, arch: str) -> ResidentTile | None:
    """The tile of the kernel that keeps every weight on the chip, where they fit."""
    if (
        not (shape.sides and arch.startswith("sm_"))
        or max(side.size for side in shape.sides) > RESIDENT_SIDE
        or max(shape.hidden) > RESIDENT_HIDDEN[precision]
        or shape.couplings > RESIDENT_COUPLINGS
        or len(shape.hidden) > RESIDENT_LAYERS
        or shape.context > RESIDENT_CONTEXT
    ):
        return None
    hidden = next(b for b in HIDDEN if b >= max(shape.hidden))
    return ResidentTile(
        rows=64, warps=4, half=RESIDENT_SIDE, hidden=hidden,
        context=RESIDENT_CONTEXT if shape.context else 0, products=PRODUCTS[precision],
        registers=255, programs=2, halves=arch not in ("sm_100", "sm_103"),
    )  # fmt: skip
