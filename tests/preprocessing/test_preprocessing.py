"""Steps: their determinants against autograd's, their inverses, and the files they are kept in."""

import json
import math
import os
import pickle

import pytest
import torch

import nicefast as nf
from nicefast.preprocessing import Preprocessing, bits_per_dim
from nicefast.preprocessing.transforms import Dequantise, Logit, Rescale, Standardise
from nicefast.preprocessing.whitening import KINDS, Whiten

D = 5


def correlated(n=400, d=D, dtype=torch.float64):
    """Rows with a covariance, a mean, and values of very different size."""
    mixing = torch.randn(d, d, dtype=torch.float64) * torch.logspace(-2, 1, d).double()
    return (torch.randn(n, d, dtype=torch.float64) @ mixing + 3).to(dtype)


def unit(n=400, d=D):
    return torch.rand(n, d, dtype=torch.float64)


def images(k=256, n=300, shape=(3, 2, 2)):
    brightness = torch.rand(n, *[1] * len(shape))
    return (brightness * k * torch.rand(n, *shape)).floor().to(torch.uint8)


def steps():
    x = correlated()
    return {
        "rescale": (Rescale(-1.0, 4.0, 2.0, 2.5), x),
        "rescale-fit": (Rescale.fit(x), x),
        "logit": (Logit(0.05), unit()),
        "logit-narrow": (Logit(1e-6), unit()),
        "standardise": (Standardise.fit(x), x),
        **{f"{kind}-{e}": (Whiten.fit(x, kind, e), x) for kind in KINDS for e in (0.0, 0.1)},
    }


@pytest.mark.parametrize("name", steps())
def test_step_against_autograd(name):
    step, x = steps()[name]
    y, log_det = step.forward(x[:4])
    assert (y.dtype, log_det.dtype, log_det.shape) == (torch.float64, torch.float64, (4,))
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: step.forward(row[None])[0][0], x[i]
        )
        assert log_det[i].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item())
    assert torch.allclose(step.inverse(y), x[:4], rtol=1e-9, atol=1e-9)
    assert torch.allclose(step.forward(step.inverse(y))[0], y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", steps())
def test_step_in_single_precision(name):
    step, x = steps()[name]
    y, log_det = step.forward(x.float())
    exact, exact_log_det = step.forward(x.float().double())
    assert (y.dtype, log_det.dtype) == (torch.float32, torch.float64)
    scale = exact.abs().max()
    assert (y - exact).abs().max() < 1e-4 * scale
    assert torch.allclose(log_det, exact_log_det, rtol=1e-12)
    assert (step.inverse(y) - x).abs().max() < 2e-4 * x.abs().max()


COMPOSED = [
    ["dequantise"],
    ["dequantise", "standardise"],
    [{"dequantise": {"low": -1, "high": 1}}, {"whiten": {"kind": "zca", "epsilon": 1e-2}}],
    ["dequantise", "logit", {"whiten": {"kind": "pca"}}],
    ["dequantise", {"logit": {"alpha": 1e-3}}, "standardise", {"whiten": {"kind": "approximate"}}],
    [Dequantise(256, -1.0, 1.0), {"rescale": {"low": 0.1, "high": 0.9}}, Logit(0.01)],
]


@pytest.mark.parametrize("spec", COMPOSED, ids=str)
def test_composition_of_levels_against_autograd(spec):
    """Of the inverse, which is smooth: forward adds the noise."""
    raw = images(shape=(1, 2, 2))
    made = Preprocessing.fit(spec, raw, 256, seed=3)
    x, log_det = made.forward(raw[:3], seed=4)
    assert (x.dtype, x.shape) == (torch.float32, (3, 1, 2, 2))
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: made.inverse(row.view(1, 1, 2, 2)).flatten(), x[i].double().flatten()
        )
        assert log_det[i].item() == pytest.approx(-torch.linalg.slogdet(jacobian)[1].item(), 1e-6)


@pytest.mark.parametrize(
    "spec", [[], ["standardise"], ["rescale", "logit"], [{"whiten": {"kind": "pca"}}, "rescale"]]
)
def test_composition_of_values_against_autograd(spec):
    raw = correlated()
    made = Preprocessing.fit(spec, raw)
    x, log_det = made.forward(raw)
    assert x.dtype == torch.float32
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: made.inverse(row[None])[0], x[i].double()
        )
        assert log_det[i].item() == pytest.approx(-torch.linalg.slogdet(jacobian)[1].item(), 1e-5)
    assert torch.allclose(made.inverse(x.double()), raw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [0.0, -1.0])
@pytest.mark.parametrize("k", [2, 17, 256])
def test_levels_come_back_exactly(k, low):
    raw = torch.randint(0, k, (2000, 3, 2), dtype=torch.uint8)
    noise = {"dequantise": {"low": low}}
    for more in ([], ["standardise"], ["rescale", "logit"], [{"whiten": {"epsilon": 0.0}}]):
        made = Preprocessing.fit([noise, *more], raw, k)
        x, _ = made.forward(raw, seed=9)
        again = made.levels(x)
        assert again.dtype == torch.uint8
        assert torch.equal(again, raw)
        inside = made.inverse(x)
        assert ((inside - raw - 0.5).abs() < 0.5 + 1e-3).all()


def test_levels_of_samples_are_clamped():
    made = Preprocessing([Dequantise(17)])
    x = torch.tensor([[-0.3, 0.0, 0.5, 0.99, 1.0, 7.0]])
    assert made.levels(x).tolist() == [[0, 0, 8, 16, 16, 16]]
    wide = Preprocessing([Dequantise(1000)]).levels(x)
    assert wide.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integers_of_any_range(dtype):
    raw = torch.randint(-3000, 9000, (500, 4)).to(dtype)
    made = Preprocessing.fit(["dequantise"], raw, None)
    x, log_det = made.forward(raw, seed=1)
    assert torch.equal(log_det, torch.zeros(500, dtype=torch.float64))
    assert torch.equal(x, nf.functional.dequantise(raw, None, seed=1))
    assert torch.equal(made.inverse(x), x)
    assert torch.equal(made.levels(x), raw.int())
    standard = Preprocessing.fit(["dequantise", "standardise"], raw)
    assert torch.equal(standard.levels(standard.forward(raw)[0]), raw.int())


def test_log_det_of_levels_is_that_of_the_range():
    raw = images()
    for low, width in ((0.0, 1.0), (-1.0, 2.0)):
        made = Preprocessing.fit([{"dequantise": {"low": low, "high": 1.0}}], raw, 256)
        x, log_det = made.forward(raw)
        assert torch.allclose(log_det, torch.full_like(log_det, 12 * math.log(width / 256)))
        assert torch.equal(x, nf.functional.dequantise(raw, 256, low=low, high=1.0))
    # a uniform density on the raw scale: 8 bits for each of 256 levels
    assert bits_per_dim(-log_det + 12 * math.log(2 / 256) * 2, 12)[0].item() == pytest.approx(7.0)
    assert bits_per_dim(-12 * math.log(256), 12) == 8.0


def test_noise_does_not_depend_on_the_batch():
    raw = images()
    made = Preprocessing.fit(["dequantise", "standardise"], raw, 256)
    whole = made.forward(raw, 5, 100)[0]
    parts = [made.forward(raw[i : i + 70], 5, 100 + i)[0] for i in range(0, 300, 70)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(made.forward(raw, 6, 100)[0], whole)


def test_whitening_gives_the_identity_covariance():
    x = correlated(1000)
    for kind in KINDS:
        y, _ = Whiten.fit(x, kind, 0.0).forward(x)
        assert y.mean(0).abs().max() < 1e-9
        assert torch.allclose(y.T.cov(correction=0), torch.eye(D).double(), atol=1e-8)
    epsilon = 0.5
    values = torch.linalg.eigvalsh(x.T.cov(correction=0)).flip(0)
    y, _ = Whiten.fit(x, "pca", epsilon).forward(x)
    assert torch.allclose(y.T.cov(correction=0), torch.diag(values / (values + epsilon)), atol=1e-8)


def test_kinds_are_what_they_are_called():
    x = correlated()
    eye = torch.eye(D, dtype=torch.float64)
    maps = {}
    for kind in KINDS:
        step = Whiten.fit(x, kind, 0.01)
        maps[kind] = step.forward(eye + step.mean)[0]  # F
        assert torch.allclose(maps[kind] @ (step.inverse(eye) - step.mean), eye, atol=1e-9)
    assert torch.allclose(maps["zca"], maps["zca"].T)
    assert torch.linalg.eigvalsh(maps["zca"]).min() > 0
    assert torch.equal(maps["approximate"].triu(), maps["approximate"])  # F = L^T
    gram = maps["pca"].T @ maps["pca"]
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-8)


def test_approximate_whitening_is_the_most_likely_triangular_layer():
    """No L and b nearby give data a greater likelihood under a standard normal prior."""
    x = correlated()
    step = Whiten.fit(x, "approximate", 0.0)
    eye = torch.eye(D, dtype=torch.float64)
    lower = step.forward(eye + step.mean)[0].T.clone().requires_grad_()
    b = (-lower.detach() @ step.mean).requires_grad_()
    y = x @ lower.tril().T + b
    loss = 0.5 * (y * y).sum(1).mean() - lower.diagonal().log().sum()
    for gradient in torch.autograd.grad(loss, (lower, b)):
        assert gradient.abs().max() < 1e-7 * x.abs().max() * lower.detach().abs().max()


def test_statistics_do_not_depend_on_the_blocks(monkeypatch):
    x = correlated() + 1e4
    whole = Whiten.fit(x, "zca", 0.0), Standardise.fit(x), Rescale.fit(x)
    monkeypatch.setattr("nicefast.preprocessing.moments.FIT_ROWS", 7)
    parts = Whiten.fit(x, "zca", 0.0), Standardise.fit(x), Rescale.fit(x)
    for a, b in zip(whole, parts, strict=True):
        for name in a.tensors:
            if name != "basis":  # eigenvectors have a sign to choose
                assert torch.allclose(a.tensors[name], b.tensors[name], rtol=1e-8)
        assert torch.allclose(a.forward(x)[0], b.forward(x)[0], atol=1e-6)
    assert torch.allclose(whole[1].mean, x.mean(0))
    assert torch.allclose(whole[1].std, x.std(0, correction=0))
    raw = images()
    spec = ["dequantise", "standardise", "whiten"]
    monkeypatch.setattr("nicefast.preprocessing.pipeline.FIT_ROWS", 11)
    parts = Preprocessing.fit(spec, raw, 256, seed=2)
    monkeypatch.undo()
    whole = Preprocessing.fit(spec, raw, 256, seed=2)
    assert torch.allclose(parts.forward(raw)[0], whole.forward(raw)[0], atol=1e-4)


def test_products_are_exact_whatever_training_has_in_force():
    x = correlated(dtype=torch.float32)
    step = Whiten.fit(x, "zca", 0.0)
    want = step.forward(x)[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(step.forward(x)[0], want)
            assert step.inverse(want).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_gradients_flow_also_after_inference():
    x = correlated(dtype=torch.float32)
    made = Preprocessing.fit(["standardise", "whiten"], x)
    with torch.inference_mode():
        made.inverse(made.forward(x)[0])
    x.requires_grad_()
    y, _ = made.forward(x)
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_split_and_bounds():
    raw = images()
    made = Preprocessing.fit([{"dequantise": {"low": -1, "high": 1}}, "standardise"], raw, 256)
    first, rest = made.split()
    assert first.bounds() == (-1, 1)
    x, a = first.forward(raw, 4)
    y, b = rest.forward(x)
    want, log_det = made.forward(raw, 4)
    assert torch.equal(y, want)
    assert torch.allclose(a + b, log_det)
    with pytest.raises(ValueError, match="range of x is not known"):
        made.bounds()
    first, rest = Preprocessing.fit(["standardise"], correlated()).split()
    assert first.steps == ()
    assert len(rest.steps) == 1


@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 2, 2)])
def test_event_shapes_and_empty_batches(shape):
    raw = images(shape=shape)
    made = Preprocessing.fit(["dequantise", "standardise", "whiten"], raw, 256)
    x, log_det = made.forward(raw[:0])
    assert (x.shape, log_det.shape) == ((0, *shape), (0,))
    assert made.inverse(x).shape == (0, *shape)
    x, log_det = made.forward(raw)
    assert (x.shape, log_det.shape) == (raw.shape, (300,))
    flat = Preprocessing.fit(["dequantise", "standardise", "whiten"], raw.flatten(1), 256)
    assert torch.equal(flat.forward(raw.flatten(1))[0], x.flatten(1))


def test_real_values_need_no_noise():
    x = correlated()
    made = Preprocessing.fit(["dequantise", "standardise"], x)
    assert [s.name for s in made.steps] == ["standardise"]
    assert not made.discrete
    y, log_det = Preprocessing(()).forward(x)
    assert torch.equal(y, x.float())
    assert torch.equal(log_det, torch.zeros(400, dtype=torch.float64))
    assert Preprocessing(()).describe() == "none: values as they are"


def made_of_everything():
    raw = images()
    spec = [
        "dequantise",
        "rescale",
        {"logit": {"alpha": 0.01}},
        "standardise",
        {"whiten": {"kind": "pca", "epsilon": 0.1}},
        {"whiten": {"kind": "approximate"}},
        "whiten",
    ]
    return Preprocessing.fit(spec, raw, 256, seed=1), raw


def test_parts_make_it_again():
    made, raw = made_of_everything()
    parts = json.loads(json.dumps(made.configuration)), pickle.loads(pickle.dumps(made.tensors))
    again = Preprocessing.from_parts(*parts)
    assert again.configuration == made.configuration
    assert again.describe() == made.describe()
    assert len(made.describe().splitlines()) == 7
    for a, b in zip(made.forward(raw, 3), again.forward(raw, 3), strict=True):
        assert torch.equal(a, b)


def test_save_and_load(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    made, raw = made_of_everything()
    made.save(tmp_path / "p.safetensors")
    assert os.listdir(tmp_path) == ["p.safetensors"]
    again = Preprocessing.load(tmp_path / "p.safetensors")
    assert again.configuration == made.configuration
    assert again.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(t, again.tensors[k]) for k, t in made.tensors.items())
    x, log_det = made.forward(raw, 3)
    got, got_log_det = again.forward(raw, 3)
    assert torch.equal(got, x)
    assert torch.equal(got_log_det, log_det)
    assert torch.equal(again.inverse(x), made.inverse(x))
    Preprocessing(()).save(tmp_path / "p.safetensors")  # over what is there
    assert Preprocessing.load(tmp_path / "p.safetensors").steps == ()


def test_damaged_files(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    from safetensors.torch import load_file, save_file

    made, _ = made_of_everything()
    path = tmp_path / "p.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        Preprocessing.load(path)
    made.save(path)
    whole = path.read_bytes()
    tensors = {k: v.clone() for k, v in load_file(path).items()}  # not the file, which changes
    meta = {"format": "nicefast.Preprocessing/1", "configuration": json.dumps(made.configuration)}
    meta["nicefast_version"] = "0.1.0"  # whose files have no digest
    for damaged in (b"", whole[:20], whole[:-100], b"\x80\x04junk" + whole):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"p\.safetensors"):
            Preprocessing.load(path)

    def refused(says, change=None, **metadata):
        changed = {k: v.clone() for k, v in tensors.items()}
        if change:
            change(changed)
        save_file(changed, path, {k: v for k, v in {**meta, **metadata}.items() if v is not None})
        with pytest.raises(ValueError, match=rf"p\.safetensors.*{says}"):
            Preprocessing.load(path)

    refused("no preprocessing", format="nicefast.NICE/1")
    refused("configuration", configuration=None)
    refused("does not fit", configuration="{")
    refused("does not fit", configuration="[]")
    refused("eval", configuration='{"steps": [{"step": "eval"}]}')
    refused("belong to no step", configuration='{"steps": []}')
    refused("alpha must", configuration=meta["configuration"].replace("0.01", "7"))
    refused("kind must", configuration=meta["configuration"].replace("pca", "ica"))
    refused("std", lambda t: t.pop("3.std"))
    refused("std must be positive", lambda t: t["3.std"].neg_())
    refused("mean must be finite", lambda t: t["3.mean"][:1].fill_(torch.nan))
    refused("must be float64", lambda t: t.update({"3.mean": t["3.mean"].float()}))
    refused("must be float64", lambda t: t.update({"3.mean": t["3.mean"][1:].clone()}))
    refused("orthogonal", lambda t: t["4.basis"][0].add_(0.1))
    refused("unit lower triangular", lambda t: t["5.basis"][0, 3:].add_(0.1))
    refused("orthogonal", lambda t: t["6.basis"].fill_(torch.nan))
    refused("belong to no step", lambda t: t.update({"9.more": torch.ones(2)}))
    refused("unexpected keyword", lambda t: t.update({"3.more": torch.ones(2)}))


X, RAW = torch.rand(30, 4), torch.randint(0, 256, (30, 4), dtype=torch.uint8)
BLANK = torch.cat((X[:, :1], torch.full((30, 2), 0.1), X[:, :1] * 0 - 2), 1)
LEVELS = Preprocessing([Dequantise(17)])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: Preprocessing.fit("dequantise", RAW, 256), TypeError, "steps must be a list"),
        (lambda: Preprocessing.fit({"whiten": {}}, X), TypeError, "steps must be a list"),
        (lambda: Preprocessing.fit(["normalise"], X), ValueError, "one of dequantise, rescale,"),
        (lambda: Preprocessing.fit([{"logit": {}, "whiten": {}}], X), ValueError, "one name with"),
        (lambda: Preprocessing.fit([{"logit": 0.1}], X), ValueError, "must be a table, got 0.1"),
        (lambda: Preprocessing.fit([{"logit": {"a": 1}}], X), ValueError, "'a'; it takes alpha"),
        (lambda: Preprocessing.fit([{"standardise": {"a": 1}}], X), ValueError, "it takes none"),
        (
            lambda: Preprocessing.fit([{"dequantise": {"k": 1}}], RAW, 256),
            ValueError,
            "takes low, high",
        ),
        (lambda: Preprocessing.fit([7], X), TypeError, "step 0 must be one of"),
        (lambda: Preprocessing.fit([], RAW, 256), TypeError, "needs 'dequantise' as the first"),
        (lambda: Preprocessing.fit(["standardise"], RAW, 256), TypeError, "needs 'dequantise'"),
        (lambda: Preprocessing.fit(["logit", "dequantise"], X), ValueError, "must be the first"),
        (
            lambda: Preprocessing.fit([{"dequantise": {"low": -1}}], X),
            ValueError,
            "is for integers, got torch.float32: use 'rescale'",
        ),
        (
            lambda: Preprocessing.fit([{"dequantise": {"low": -1}}], RAW),
            ValueError,
            "low and high need k",
        ),
        (lambda: Preprocessing.fit(["dequantise", "whiten"], RAW, 17), ValueError, "0 .. 16"),
        (lambda: Preprocessing.fit(["standardise"], BLANK), ValueError, "3 of 4.*: 1, 2, 3 "),
        (lambda: Preprocessing.fit(["standardise"], X[:1]), ValueError, "two rows or more, got 1"),
        (lambda: Preprocessing.fit(["rescale"], X / 0), ValueError, "feature 0 holds values"),
        (
            lambda: Preprocessing.fit([{"whiten": {"epsilon": 0.0}}], BLANK),
            ValueError,
            "singular: 3 of 4 directions",
        ),
        (
            lambda: Preprocessing.fit([{"whiten": {"kind": "approximate", "epsilon": 0.0}}], BLANK),
            ValueError,
            "covariance is singular",
        ),
        (lambda: Preprocessing.fit([{"whiten": {"epsilon": -1}}], X), ValueError, "at least 0"),
        (lambda: Preprocessing.fit([{"whiten": {"kind": "ica"}}], X), ValueError, "zca, pca, app"),
        (lambda: Preprocessing.fit(["logit"], X - 0.5), ValueError, "put 'rescale' before it"),
        (lambda: Preprocessing([Logit(), Dequantise(3)]), ValueError, "must be the first step"),
        (lambda: LEVELS.forward(X), TypeError, "raw must hold integers.*float32"),
        (lambda: LEVELS.forward(RAW[0]), ValueError, r"must have shape \(N, \*event_shape\)"),
        (lambda: LEVELS.forward(RAW.tolist()), TypeError, "must be a torch.Tensor, got list"),
        (lambda: LEVELS.forward(RAW), ValueError, "levels must lie in 0 .. 16"),
        (lambda: LEVELS.forward(RAW % 17, seed=-1), ValueError, "seed must be"),
        (lambda: LEVELS.inverse(RAW), TypeError, "x must be floating point, got torch.uint8"),
        (lambda: Preprocessing(()).levels(X), ValueError, "levels need a first step"),
        (
            lambda: Preprocessing.fit(["standardise"], X).forward(X[:, :3]),
            ValueError,
            r"must have 4 features, got shape \(30, 3\)",
        ),
        (lambda: Rescale(1.0, 1.0), ValueError, "from_low must be below from_high"),
        (lambda: Rescale(0.0, math.inf), ValueError, "from_high must be finite"),
        (lambda: Rescale(0.0, "1"), TypeError, "from_high must be a number, got '1'"),
        (lambda: Logit(0.5), ValueError, "alpha must lie between 0 and 1/2, got 0.5"),
        (lambda: Logit(0.05).forward(X + 1), ValueError, "logit takes values in"),
        (lambda: Logit(0.05).forward(X * math.nan), ValueError, "logit takes values in"),
        (lambda: Dequantise(1), ValueError, "k must be an integer"),
        (lambda: Dequantise(17, 1.0, 0.0), ValueError, "low must be below high"),
        (lambda: Standardise.fit(RAW), ValueError, "x must be floating point"),
        (lambda: Standardise.fit("a"), TypeError, "x must be a torch.Tensor, got str"),
        (lambda: Whiten.fit(X, kind=None), ValueError, "kind must be one of"),
        (lambda: Preprocessing(3), TypeError, "steps must be a sequence of steps, got int"),
        (lambda: bits_per_dim(1.0, 0), ValueError, "features must be at least 1"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_device_of_the_input(device):
    raw = images().to(device)
    made = Preprocessing.fit(["dequantise", "standardise", "whiten"], raw, 256)
    x, log_det = made.forward(raw, 2)
    assert x.device == log_det.device == raw.device
    assert torch.equal(made.levels(x), raw)
    want, _ = made.forward(raw.cpu(), 2)
    assert torch.allclose(x.cpu(), want, atol=1e-4)
