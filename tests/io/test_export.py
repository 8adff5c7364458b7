"""Exported flows, read where nicefast cannot be imported, against the flow itself."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import nicefast as nf

# runs an exported file where importing nicefast fails
READER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nicefast", "kernels"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
import torch
results = []
for path, given in torch.load("calls", weights_only=True):
    if path.startswith("package"):
        call = torch._inductor.aoti_load_package(path)
    else:
        program = torch.export.load(path)
        targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert all(t.startswith(("aten.", "<built-in")) for t in targets), targets
        call = program.module()
    results.append([call(*arguments) for arguments in given])
torch.save(results, "results")
assert not any(name.split(".")[0] == "nicefast" for name in sys.modules)
"""
ROWS = (0, 1, 5, 300)
SEED = 2**62 + 12345678901


def flow(event_shape=(1, 5, 3), dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nf.NICE(event_shape, hidden=(8,), couplings=2, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.to(dtype)


def arguments(model, method, n):
    torch.manual_seed(n)
    context = (torch.randn(n, model.context, dtype=model.dtype),) if model.context else ()
    if method == "sample":
        return (torch.arange(n) + 7, torch.tensor(SEED), *context)
    x = torch.randn(n, *model.event_shape, dtype=model.dtype)
    x[1:2] *= 1e3  # where the prior's tail is all that counts
    return (x, *context)


@torch.no_grad()
def expected(model, method, given):
    if method == "log_prob":
        return model.log_prob(*given)
    rows, seed, *context = given
    h = nf.functional.sample_prior(
        model.scaling.log_scale,
        len(rows),
        model.prior_name,
        seed=int(seed),
        row_offset=7,
        dtype=model.dtype,
    )
    z = h * model.scaling.log_scale.exp()
    return model.inverse(z.view(len(rows), *model.event_shape), *context)[0]


def check(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    limit = 1e-12 if want.dtype == torch.float64 else 1e-5
    assert ((got - want).abs() <= limit * want.abs().clamp(min=1)).all()


CASES = [
    ({}, "log_prob"),
    ({"context": 2, "partition": "random"}, "sample"),
    (
        {
            "prior": "normal",
            "context": 2,
            "dtype": torch.float64,
            "dropout": 0.5,
            "partition": "checkerboard",
        },
        "log_prob",
    ),
    ({"prior": "normal", "dtype": torch.float64, "partition": "half"}, "sample"),
]


def run_elsewhere(folder, cases, kind="program"):
    """Export each flow, call all files in another process, and compare."""
    models, calls = [], []
    for i, (options, method) in enumerate(cases):
        model = flow(**options)
        path = f"{kind}{i}.pt2"
        nf.export_program(model, folder / path, method, compiled=kind == "package")
        assert model.training
        assert all(p.requires_grad for p in model.parameters())
        models.append((model.eval(), method))
        calls.append((path, [arguments(model, method, n) for n in ROWS]))
    torch.save(calls, folder / "calls")
    subprocess.run([sys.executable, "-c", READER], check=True, cwd=folder)
    results = torch.load(folder / "results")
    for (model, method), (_, given), got in zip(models, calls, results, strict=True):
        for one, result in zip(given, got, strict=True):
            check(result, expected(model, method, one))
    assert {p.name for p in folder.iterdir()} == {"calls", "results", *(path for path, _ in calls)}


@pytest.mark.parametrize("cases", [CASES[:2], pytest.param(CASES[2:], marks=pytest.mark.long)])
def test_programs_run_without_nicefast(tmp_path, cases):
    run_elsewhere(tmp_path, cases)


@pytest.mark.long
def test_a_package_runs_without_nicefast(tmp_path):
    if not any(shutil.which(c) for c in (os.environ.get("CXX", ""), "g++", "clang++")):
        pytest.skip("needs a C++ compiler")
    run_elsewhere(tmp_path, [({"context": 2}, "log_prob")], "package")


@pytest.mark.parametrize(
    ("options", "method"),
    [
        pytest.param(
            {"event_shape": (1, 8, 8), "context": 2, "partition": "checkerboard"},
            "log_prob",
            id="log_prob, context",
        ),
        pytest.param({"partition": "random"}, "sample", id="sample", marks=pytest.mark.long),
    ],
)
def test_onnxruntime_agrees(tmp_path, options, method):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = flow(**options)
    nf.export_onnx(model, tmp_path / "flow.onnx", method)
    assert [p.name for p in tmp_path.iterdir()] == ["flow.onnx"]
    session = runtime.InferenceSession(tmp_path / "flow.onnx")
    names = [i.name for i in session.get_inputs()]
    first = ["rows", "seed"] if method == "sample" else ["x"]
    assert names == first + ["context"] * bool(model.context)
    for n in ROWS:
        given = arguments(model, method, n)
        feed = {name: t.numpy() for name, t in zip(names, given, strict=True)}
        (got,) = session.run([method], feed)
        check(torch.from_numpy(got), expected(model, method, given))


def odd_coupling():
    class Odd(nf.AdditiveCoupling):
        pass

    model = nf.NICE(2, hidden=(2,))
    model.couplings[1].__class__ = Odd
    return model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, r"model must be a nicefast\.NICE, got Linea"),
        ({"method": "forward"}, ValueError, "method must be one of log_prob, sample, got 'forward"),
        ({"method": ["sample"]}, ValueError, "method must be one of log_prob, sample"),
        ({"path": None}, TypeError, "path must be a path, got NoneType"),
        ({"path": "flow.txt"}, ValueError, r"path must end in \.(pt2|onnx), got 'flow\.txt'"),
        ({"model": nf.NICE(2, hidden=(2,), grid=0.25)}, ValueError, "must have no grid, got 0.25"),
        ({"model": odd_coupling()}, ValueError, r"coupling 1 is of another class \(Odd\), or"),
    ],
)
def test_arguments(change, error, message):
    for export, path in ((nf.export_program, "flow.pt2"), (nf.export_onnx, "flow.onnx")):
        if export is nf.export_onnx:
            pytest.importorskip("onnxscript")
        with pytest.raises(error, match=message):
            export(**{"model": nf.NICE(2, hidden=(2,)), "path": path, **change})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "flow.pt2"
    path.write_bytes(b"old")

    def fail(program, file):
        with open(file, "wb") as started:
            started.write(b"half")
        raise OSError("full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="full"):
        nf.export_program(nf.NICE(2, hidden=(2,), couplings=1), path)
    assert [p.name for p in tmp_path.iterdir()] == ["flow.pt2"]
    assert path.read_bytes() == b"old"
