"""NICEClassifier's probabilities beside logistic regression's: `python -m bench.classification`.

    python -m bench.classification [--seeds 3] [--quick] [--out bench/results/classification]

Log loss and accuracy on held-out rows of four small sets that come with scikit-learn: as the
classifier was in 0.1, with today's weight decay, and calibrated, which is the default. Writes
table.md and results.ndjson (a line for each measurement) to --out; what was there is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nicefast.sklearn import NICEClassifier

from .estimators import Array, timed

SETS: dict[str, tuple[str, Callable[..., Any]]] = {
    "breast-cancer": ("Breast cancer", load_breast_cancer),
    "wine": ("Wine", load_wine),
    "iris": ("Iris", load_iris),
    "digits": ("Digits", load_digits),
}
FIRST_SEED = 20  # others were looked at while the defaults were chosen
TEST_SHARE = 0.3
GOAL = 0.1  # nats of log loss that NICEClassifier may be behind by
REFERENCE = "LogisticRegression"
NICE = (
    "NICEClassifier as in 0.1",
    "NICEClassifier(weight_decay=1)",
    "NICEClassifier(calibrate=False)",
    "NICEClassifier",
)
QUICK_FIT = {"hidden": (16,), "couplings": 2, "epochs": 3}

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.classification", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="splits and fits")
    parser.add_argument("--quick", action="store_true", help="small flows, short fits: a trial")
    parser.add_argument("--out", type=Path, default=Path("bench/results/classification"))
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    torch.set_num_threads(1)  # of such small products
    options.out.mkdir(parents=True, exist_ok=True)
    found: list[Record] = []
    for record in measure(options.seeds, options.quick):
        found.append(record)
        print(
            f"{record['data']:>14} seed {record['seed']} {record['method']}: log loss "
            f"{record['log_loss']:.3f}, accuracy {record['accuracy']:.3f}",
            flush=True,
        )
    lines = (json.dumps(record) + "\n" for record in found)
    (options.out / "results.ndjson").write_text("".join(lines))
    text = table(found, options.quick)
    (options.out / "table.md").write_text(text)
    print("\n" + text)
    return 0


def measure(seeds: int, quick: bool) -> Iterator[Record]:
    """A record for each set, seed and method. Test rows are scored once by each model."""
    for name, (_, load) in SETS.items():
        x, y = load(return_X_y=True)
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            train, test, labels, truth = train_test_split(
                x, y, test_size=TEST_SHARE, random_state=seed, stratify=y
            )
            yield from _measure_split(name, seed, train, labels, test, truth, quick)


def _measure_split(
    name: str, seed: int, train: Array, labels: Array, test: Array, truth: Array, quick: bool
) -> Iterator[Record]:
    def record(method: str, log_proba: Array, seconds: float, temperature: float) -> Record:
        return {
            "data": name,
            "method": method,
            "seed": seed,
            "log_loss": float(-log_proba[np.arange(len(truth)), truth].mean()),
            "accuracy": float((log_proba.argmax(1) == truth).mean()),
            "sure": float((log_proba.max(1) > np.log(0.99)).mean()),
            "temperature": temperature,
            "fit_seconds": seconds,
            "rows": [len(train), len(test)],
            "columns": train.shape[1],
            "classes": int(truth.max()) + 1,
        }

    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    _, seconds = timed(lambda: logistic.fit(train, labels))
    yield record(REFERENCE, logistic.predict_log_proba(test), seconds, 1.0)
    fit: dict[str, Any] = {"drop_constant": True, "random_state": seed}
    fit |= QUICK_FIT if quick else {}
    for decay, methods in (({"weight_decay": 1.0}, NICE[:2]), ({}, NICE[2:])):
        made = NICEClassifier(**fit, **decay)
        _, seconds = timed(lambda m=made: m.fit(train, labels))
        joint = made.predict_joint_log_proba(test)  # of both: only the temperature differs
        for method, temperature in zip(methods, (1.0, made.temperature_), strict=True):
            scores = joint / temperature
            scores = scores - scores.max(1, keepdims=True)
            log_proba = scores - np.log(np.exp(scores).sum(1, keepdims=True))
            yield record(method, log_proba, seconds, temperature)


def table(records: Sequence[Record], quick: bool = False) -> str:
    """Markdown: mean and standard deviation over seeds, and on how many sets the goal is met."""
    seeds = sorted({r["seed"] for r in records})
    command = f"python -m bench.classification --seeds {len(seeds)}{' --quick' if quick else ''}"
    lines = [
        "| data | rows | method | log loss, nats | accuracy | beyond 0.99 | temperature | fit, s |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    met, sets = [], list(dict.fromkeys(r["data"] for r in records))
    for data in sets:
        mean = {}
        for method in (REFERENCE, *NICE):
            own = [r for r in records if (r["data"], r["method"]) == (data, method)]
            mean[method] = np.mean([r["log_loss"] for r in own])
            first = own[0]
            shape = " / ".join(map(str, first["rows"])) + f" x {first['columns']}"
            cells = [SETS[data][0], f"{shape}, {first['classes']} classes", method]
            cells += [_spread(own, "log_loss"), _spread(own, "accuracy"), _spread(own, "sure")]
            cells.append(", ".join(f"{r['temperature']:.1f}" for r in own))
            cells.append(f"{np.mean([r['fit_seconds'] for r in own]):.1f}")
            lines.append(f"| {' | '.join(cells)} |")
        if mean[NICE[-1]] <= mean[REFERENCE] + GOAL:
            met.append(SETS[data][0])
    return (
        f"# NICEClassifier's probabilities beside logistic regression's\n\n"
        f"Written by `{command}`: mean over {len(seeds)} seeds of split and fit (from "
        f"{seeds[0]}), +- their standard deviation.\n\n{_PROTOCOL}\n"
        + "\n".join(lines)
        + f"\n\nThe calibrated log loss is within {GOAL} nats of logistic regression's, or better, "
        f"on {len(met)} of {len(sets)} sets{': ' + ', '.join(met) if met else ''}.\n"
    )


def _spread(records: Sequence[Record], field: str) -> str:
    values = [r[field] for r in records]
    return f"{np.mean(values):.3f} +- {np.std(values):.3f}"


_PROTOCOL = """\
Rows are split at random by the seed, classes in proportion: 70 % to fit, 30 % to test. Each model
scores the test rows once. Logistic regression is scikit-learn's default on standardised columns.
NICEClassifier chooses its epochs and its temperature on a tenth of the rows that it is fitted to.
"As in 0.1" has weight_decay=1 and no temperature; the two after it have one of today's defaults
each, a temperature or weight_decay="auto"; the last has both, as NICEClassifier comes. "Beyond
0.99" is the share of test rows with a class of that probability. Times are of one thread.

The rule of weight_decay="auto" and the smoothing of the temperature were chosen on rows of the
training parts of other splits (seeds 10 to 12), and an early trial looked at the test rows of
seeds 0 and 1. The sets are small: the same rows come back in other splits, so these numbers say
what the defaults do on sets that they were chosen with. Four sets say nothing of large ones.
"""


if __name__ == "__main__":
    sys.exit(main())
