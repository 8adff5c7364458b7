"""A flow as a file that runs without nicefast: torch.export, AOTInductor, ONNX.

What is exported is the plain path, written over :mod:`nicefast.reference`: conditioners, index_add,
and the prior, in float64; PyTorch's own operators and nothing else. The number of rows stays free.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from .. import reference
from ..checks import check_choice, check_path
from ..flow import NICE
from ..layers import AdditiveCoupling, is_plain_scaling, runs_more_than_forward
from .files import written

METHODS = ("log_prob", "sample")


def export_program(
    model: NICE, path: str | os.PathLike[str], method: str = "log_prob", compiled: bool = False
) -> None:
    """``log_prob`` or ``sample`` of ``model`` as a ``.pt2`` file, which needs PyTorch alone.

    Read it by ``torch.export.load(path).module()`` or, where it is ``compiled``, by
    ``torch._inductor.aoti_load_package(path)``; either is called, by position, with

        log_prob  x (N, \\*event_shape)                             -> log_prob (N), in nats
        sample    rows (N), int64, >= 0; seed (), int64, >= 0      -> x (N, \\*event_shape)

    and, last, context (N, K) where the flow takes one. N is free; x and context are of
    ``model.dtype``, all tensors on the device where the model is. Entry i of a sample depends on
    ``rows[i]`` and the seed alone: rows 0 .. n-1 are what :meth:`nicefast.NICE.sample` draws from
    that seed, and a sample may be cut anywhere. The numbers are the model's to rounding, in
    evaluation mode (no dropout). The model is left as it is; the file keeps no tie to it.

    A ``compiled`` file is an AOTInductor package: machine code for this kind of processor and this
    version of PyTorch, made by its C++ compiler. Load files of either kind only from those you
    trust: ``torch.export.load`` evaluates expressions and may unpickle (:func:`nicefast.load` never
    does), and a package is a library.

    The file is written beside its destination and renamed when complete.

    Args:
        model: its conditioners may be any modules that ``torch.export`` can trace.
        path: ends in ``.pt2``.
        method: ``"log_prob"`` or ``"sample"``.
        compiled: compile it now.

    Raises:
        TypeError: ``model`` is no :class:`nicefast.NICE`.
        ValueError: an unknown method, a path of another ending, a flow with a grid, or one with
            couplings that are more than :class:`nicefast.AdditiveCoupling`.

    >>> import tempfile, torch, nicefast as nf
    >>> flow, x = nf.NICE(4, hidden=(8,)), torch.ones(3, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nf.export_program(flow, folder + "/flow.pt2")
    ...     log_prob = torch.export.load(folder + "/flow.pt2").module()
    >>> torch.allclose(log_prob(x), flow.log_prob(x), atol=1e-5)
    True
    """
    program = _program(model, path, method, ".pt2")
    with written(path) as partial:
        if compiled:
            from torch._inductor import aoti_compile_and_package

            aoti_compile_and_package(program, package_path=str(partial))
        else:
            torch.export.save(program, partial)


def export_onnx(model: NICE, path: str | os.PathLike[str], method: str = "log_prob") -> None:
    """``log_prob`` or ``sample`` of ``model`` as an ONNX file.

    Inputs (``x``, or ``rows`` and ``seed``, and ``context`` where the flow takes one), output
    (named as the method) and errors as in :func:`export_program`; the path ends in ``.onnx``.
    ImportError where onnx and onnxscript are not installed; ValueError also for a flow whose
    parameters take more than the 2 GB that one ONNX file holds.

    >>> import tempfile, onnxruntime, torch, nicefast as nf
    >>> flow, x = nf.NICE(4, hidden=(8,)), torch.ones(3, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nf.export_onnx(flow, folder + "/flow.onnx")
    ...     session = onnxruntime.InferenceSession(folder + "/flow.onnx")
    >>> (log_prob,) = session.run(["log_prob"], {"x": x.numpy()})
    >>> torch.allclose(torch.from_numpy(log_prob), flow.log_prob(x), atol=1e-5)
    True
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError(
            "ONNX export needs onnx and onnxscript: pip install 'nicefast[onnx]'"
        ) from None
    program = _program(model, path, method, ".onnx")
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size >= 2**31 - 2**20:
        raise ValueError(f"model must be smaller than 2 GB for an ONNX file, got {size:,} bytes")
    names = list(_example(model, method))
    onnx_program = torch.onnx.export(
        program, input_names=names, output_names=[method], dynamo=True, verbose=False
    )
    assert onnx_program is not None
    with written(path) as partial:
        onnx_program.save(partial, external_data=False)


class _Plain(nn.Module):
    """What both methods share: the flow's own conditioners, and its indices as buffers."""

    def __init__(self, model: NICE) -> None:
        super().__init__()
        device = model.scaling.log_scale.device
        self.event_shape, self.features = tuple(model.event_shape), model.features
        self.prior, self.dtype = model.prior_name, model.dtype
        couplings = cast("list[AdditiveCoupling]", list(model.couplings))
        self.conditioners = nn.ModuleList(c.conditioner for c in couplings)
        self.log_scale = model.scaling.log_scale
        for i, coupling in enumerate(couplings):
            for side in ("conditioning", "shifted"):
                index = getattr(coupling.partition, side).to(device)
                self.register_buffer(f"{side}_{i}", index)

    def couple(self, h: Tensor, context: Tensor | None, inverse: bool = False) -> Tensor:
        order = range(len(self.conditioners))
        for i in reversed(order) if inverse else order:
            h1 = reference.select_features(h, getattr(self, f"conditioning_{i}"))
            given = (h1,) if context is None else (h1, context)
            shift = self.conditioners[i](*given)
            h = reference.additive_coupling(h, shift, getattr(self, f"shifted_{i}"), inverse)
        return h


class _LogProb(_Plain):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        # float64 until one rounding: a sum's order differs, and float32 would lose digits to that
        s = self.log_scale.double()
        z = self.couple(x.flatten(1), context) * torch.exp(s)
        if self.prior == "logistic":  # logsigmoid becomes log(sigmoid(z)) in ONNX: no tail
            a = torch.abs(z)
            terms = -a - 2 * torch.log1p(torch.exp(-a))
        else:
            terms = reference.prior_log_prob(z, self.prior)
        return (terms.sum(1) + s.sum()).to(self.dtype)


class _Sample(_Plain):
    def forward(self, rows: Tensor, seed: Tensor, context: Tensor | None = None) -> Tensor:
        key = cast("int", seed)  # the generator's arithmetic is that of either
        more = torch.cat((rows, rows.new_zeros(1)))  # the generator can't reshape no rows at all
        z = reference.prior_noise(more, self.features, key, self.prior, self.dtype)[:-1]
        h = z * torch.exp(-self.log_scale.to(self.dtype))
        return self.couple(h, context, inverse=True).unflatten(1, self.event_shape)


def _program(
    model: NICE, path: str | os.PathLike[str], method: str, suffix: str
) -> torch.export.ExportedProgram:
    """The exported program, after a look at the arguments."""
    if not isinstance(model, NICE):
        raise TypeError(f"model must be a nicefast.NICE, got {type(model).__name__}")
    check_choice("method", method, METHODS)
    check_path("path", path)
    if Path(path).suffix != suffix:
        raise ValueError(f"path must end in {suffix}, got {os.fspath(path)!r}")
    if model.grid is not None:
        raise ValueError(
            f"model must have no grid, got {model.grid:g}: integer arithmetic is not exported; "
            "take model.with_grid(None)"
        )
    for i, coupling in enumerate(model.couplings):
        if type(coupling) is not AdditiveCoupling or runs_more_than_forward(coupling):
            raise ValueError(
                f"model must have plain couplings, but coupling {i} is of another class "
                f"({type(coupling).__name__}), or has hooks or a forward of its own"
            )
    if not is_plain_scaling(model.scaling):
        raise ValueError(
            f"model must have a plain Scaling, but its scaling ({type(model.scaling).__name__}) is "
            "of another class, or has hooks, a forward or a log_scale of its own"
        )
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    plain = (_LogProb if method == "log_prob" else _Sample)(frozen).eval()
    given = _example(model, method)
    rows = torch.export.Dim("N", min=0)
    free = tuple({0: rows} if t.ndim else None for t in given.values())
    with torch.no_grad():
        # strict: len() of a tensor stays free only where the compiler reads it
        return torch.export.export(plain, tuple(given.values()), dynamic_shapes=free, strict=True)


def _example(model: NICE, method: str) -> dict[str, Tensor]:
    """The arguments of a call with a few rows, by name."""
    n, device = 3, model.scaling.log_scale.device
    given: dict[str, Tensor]
    if method == "log_prob":
        given = {"x": torch.zeros(n, *model.event_shape, dtype=model.dtype, device=device)}
    else:
        seed = torch.zeros((), dtype=torch.int64, device=device)
        given = {"rows": torch.arange(n, device=device), "seed": seed}
    if model.context:
        given["context"] = torch.zeros(n, model.context, dtype=model.dtype, device=device)
    return given
