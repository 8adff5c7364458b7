"""No result depends on PyTorch's default dtype or device: all that is made inside says both.

Inputs and models are made under the usual defaults; each call of :data:`CALLS` is then made under
other ones, and gives what it gives under the usual ones, bit for bit.
"""

import contextlib
import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import nicefast as nf
from nicefast import inpainting
from nicefast.baselines import Gaussian
from nicefast.data import Dataset, load_data
from nicefast.data.toys import TOYS, toy, toy_log_prob
from nicefast.evaluation import evaluate
from nicefast.preprocessing import Preprocessing
from nicefast.training import Recipe, fit, initialise

ON = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels run
LEVELS = 256
RECIPE = Recipe(lr=1e-2, batch_size=32, epochs=3, warmup=0)


@contextlib.contextmanager
def default(name):
    """Another default dtype, or, for "meta", another default device."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = ("float64", "bfloat16", "meta")


def same(found, expected):
    """Equal types, dtypes, devices and bits, within containers as well."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.device) == (expected.dtype, expected.device)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        same(list(found.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            same(f, e)
    else:
        assert found == expected


def flow(features=6, seed=0, **options):
    torch.manual_seed(seed)
    model = nf.NICE(features, **{"hidden": (16, 16), "couplings": 3} | options)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return model


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(n=200, d=6, k=LEVELS, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(k, (n, d), generator=generator).to(dtype)


def table(n=160):
    """Columns of integers, of reals and of halves, float64."""
    rows = np.random.default_rng(0).normal(size=(n, 4))
    rows[:, 0] = np.round(40 * rows[:, 0])
    rows[:, 3] = np.round(8 * rows[:, 3]) / 2
    return rows


def digit_rows(d=6, k=16):
    rows = integers(150, d, k)
    return Dataset("tiny", k, rows[:100], rows[100:120], rows[120:])


# Each call: a function that makes what is needed, under the usual defaults, and gives what is
# called under every default. It gives what is to be compared.
CALLS = {}


def call(function):
    CALLS[function.__name__] = function
    return function


def flow_call(name, context=0, **options):
    def prepare(path):
        model = flow(context=context, partition="random", **options)
        x, c = numbers(50, 6), numbers(50, context, seed=1) if context else None

        def called():
            torch.manual_seed(3)
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            log_prob = model.log_prob(leaf, c)
            log_prob.sum().backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            with torch.no_grad():
                z, log_det = model(x, c)
                back, log_det_back = model.inverse(z, c)
                drawn = model.sample(5, None if c is None else c[:4])
                seeded = model.sample(
                    5,
                    None if c is None else c[:4],
                    generator=torch.Generator().manual_seed(1),
                    batch_size=3,
                )
                pair = model.sample_and_log_prob(5, None if c is None else c[:4])
                of = model.distribution(None if c is None else c[:4])
                distribution = of.sample((3,))
                prior = model.prior.log_prob(torch.full_like(z, 0.5))
            return [
                log_prob.detach(), leaf.grad, gradients, z, log_det, back, log_det_back, drawn,
                seeded, list(pair), distribution, of.log_prob(distribution).detach(), prior,
            ]  # fmt: skip

        return called

    prepare.__name__ = name
    return call(prepare)


flow_call("plain")
flow_call("normal", prior="normal")
flow_call("context", context=2)
flow_call("dropout", dropout=0.25)
flow_call("dropout_and_context", dropout=0.25, context=2)
flow_call("grid", grid=2.0**-12)
flow_call("grid_and_context", grid=2.0**-12, context=2, activation="gelu")
flow_call("couplings_of_half", activation="tanh", prior="normal")


@call
def cells(path):
    model, x = flow(grid=2.0**-8), numbers(20, 6)
    return lambda: model.cell_log_prob(x).detach()


@call
def frozen_engines(path):
    model, x = flow(24, partition="random").eval(), numbers(300, 24)

    def called():
        with torch.no_grad():
            return [model.log_prob(x), model.log_prob(x[:1]), model.sample(400, batch_size=100)]

    return lambda: (torch.manual_seed(0), called())[1]


@call
def half_precision_flow(path):
    model, x = flow().bfloat16(), numbers(20, 6)
    return lambda: (model.log_prob(x).detach(), model.log_prob(x.bfloat16()).detach())


@call
def parts(path):
    p = nf.Partition.random(6, seed=3)
    mlp, scaling = nf.MLP(3, (8,), 3, context=2), nf.Scaling(6)
    x, c = numbers(7, 6), numbers(7, 2)

    def called():
        q = nf.Partition.random(6, seed=3)
        _, x1 = nf.functional.split_features(x, q)
        shift = mlp(x1, c).detach()
        y = nf.functional.additive_coupling(x, shift, q)
        in_place = nf.functional.additive_coupling_(x.clone(), shift, q)
        z, log_det = scaling(y)
        scale = scaling.log_scale.detach()
        density = [
            nf.functional.scale_log_prob(y, scale, prior) for prior in ("logistic", "normal")
        ]
        masks = [q.mask, q.conditioning, q.shifted, nf.Partition.from_mask([True, False]).mask]
        drawn = [
            nf.functional.sample_prior(t, n, prior, seed=1)
            for prior in ("logistic", "normal")
            for n in (3, 30_000)
            for t in (scale, scale.double())
        ]
        assert q == p
        return [y, in_place, z.detach(), log_det.detach(), density, masks, drawn]

    return called


@call
def dequantise(path):
    kinds = {2: torch.uint8, 7: torch.int16, 256: torch.uint8, 65536: torch.int32}
    made = {k: integers(2000, 8, k, dtype) for k, dtype in kinds.items()}
    wide = integers(100, 8, 1 << 24, torch.int64) - (1 << 23)

    def called():
        found = [nf.functional.dequantise(t, k, seed=5) for k, t in made.items()]
        for x, (k, t) in zip(found, made.items(), strict=True):
            assert torch.equal((x.double() * k).floor().to(t.dtype), t)
        other = nf.functional.dequantise(made[256], 256, low=-1.0, high=1.0)
        whole = nf.functional.dequantise(wide, None, seed=2)
        assert torch.equal(whole.double().floor().long(), wide)
        return [*found, other, whole]

    return called


@call
def dequantise_by_kernels(path):
    pytest.importorskip("triton", reason="needs Triton")
    rows, wide = integers(20, 6).to(ON), integers(20, 6, 1 << 20, torch.int32).to(ON)

    def called():
        with nf.set_backend("triton"):
            return [nf.functional.dequantise(t, k, seed=5) for t, k in ((rows, 256), (wide, None))]

    return called


@call
def flow_by_kernels(path):
    pytest.importorskip("triton", reason="needs Triton")
    model, x = flow(partition="random", context=2).to(ON), numbers(10, 6).to(ON)
    c = numbers(10, 2).to(ON)

    def called():
        model.zero_grad()
        torch.manual_seed(0)
        with nf.set_backend("triton"):
            found = model.log_prob(x, c)
            found.sum().backward()
            drawn = model.sample(3, c[:2])
        return [found.detach(), drawn, [p.grad.clone() for p in model.parameters()]]

    return called


STEPS = {
    "levels": ["dequantise"],
    "range": [{"dequantise": {"low": -1, "high": 1}}],
    "rescaled": ["dequantise", "rescale", {"logit": {"alpha": 0.05}}],
    "standardised": ["dequantise", "standardise"],
    **{
        kind: ["dequantise", {"whiten": {"kind": kind, "epsilon": 1e-3}}]
        for kind in ("zca", "pca", "approximate")
    },
}


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("levels", [LEVELS, None])
@pytest.mark.parametrize("steps", STEPS)
def test_preprocessing_of_integers(steps, levels, name, tmp_path):
    raw = integers(dtype=torch.int32)

    def called():
        found = Preprocessing.fit(STEPS[steps], raw, levels)
        found.save(tmp_path / "steps")
        x, log_det = found.forward(raw, 3)
        again = Preprocessing.load(tmp_path / "steps")
        whole = found.exact(raw.double() + 0.5)
        return [
            x, log_det, found.inverse(x), found.levels(x), dict(found.tensors), list(whole),
            again.forward(raw, 3)[0], found.describe(),
        ]  # fmt: skip

    if levels is None and steps == "range":
        pytest.skip("a range is for levels")
    expected = called()
    with default(name):
        found = called()
    same(found, expected)
    assert torch.equal(found[3].long(), raw.long())


@call
def preprocessing_of_tables(path):
    rows = torch.from_numpy(table())

    def called():
        found = Preprocessing.fit(["dequantise", "standardise"], rows)
        x, log_det = found.forward(rows, 1)
        single = Preprocessing.fit(["standardise"], rows.float())
        return [x, log_det, found.levels(x), found.spacing, single.forward(rows.float())[0]]

    return called


@call
def toys(path):
    x = numbers(50, 2)

    def called():
        drawn = [toy(name, 100, seed=3) for name in TOYS]
        of = [toy_log_prob(name, rows) for name in TOYS for rows in (x, x.double(), x.bfloat16())]
        return [drawn, of]

    return called


@call
def loaders(path):
    np.save(path / "integers.npy", integers().numpy().astype(np.int32))
    np.save(path / "reals.npy", table())
    np.savetxt(path / "table.csv", table(), delimiter=",")
    files = (str(path / name) for name in ("integers.npy", "reals.npy", "table.csv"))
    names = ["digits", "moons", *files]

    def called():
        found = [load_data(n, **({"header": False} if n.endswith("csv") else {})) for n in names]
        return [[d.train, d.validation, d.test, d.levels] for d in found]

    return called


@call
def masks(path):
    return lambda: [inpainting.masks(28, 28, seed=s) for s in range(3)] + [inpainting.masks(5, 7)]


@call
def inpaint(path):
    model = flow((1, 4, 4), dropout=0.1).eval()
    x, seen = torch.rand(3, 1, 4, 4), inpainting.masks(4, 4)["top"]
    rows = {"x": x, "double": x.double(), "half": x.bfloat16()}

    def called():
        options = [{"method": "paper"}, {"restarts": 2}, {"noise": 256}, {"low": -1.0}]
        found = [inpainting.inpaint(model, x, seen, steps=7, seed=1, **o) for o in options]
        found += [inpainting.inpaint(model, r.float(), seen, steps=2) for r in rows.values()]
        return [[f.x, f.log_prob, f.steps] for f in found]

    return called


@pytest.mark.parametrize("preset", [{}, {"dropout": 0.2}, {"grid": 2.0**-8}])
@pytest.mark.parametrize("name", DEFAULTS)
def test_fit(preset, name, tmp_path):
    data = digit_rows()
    steps = Preprocessing.fit(["dequantise"], data.train, data.levels)
    start = flow(**preset)

    def called(where):
        model = copy.deepcopy(start)
        initialise(model, "data", steps.forward(data.train)[0])
        begun = copy.deepcopy(model.state_dict())
        history = fit(model, data, steps, RECIPE, seed=1, snapshot=where, snapshot_seconds=0)
        epochs = [e._replace(seconds=0, rate=0) for e in history.epochs]
        return [dict(begun), {k: v.clone() for k, v in model.state_dict().items()}, epochs]

    expected = called(tmp_path / "usual")
    with default(name):
        same(called(tmp_path / "other"), expected)


@call
def evaluation(path):
    model, data = flow().eval(), digit_rows()
    steps = Preprocessing.fit(["dequantise"], data.train, data.levels)

    def called():
        rows = data.train.float()
        gaussians = [Gaussian.full(rows), Gaussian.diagonal(rows)]
        found = [evaluate(d, data.test, steps, draws=3, seed=2) for d in (model, gaussians[0])]
        return [found, [g.log_prob(rows) for g in gaussians]]

    return called


@call
def score(path):
    model, data = flow().eval(), digit_rows()
    steps = Preprocessing.fit(["dequantise"], data.train, data.levels)
    x = numbers(300, 6)
    x[3, 2] = torch.nan
    np.save(path / "x.npy", x.numpy())
    np.savetxt(path / "x.csv", x[4:].numpy(), delimiter=",")
    np.save(path / "raw.npy", data.train.numpy())
    nf.save(model, path / "model.safetensors")
    steps.save(path / "steps.safetensors")

    def called():
        some = {"batch_rows": 64, "chunk_rows": 128}
        found = [
            nf.score(model, x.numpy(), **some),
            nf.score(model, x, **some),
            nf.score(model, path / "x.npy", **some),
            nf.score(model, path / "x.csv", header=False, **some),
            nf.score(model, path / "raw.npy", preprocessing=steps, draws=2, **some),
            nf.score(
                path / "model.safetensors",
                path / "raw.npy",
                preprocessing=path / "steps.safetensors",
                outputs=("log_prob", "z", "bits_per_dim"),
                **some,
            ),
        ]
        out = path / "out.npy"
        nf.score(model, path / "x.npy", out, overwrite=True, **some)
        return [[dict(f.values) for f in found], [f.bad_rows for f in found], np.load(out)]

    return called


@call
def save_and_load(path):
    models = [flow(partition=[nf.Partition.random(6, seed=i) for i in range(3)]), flow().double()]
    x = numbers(10, 6)

    def called():
        found = []
        for i, model in enumerate(models):
            nf.save(model, path / f"{i}.safetensors")
            loaded = nf.load(path / f"{i}.safetensors")
            copied = pickle.loads(pickle.dumps(model))
            copied.load_state_dict(loaded.state_dict())
            rows = x.to(model.dtype)
            every = loaded, copied, copy.deepcopy(model)
            found.append([m.log_prob(rows).detach() for m in every])
            found.append({k: v.detach() for k, v in loaded.state_dict().items()})
        return found

    return called


@call
def compression(path):
    pytest.importorskip("constriction", reason="needs constriction")
    from nicefast.compression import compress, decompress

    data = digit_rows()
    steps = Preprocessing.fit(["dequantise"], data.train, data.levels)
    models = [flow(grid=1 / 16, prior=prior) for prior in ("logistic", "normal")]
    np.save(path / "rows.npy", data.train.numpy())

    def called():
        found = []
        for model in models:
            compress(path / "rows.npy", model, path / "packed", steps, overwrite=True)
            decompress(path / "packed", model, path / "back.npy", steps, overwrite=True)
            found += [(path / "packed").read_bytes(), np.load(path / "back.npy")]
        return found

    return called


@call
def conversion(path):
    pytest.importorskip("nflows", reason="needs nflows")
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import AdditiveCouplingTransform, CompositeTransform, ReversePermutation

    class Perceptron(nn.Sequential):
        def __init__(self, i, o):
            super().__init__(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o))

        def forward(self, x, context=None):
            return super().forward(x)

    torch.manual_seed(0)

    def layers(net):
        mask = [0, 1, 0, 1, 1, 0]
        made = [AdditiveCouplingTransform(mask, net), ReversePermutation(6)] * 2
        whole = CompositeTransform([copy.deepcopy(m) for m in made])
        return Flow(whole, StandardNormal([6])).eval()

    flows = [layers(Perceptron), layers(lambda i, o: ResidualNet(i, o, 8))]
    x = numbers(20, 6)

    @torch.no_grad()
    def called():
        found = []
        for theirs in flows:
            ours = nf.convert(theirs, sequential=Perceptron)
            fast = copy.deepcopy(theirs)
            coupling = nf.accelerate(fast).replaced and fast._transform._transforms[0]
            found += [ours.log_prob(x).detach(), coupling(x), coupling.inverse(x)]
            found.append([c.partition.mask for c in ours.couplings])
            torch.manual_seed(0)
            found.append(ours.sample(4))
            nf.restore(fast)
        return found

    return called


@call
def zuko_distributions(path):
    pytest.importorskip("zuko", reason="needs zuko")
    from nicefast.compat.zuko import NICE

    torch.manual_seed(0)
    theirs, x, c = NICE(6, context=2, hidden_features=(8,)), numbers(10, 6), numbers(10, 2)
    ours = nf.convert(theirs)

    def called():
        return [
            theirs(c).log_prob(x).detach(),
            nf.convert(theirs).log_prob(x, c).detach(),
            ours.log_prob(x, c).detach(),
        ]

    return called


@call
def estimators(path):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    from nicefast.sklearn import NICEClassifier, NICEDensity, NICEOutlierDetector

    rows = table()
    label = (rows[:, 1] > 0).astype(int)
    options = {"hidden": (8,), "couplings": 2, "epochs": 2, "random_state": 0}
    fitted = NICEDensity(**options).fit(rows)

    def called():
        found = []
        for standardise in (True, False):
            made = NICEDensity(**options, standardise=standardise).fit(rows)
            found += [made.score_samples(rows[:20]), made.sample(5, random_state=1)]
            found.append({k: v.detach() for k, v in made.model_.state_dict().items()})
        weight = rows[:, 1] ** 2 + 0.1
        held = (rows[:40], label[:40])
        for validation in (None, held):
            made = NICEOutlierDetector(**options)
            made.fit(rows, sample_weight=weight, validation_data=validation)
            found.append(made.decision_function(rows[:20]))
            made = NICEClassifier(**options)
            made.fit(rows, label, weight, validation_data=validation)
            found.append(made.predict_proba(rows[:20]))
        again = pickle.loads(pickle.dumps(fitted))
        found += [fitted.score_samples(rows[:20]), again.score_samples(rows[:20])]
        for density in ("nice", "gaussian"):
            made = NICEClassifier(density=density, **options).fit(rows, label)
            found.append(made.predict_proba(rows[:20]))
            found.append(pickle.loads(pickle.dumps(made)).predict_proba(rows[:20]))
        return found

    return called


@call
def pictures(path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from nicefast import plots

    images, points = torch.rand(5, 1, 8, 8), numbers(50, 2)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    model = flow((1, 4, 4), prior="normal")
    ends = torch.rand(2, 1, 4, 4)

    def called():
        plots.sample_grid(images, path / "a.png", columns=3)
        plots.plot_density(normal.log_prob, points, (-3, 3, -3, 3), path / "b.png")
        between = plots.interpolate(model, ends[:1], ends[1:], 5)
        near = plots.nearest(images, torch.flip(images, (0,)))
        return [(path / n).read_bytes() for n in ("a.png", "b.png")] + [between, list(near)]

    return called


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("function", CALLS)
def test_defaults_change_no_result(function, name, tmp_path):
    called = CALLS[function](tmp_path)
    expected = called()
    with default(name):
        found = called()
    same(found, expected)


@pytest.mark.parametrize("name", DEFAULTS)
def test_new_modules_follow_the_defaults_unless_told(name):
    """As those of torch.nn; their partitions and what else is no parameter stay on the CPU."""
    with default(name):
        made, linear = nf.NICE(6, hidden=(8,), partition="random"), nn.Linear(2, 2)
        told = nf.NICE(6, hidden=(8,), device="cpu", dtype=torch.float32)
        parts = nf.MLP(2, (3,), 2), nf.Scaling(3)
    for p in (*made.parameters(), *parts[0].parameters(), *parts[1].parameters()):
        assert (p.dtype, p.device) == (linear.weight.dtype, linear.weight.device)
    for p in told.parameters():
        assert (p.dtype, p.device.type) == (torch.float32, "cpu")
    assert made.couplings[0].partition == nf.Partition.random(6, seed=0)


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_run_of_the_command_line(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from nicefast.cli.progress import Silent
    from nicefast.runs import Configuration, carry_out, write_run

    settings = Configuration.of_preset("digits", None).changed(
        {"recipe.epochs": 1, "model.hidden": (8,), "model.couplings": 2}
    )

    def called(folder):
        folder.mkdir()
        run = carry_out(settings, load_data("digits"), folder, Silent())
        write_run(folder, run)
        return {k: v.detach() for k, v in run.model.state_dict().items()}

    expected = called(tmp_path / "usual")
    with default(name):
        same(called(tmp_path / "other"), expected)
