"""Everything that decides a fit, from a preset, a TOML file and changes, and back to TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..checks import as_integer, check_choice, check_type
from .fitting import check_training_seed
from .presets import PRESETS
from .recipe import Recipe

MODEL = ("hidden", "couplings", "prior", "partition", "activation", "dropout", "grid")


@dataclass(frozen=True)
class Configuration:
    """A fit, complete: run again, it gives the same figures on the same machine.

    Attributes:
        data: name of a data set, or path of a file.
        model: arguments of :class:`nicefast.NICE`, but for ``features``.
        preprocessing: steps, as :meth:`nicefast.preprocessing.Preprocessing.fit` takes them.
        recipe: how it is trained.
        preset: which preset it began as, for people.
        seed: of initial weights, shuffling, dropout and all noise.
        noise_draws: for each held-out row.
        device: where to train.
        header: whether the first line of a ``.csv`` is one: "auto", "yes" or "no".

    >>> config = Configuration.of_preset("digits").changed({"seed": 3, "recipe.lr": 1e-3})
    >>> config.seed, config.recipe.lr
    (3, 0.001)
    """

    data: str
    model: Mapping[str, Any]
    preprocessing: tuple[Any, ...]
    recipe: Recipe = field(default_factory=Recipe)
    preset: str = ""
    seed: int = 0
    noise_draws: int = 16
    device: str = "cpu"
    header: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.data, str) or not self.data:
            raise ValueError("data must name a data set or a file: this preset leaves it to you")
        check_type("model", self.model, Mapping, "a mapping")
        check_type("recipe", self.recipe, Recipe, "a Recipe")
        if unknown := [key for key in self.model if key not in MODEL]:
            raise ValueError(f"model.{unknown[0]} is unknown: one of {', '.join(MODEL)}")
        object.__setattr__(self, "seed", check_training_seed(self.seed))
        if (draws := as_integer(self.noise_draws)) is None or draws < 1:
            raise ValueError(f"noise_draws must be at least 1, got {self.noise_draws}")
        object.__setattr__(self, "noise_draws", draws)

    @classmethod
    def of_preset(cls, name: str, data: str | None = None) -> Configuration:
        """Of :data:`nicefast.training.presets.PRESETS`, on its own data or on ``data``."""
        check_choice("preset", name, PRESETS)
        p = PRESETS[name]
        return cls(
            data or p.data,
            dict(p.model),
            p.preprocessing,
            p.recipe,
            name,
            noise_draws=p.noise_draws,
        )

    @classmethod
    def of_file(cls, path: str | Path) -> Configuration:
        """Of a TOML file: a whole configuration, or a ``preset`` and what differs from it.

        Raises ValueError for a file that is missing, no TOML, or has an unknown key.
        """
        try:
            content = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise ValueError(f"config: {path} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"config: {path} is no TOML: {error}") from None
        name = content.pop("preset", "") or None
        changes = _flat(content)
        try:
            if name is not None:
                return cls.of_preset(name, content.get("data")).changed(changes)
            start = cls(str(content.get("data", "")), {}, ("dequantise",))
            return start.changed(changes)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config: {path}: {error}") from None

    def changed(self, changes: Mapping[str, Any]) -> Configuration:
        """With values replaced: keys such as ``seed``, ``model.hidden`` and ``recipe.lr``."""
        top: dict[str, Any] = {}
        model, recipe = dict(self.model), {}
        for key, value in changes.items():
            section, _, name = key.partition(".")
            if section == "model" and name in MODEL:
                model[name] = _tuples(value)
            elif section == "recipe" and name in RECIPE:
                recipe[name] = _tuples(value)
            elif section in TOP and not name:
                top[section] = _tuples(value)
            else:
                known = [*TOP, *(f"model.{m}" for m in MODEL), *(f"recipe.{r}" for r in RECIPE)]
                raise ValueError(f"{key!r} is no key of a configuration: {', '.join(known)}")
        return replace(self, model=model, recipe=replace(self.recipe, **recipe), **top)

    def values(self) -> dict[str, Any]:
        """As plain values, as TOML has them."""
        found = {name: getattr(self, name) for name in TOP}
        return found | {"model": dict(self.model), "recipe": asdict(self.recipe)}

    def toml(self) -> str:
        """What :meth:`of_file` reads back."""
        import tomli_w

        return tomli_w.dumps(_lists(self.values()))


TOP = tuple(f.name for f in fields(Configuration) if f.name not in ("model", "recipe"))
RECIPE = tuple(f.name for f in fields(Recipe))


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if key in ("model", "recipe") and isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lists(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_lists(inner) for inner in value]
    return value
