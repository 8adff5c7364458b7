"""A small fit, which tests run in this process and in others."""

import torch

import nicefast as nf
from nicefast.data import Dataset
from nicefast.preprocessing import Preprocessing
from nicefast.training import Recipe, fit

RECIPE = Recipe(lr=1e-2, batch_size=32, epochs=12)


def tiny_data(levels: int | None = 4) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(150, 4, generator=generator)
    z[:, 1] += z[:, 0].square()
    rows = z if levels is None else (z + 1.5).clamp(0, levels - 1).to(torch.uint8)
    return Dataset("tiny", levels, rows[:100], rows[100:120], rows[120:])


def tiny_model(seed: int = 0, **options) -> nf.NICE:
    torch.manual_seed(seed)
    return nf.NICE(4, **{"hidden": (8,), "couplings": 2} | options)


def unit(rows, levels) -> Preprocessing:
    return Preprocessing.fit(["dequantise"] if levels else [], rows, levels)


def flat(model: nf.NICE) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fit_tiny(model, data=None, recipe=RECIPE, **options):
    data = tiny_data() if data is None else data
    return fit(model, data, unit(data.train, data.levels), recipe, **options)
