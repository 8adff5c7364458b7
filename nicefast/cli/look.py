"""Pictures of a finished run: samples, inpainting, the spectrum, interpolation, density maps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from .. import plots
from ..data import TOYS, Dataset, load_data, toy_log_prob
from ..inpainting import inpaint, masks
from ..preprocessing import Preprocessing
from ..runs import CONFIG
from ..training import Configuration
from .common import app, console, finished, one_line_errors
from .fit import DataDir

Run = Annotated[Path, typer.Argument(help="A run folder, as `nicefast fit` writes it.")]
Out = Annotated[
    Path | None, typer.Option(help="PNG; by default in the run folder.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Of all noise.", min=0)]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")]


@app.command("sample")
def sample_command(
    run: Run,
    out: Out = None,
    count: Annotated[int, typer.Option(help="How many samples.", min=1)] = 100,
    temperature: Annotated[
        float, typer.Option(help="Latents are multiplied by it: below 1, more typical.", min=0)
    ] = 1.0,
    neighbours: Annotated[
        bool, typer.Option(help="Beside each sample, the nearest training row.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
) -> None:
    """Draw samples of the model of RUN."""
    with one_line_errors():
        model, steps = finished(run, device)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            x = model.sample(count, generator=generator)
            if temperature != 1:  # the latents of that very sample, nearer to the middle
                x, _ = model.inverse(temperature * model(x)[0])
        path = out or run / ("neighbours.png" if neighbours else "sample.png")
        if neighbours:
            data = _data(run, data_dir)
            train = steps.forward(data.train, seed)[0]
            index, distance = plots.nearest(x.cpu(), train)
            pairs = (_shown(x, steps, data.levels), _shown(train[index], steps, data.levels))
            plots.plot_neighbours(*pairs, path, distance)
            console().print(
                f"nearest training row: {distance.min():.3g} to {distance.max():.3g} away, "
                f"median {distance.median():.3g} (Euclidean, preprocessed)"
            )
        else:
            levels = _data(run, data_dir).levels
            plots.sample_grid(_shown(x, steps, levels), path)
        console().print(f"wrote {path}", soft_wrap=True)


@app.command("inpaint")
def inpaint_command(
    run: Run,
    out: Out = None,
    method: Annotated[str, typer.Option(help="adam, or paper: projected ascent.")] = "adam",
    steps: Annotated[int, typer.Option(help="Updates.", min=0)] = 500,
    seed: Seed = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
) -> None:
    """Fill in ten test images of RUN, each behind one of the paper's ten masks."""
    with one_line_errors():
        model, preprocessing = finished(run, device)
        data = _data(run, data_dir)
        _check_images(run, data.event_shape)
        hidden = masks(data.event_shape[-2], data.event_shape[-1], seed)
        raw = _test_rows(data, len(hidden), seed)
        first, rest = preprocessing.split()
        x, _ = first.forward(raw, seed)
        low, high = first.bounds()
        observed = torch.stack(list(hidden.values())).view(
            len(hidden), *[1] * (x.ndim - 3), *data.event_shape[-2:]
        )
        found = inpaint(
            model,
            x.to(device),
            observed.to(device),
            method=method,
            steps=steps,
            seed=seed,
            low=low,
            high=high,
            transform=rest.forward if rest.steps else None,
        )
        path = out or run / f"inpainting-{method}.png"
        before, after = ((t.cpu() - low) / (high - low) for t in (x, found.x))
        seen = torch.stack(list(hidden.values()))
        plots.plot_inpainting(
            before, seen, after, found.log_prob.cpu(), path, list(hidden), found.steps
        )
        screen = console()
        screen.print(f"log p(x_O, x_H), nats, before and after {steps} steps:")
        for i, name in enumerate(hidden):
            empty, full = found.log_prob[0, i].item(), found.log_prob[-1, i].item()
            screen.print(f"  {name:<16} {empty:>12.1f} {full:>10.1f}")
        screen.print(f"wrote {path}", soft_wrap=True)


@app.command("spectrum")
def spectrum_command(run: Run, out: Out = None) -> None:
    """Draw sigma_d = exp(-log_scale_d) of RUN, sorted: the paper's figure 8."""
    with one_line_errors():
        model, _ = finished(run)
        path = out or run / "spectrum.png"
        log_scale = model.scaling.log_scale.detach()
        shape = model.event_shape if plots.is_image(model.event_shape) else None
        plots.plot_spectrum(log_scale, path, shape)
        console().print(f"wrote {path}", soft_wrap=True)


@app.command("interpolate")
def interpolate_command(
    run: Run,
    out: Out = None,
    pairs: Annotated[int, typer.Option(help="How many pairs of test rows.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Images in a row, both ends among them.", min=2)] = 10,
    seed: Seed = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
) -> None:
    """Go from one test image of RUN to another on a line in latent space."""
    with one_line_errors():
        model, steps = finished(run, device)
        data = _data(run, data_dir)
        _check_images(run, data.event_shape)
        ends = steps.forward(_test_rows(data, 2 * pairs, seed), seed)[0].to(device)
        with torch.no_grad():
            between = plots.interpolate(model, ends[0::2], ends[1::2], length)
        shown = _shown(between.flatten(0, 1), steps, data.levels)
        path = out or run / "interpolation.png"
        plots.plot_interpolation(shown.view(*between.shape), path)
        console().print(f"wrote {path}", soft_wrap=True)


@app.command("density")
def density_command(
    run: Run, out: Out = None, device: Device = "cpu", data_dir: DataDir = None
) -> None:
    """Draw the learned density of a run on two features beside the true one, or beside the data."""
    with one_line_errors():
        model, steps = finished(run, device)
        if model.features != 2:
            raise ValueError(f"RUN {run} has {model.features} features, density needs 2")
        data = _data(run, data_dir)
        raw = data.test.double()
        margin = 0.1 * (raw.amax(0) - raw.amin(0))
        low, high = raw.amin(0) - margin, raw.amax(0) + margin

        def learned(points: Tensor) -> Tensor:
            x, log_det = steps.exact(points.float())
            with torch.no_grad():
                return model.log_prob(x.to(device)).cpu().double() + log_det

        if data.name in TOYS:
            gap = (toy_log_prob(data.name, raw) - learned(raw)).mean().item()
            console().print(f"true minus learned log-density on test rows: {gap:.3f} nats")
        path = out or run / "density.png"
        bounds = (low[0].item(), high[0].item(), low[1].item(), high[1].item())
        true = raw if data.name not in TOYS else lambda rows: toy_log_prob(data.name, rows)
        plots.plot_density(learned, true, bounds, path, data.name)
        console().print(f"wrote {path}", soft_wrap=True)


def _data(run: Path, data_dir: Path | None) -> Dataset:
    settings = Configuration.of_file(run / CONFIG)
    return load_data(settings.data, data_dir, header=settings.header)


def _test_rows(data: Dataset, count: int, seed: int) -> Tensor:
    """So many rows of the test set, at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.test), generator=generator, device="cpu")
    return data.test[order[:count]]


def _check_images(run: Path, event_shape: tuple[int, ...]) -> None:
    if not plots.is_image(event_shape):
        raise ValueError(f"RUN {run} is of rows of shape {event_shape}, which are no images")


def _shown(x: Tensor, steps: Preprocessing, levels: int | None) -> Tensor:
    """Preprocessed rows as values in [0, 1]: between two levels, the lower one."""
    raw = steps.inverse(x.detach().cpu())
    return raw if levels is None else raw.floor().clamp(0, levels - 1) / (levels - 1)
