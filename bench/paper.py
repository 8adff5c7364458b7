"""Finished runs of one preset as a table: `python -m bench.paper RUN [RUN ...] --out FOLDER`.

Copies everything of each run but its tensors into FOLDER, and writes FOLDER/README.md: figures of
each seed, their mean, and what the paper reports.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nicefast.training import PRESETS, Configuration

REPORTED = {"mnist": 1980.50, "tfd": 5514.71, "svhn": 11496.55, "cifar10": 5371.78}
LEFT_OUT = (".safetensors",)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(argv)
    try:
        print(gather(options.runs, options.out).read_text())
    except ValueError as error:
        print(f"python -m bench.paper: {error}", file=sys.stderr)
        return 2
    return 0


def gather(runs: Sequence[Path], out: Path) -> Path:
    """Copy the runs and write the table; ValueError where they are not runs of one preset."""
    found = [(run, *_read(run)) for run in runs]
    presets = {config.preset for _, config, _ in found}
    if len(presets) != 1:
        raise ValueError(f"runs must be of one preset, got {', '.join(sorted(presets))}")
    recipes = [config.changed({"seed": 0, "device": "cpu"}).values() for _, config, _ in found]
    if any(recipe != recipes[0] for recipe in recipes):
        raise ValueError("runs must differ in their seeds alone")
    out.mkdir(parents=True, exist_ok=True)
    for run, config, _ in found:
        folder = out / f"seed-{config.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in run.iterdir():
            if path.is_file() and path.suffix not in LEFT_OUT:
                shutil.copy(path, folder / path.name)
    table = out / "README.md"
    table.write_text("\n".join(_table(found)) + "\n")
    return table


def _read(run: Path) -> tuple[Configuration, dict[str, Any]]:
    try:
        result = json.loads((run / "result.json").read_text())
    except OSError:
        raise ValueError(f"{run} is no finished run: it has no result.json") from None
    return Configuration.of_file(run / "config.toml"), result


def _table(found: Sequence[tuple[Path, Configuration, dict[str, Any]]]) -> Iterator[str]:
    _, config, first = found[0]
    preset = PRESETS[config.preset]
    yield f"# {config.preset}"
    yield ""
    yield f"`nicefast fit --preset {config.preset} --seed SEED`. {preset.source}"
    yield ""
    yield from (f"- {deviation}" for deviation in preset.deviations)
    yield ""
    header = "seed", "epochs, best", "validation", "test, nats", "over draws", "bits/dim"
    yield f"| {' | '.join((*header, 'minutes', 'threads'))} |"
    yield "| --- |" + " ---: |" * 7
    for _, own, result in sorted(found, key=lambda entry: entry[1].seed):
        score, fit = result["held_out"]["NICE"], result["fit"]
        yield (
            f"| {own.seed} | {fit['epochs']}, {fit['best_epoch']} | {fit['best_validation']:.1f} "
            f"| **{score['log_prob']:.2f}** ± {score['standard_error']:.2f} "
            f"| {score['draw_spread']:.3f} | {score['bits_per_dim']:.4f} "
            f"| {fit['seconds'] / 60:.0f} | {result['versions']['threads']} |"
        )
    tests = [result["held_out"]["NICE"]["log_prob"] for _, _, result in found]
    if len(tests) > 1:
        yield ""
        yield f"Mean of {len(tests)} seeds: {statistics.mean(tests):.2f} nats, standard deviation "
        yield f"{statistics.stdev(tests):.2f}."
    if reported := REPORTED.get(first["data"]["name"]):
        yield ""
        yield f"The paper reports {reported:.2f} nats."
    others = {k: v for k, v in first["held_out"].items() if k != "NICE"}
    for name, score in others.items():
        yield f"The {name} of the same training rows has {score['log_prob']:.2f}."
    yield ""
    rows, noise = first["data"]["rows"], first["noise"]
    yield (
        f"{rows['train']:,} training, {rows['validation']:,} validation and {rows['test']:,} test "
        f"rows, {first['parameters']:,} parameters. The epoch is chosen on validation, of averaged "
        "weights; the test rows are scored once, in float32, "
        f"with {noise['draws']} noise draws each. {noise['protocol']}"
        if noise
        else f"{rows['test']:,} test rows, scored once."
    )
    yield ""
    versions = first["versions"]
    yield f"{versions['platform']}, torch {versions['torch']}, device {versions['device']}."


if __name__ == "__main__":
    sys.exit(main())
