"""Named fits: a data set, its preprocessing, a flow and a recipe, each after a stated source.

PAPER: Dinh, Krueger, Bengio, NICE, arXiv 1410.8516v6. RELEASED: the configuration files and code
of laurent-dinh/nice, which go with v1 and differ from v6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .recipe import Recipe


@dataclass(frozen=True)
class Preset:
    """A fit that has a name.

    Attributes:
        data: name of the data set, or "" where the user gives one.
        model: arguments of :class:`nicefast.NICE`, but for ``features``.
        preprocessing: steps, as :meth:`Preprocessing.fit` takes them.
        recipe: how it is trained.
        source: what it follows.
        deviations: where it does not, each in a sentence.
        noise_draws: for each held-out row, when it is scored.

    >>> PRESETS["mnist-paper"].recipe.lr
    0.001
    """

    data: str
    model: Mapping[str, Any]
    preprocessing: tuple[Any, ...]
    recipe: Recipe
    source: str
    deviations: tuple[str, ...] = ()
    noise_draws: int = 5


_MNIST = {"hidden": (1000,) * 5, "couplings": 4, "prior": "logistic", "partition": "alternating"}
_WIDE = {"hidden": (2000,) * 4, "couplings": 4, "prior": "logistic", "partition": "alternating"}
_TFD = {"hidden": (5000,) * 4, "couplings": 4, "prior": "normal", "partition": "alternating"}

# PAPER, section 5.1: AdaM with learning rate 1e-3, momentum 0.9, beta2 0.01, lambda 1, epsilon
# 1e-4, 1,500 epochs, best on validation
_PAPER = Recipe(
    epochs=1500,
    patience=1500,
    batch_size=200,
    start="paper",
    optimiser="adam",
    lr=1e-3,
    momentum=0.9,
    averaging_squares=0.99,
    eps=1e-4,
    weight_decay=0.0,
    averaging=0.0,
    validation_draws=1,
)
_PAPER_DEVIATIONS = (
    "beta2 = 0.01 is read as the decay 1 - 0.01 = 0.99 of the squared gradients' average, as the "
    "first version of Adam counted it.",
    "The batch size, which the paper does not give, is the released code's 200; so is the start.",
    "lambda = 1 leaves the momentum as it is.",
)
# RELEASED: RMSProp with momentum (averaging 0.95, stabiliser 1e-2, momentum 0 to 0.5 in epochs 5
# to 6), learning rate divided by 1.0005 an update, down to a tenth
_RELEASED = Recipe(
    epochs=1500,
    patience=1500,
    batch_size=200,
    start="paper",
    optimiser="rmsprop",
    lr=1e-3,
    schedule="exponential",
    lr_decay=1 / 1.0005,
    lr_least=1e-4,
    momentum=0.5,
    momentum_epochs=(5, 6),
    averaging_squares=0.95,
    eps=1e-2,
    weight_decay=0.0,
    averaging=0.0,
    validation_draws=1,
)


# What works within an hour on two cores: see the README's table for what each part is worth.
_WORKS = Recipe(
    epochs=50,
    patience=50,
    batch_size=200,
    start="data",
    scale_limit=8.0,
    optimiser="adam",
    lr=5e-4,
    schedule="exponential",
    lr_decay=0.99993,
    warmup=500,
    momentum=0.9,
    averaging_squares=0.99,
    eps=1e-8,
    weight_decay=0.0,
    clip=5000.0,
    averaging=0.999,
    average_every=5,
    validation_draws=1,
    precision="bf16",
)
_WORKS_DEVIATIONS = (
    "The start: each conditioner's last layer is zero and log_scale comes from the data.",
    "Adam with learning rate 5e-4 after 500 steps of warm-up, times 0.99993 a step; the gradient's "
    "norm is clipped at 5,000, and the weights are averaged (0.999 a step).",
    "A tenth of the hidden units are dropped in training.",
    "Products have bfloat16 operands in training; sums and the stream are float32, and the figures "
    "are evaluated in float32.",
)
_REVERSING = (
    "Reordering features, and reversing them between couplings, is the partition's alternation.",
)
_UNIT = ("dequantise",)
_LOSSLESS = {"prior": "logistic", "partition": "checkerboard"}
_DISCRETE = (
    "nicefast's own, for lossless compression: the discrete likelihood of the levels, by exact "
    "couplings on their grid, gradients straight through the rounding (Hoogeboom et al. 2019, "
    "arXiv 1905.07376)."
)
_SYMMETRIC = ({"dequantise": {"low": -1.0, "high": 1.0}},)

PRESETS: dict[str, Preset] = {
    "digits": Preset(
        "digits",
        {"hidden": (256,), "couplings": 8, "prior": "logistic", "partition": "alternating"},
        _UNIT,
        Recipe(),
        "nicefast's own, for scikit-learn's 1,797 digits: a minute on two cores.",
        noise_draws=16,
    ),
    "digits-lossless": Preset(
        "digits",
        _LOSSLESS | {"hidden": (256,), "couplings": 8, "grid": 2.0**-5},
        ({"dequantise": {"high": 17 / 32}},),
        Recipe(objective="cells", validation_draws=1),
        _DISCRETE,
        noise_draws=1,
    ),
    "tabular": Preset(
        "",
        {"hidden": (128, 128), "couplings": 8, "prior": "logistic", "partition": "random"},
        ("dequantise", "standardise"),
        Recipe(
            epochs=60,
            patience=10,
            batch_size=512,
            lr=1e-3,
            schedule="cosine",
            weight_decay=0.01,
            averaging=0.999,
        ),
        "nicefast's own, for tables of real or integer values.",
    ),
    "mnist": Preset(
        "mnist",
        _MNIST | {"dropout": 0.1},
        _UNIT,
        _WORKS,
        "PAPER, section 5.1: the network, the prior and the range.",
        _WORKS_DEVIATIONS,
    ),
    "mnist-deep": Preset(
        "mnist",
        _MNIST
        | {"hidden": (1000, 1000), "couplings": 10, "partition": "checkerboard", "dropout": 0.15},
        _UNIT,
        replace(_WORKS, epochs=63),
        "nicefast's own: more couplings than the paper has, of shallower conditioners.",
        (*_WORKS_DEVIATIONS[:2], "15 % of the hidden units are dropped.", _WORKS_DEVIATIONS[3]),
    ),
    "mnist-lossless": Preset(
        "mnist",
        _LOSSLESS | {"hidden": (512, 512), "couplings": 6, "grid": 2.0**-8, "dropout": 0.1},
        _UNIT,
        replace(_WORKS, objective="cells", epochs=40, lr=1e-3, schedule="cosine"),
        _DISCRETE,
        noise_draws=1,
    ),
    "mnist-paper": Preset(
        "mnist", _MNIST, _UNIT, _PAPER, "PAPER, section 5.1, to the letter.", _PAPER_DEVIATIONS
    ),
    "mnist-2014": Preset(
        "mnist",
        _MNIST,
        _UNIT,
        _RELEASED,
        "RELEASED: exp/nice_mnist.yaml.",
        _REVERSING,
    ),
    "tfd": Preset(
        "tfd",
        _TFD,
        ("dequantise", {"whiten": {"kind": "approximate"}}),
        replace(_WORKS, precision="float32"),
        "PAPER, section 5.1: the network and the prior.",
        (
            *_WORKS_DEVIATIONS[:2],
            "The approximate whitening is fitted in closed form, where the paper learns it as a "
            "layer.",
            "4 hidden layers of 5,000 units: sources that quote the paper disagree on 4,000.",
        ),
    ),
    "tfd-2014": Preset(
        "tfd",
        {
            "hidden": tuple((2000,) * n for n in (3, 3, 2, 2, 1, 1, 1, 1)),
            "couplings": 8,
            "prior": "logistic",
            "partition": "alternating",
        },
        _UNIT,
        replace(_RELEASED, batch_size=128),
        "RELEASED: exp/nice_tfd.yaml.",
        _REVERSING,
    ),
    "svhn": Preset(
        "svhn",
        _WIDE,
        ("dequantise", {"whiten": {"kind": "zca"}}),
        replace(_WORKS, precision="float32"),
        "PAPER, section 5.1: the network, the prior, ZCA.",
        (*_WORKS_DEVIATIONS[:2], "ZCA's regularisation, which the paper does not give."),
    ),
    "svhn-2014": Preset(
        "svhn",
        {"hidden": (2000,) * 3, "couplings": 4, "prior": "normal", "partition": "half"},
        _UNIT,
        _RELEASED,
        "RELEASED: exp/nice_svhn.yaml.",
        ("Features are in the order channel, row, column.",),
    ),
    "cifar10": Preset(
        "cifar10",
        _WIDE,
        (*_SYMMETRIC, {"whiten": {"kind": "zca"}}),
        replace(_WORKS, precision="bf16"),
        "PAPER, section 5.1: the network, the prior, the range [-1, 1], ZCA.",
        (*_WORKS_DEVIATIONS[:2], "ZCA's regularisation, which the paper does not give."),
    ),
    "cifar10-2014": Preset(
        "cifar10",
        {
            "hidden": tuple((2400,) * n for n in (1, 1, 3, 3, 2, 2, 1, 1)),
            "couplings": 8,
            "prior": "normal",
            "partition": "half",
        },
        _SYMMETRIC,
        replace(_RELEASED, lr=2e-4, lr_least=1e-5),
        "RELEASED: exp/nice_cifar10.yaml.",
        ("Features are in the order channel, row, column.",),
    ),
}
