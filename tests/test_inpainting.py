"""nicefast.inpainting: which pixels are hidden, what stays, and that log p is climbed."""

import math

import pytest
import torch

import nicefast as nf
from nicefast.inpainting import RELEASED_STEPS, inpaint, masks

METHODS = ("paper", "adam")


class Normal(torch.nn.Module):
    """Correlated normal features of given widths: where each should go is known in closed form."""

    def __init__(self, features=6, width=0.1, correlation=0.8):
        super().__init__()
        covariance = torch.full((features, features), correlation)
        covariance.fill_diagonal_(1.0)
        self.covariance = covariance * width**2
        self.mean = torch.nn.Parameter(torch.full((features,), 0.5))

    def log_prob(self, x):
        d = torch.distributions.MultivariateNormal(self.mean, self.covariance.to(x))
        return d.log_prob(x.flatten(1))

    def conditional_mean(self, x, seen):
        s, m = self.covariance, self.mean.detach()
        regression = s[~seen][:, seen] @ torch.linalg.inv(s[seen][:, seen])
        return m[~seen] + (x[:, seen] - m[seen]) @ regression.T


@pytest.fixture(scope="module")
def trained():
    """A small NICE of 6 x 6 images with a bright bar, across or upright, and the images."""
    torch.manual_seed(0)
    images = torch.zeros(512, 1, 6, 6)
    for n, image in enumerate(images):
        at = n % 6
        image[0, at] = 0.8
        if n % 2:
            image[0] = image[0].T.clone()
    images = (images + 0.1 * torch.rand(images.shape)).contiguous()
    flow = nf.NICE((1, 6, 6), hidden=(64,), couplings=4)
    with torch.no_grad():
        flow.scaling.log_scale.fill_(2.0)
    optimiser = torch.optim.Adam(flow.parameters(), 3e-3)
    for _ in range(300):
        loss = -flow.log_prob(images[torch.randint(512, (128,))]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return flow, images


def test_masks_of_28_by_28_hide_what_the_released_script_hides():
    flat = {name: mask.flatten() for name, mask in masks(28, 28).items()}
    hidden = {
        "top": range(392),
        "bottom": range(392, 784),
        "even": range(0, 784, 2),
        "odd": range(1, 784, 2),
        "left": [28 * i + j for i in range(28) for j in range(14)],
        "right": [28 * i + j for i in range(28) for j in range(14, 28)],
        "middle-rows": range(196, 588),
        "middle-columns": [28 * i + j for i in range(28) for j in range(7, 21)],
    }
    assert list(flat) == [*hidden, "random-75", "random-90"]
    for name, pixels in hidden.items():
        assert (~flat[name]).nonzero().flatten().tolist() == list(pixels), name
    for name, share in (("random-75", 0.75), ("random-90", 0.9)):
        spread = math.sqrt(share * (1 - share) / 784)
        assert abs((~flat[name]).float().mean().item() - share) < 4 * spread


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (48, 48), (9, 4)])
def test_masks_of_any_size(size):
    found = masks(*size)
    assert len(found) == 10
    assert all(m.shape == size and m.dtype == torch.bool for m in found.values())
    for name, other in (("top", "bottom"), ("even", "odd"), ("left", "right")):
        assert torch.equal(found[name], ~found[other])
    # a band has the same border on both sides
    assert torch.equal(found["middle-rows"], found["middle-rows"].flip(0))
    assert torch.equal(found["middle-columns"], found["middle-columns"].flip(1))
    assert all(m.any() and not m.all() for n, m in found.items() if "random" not in n)


def test_only_random_masks_follow_the_seed():
    one, two, same = masks(28, 28, 0), masks(28, 28, 1), masks(28, 28, 0)
    for name, mask in one.items():
        assert torch.equal(mask, same[name])
        assert torch.equal(mask, two[name]) == ("random" not in name)


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (0, 8), (4.0, 4), (True, 4)])
def test_small_masks_are_refused(size):
    with pytest.raises(ValueError, match=r"must be an integer >= 4, got"):
        masks(*size)


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (None, TypeError), (0.5, TypeError)])
def test_seeds_of_masks_are_checked(seed, error):
    with pytest.raises(error, match="seed must be"):
        masks(4, 4, seed)


def test_adam_finds_the_conditional_mean():
    model, seen = Normal(), torch.tensor([True, False, True, True, False, False])
    x = (0.5 + 0.1 * torch.randn(8, 6)).clamp(0.2, 0.8)
    filled = inpaint(model, x, seen, steps=400)
    assert torch.allclose(filled.x[:, ~seen], model.conditional_mean(x, seen), atol=1e-4)
    assert torch.equal(filled.x[:, seen], x[:, seen])


def test_the_paper_ends_near_the_conditional_mean_of_a_wide_density():
    # curvature is 1 / width^2 = 4, so steps of at most 0.1 do not overshoot
    model, seen = Normal(4, 0.5, 0.0), torch.tensor([True, False, False, True])
    x = torch.full((200, 4), 0.4)
    filled = inpaint(model, x, seen, method="paper", steps=3000)
    hidden = filled.x[:, ~seen]
    # eps is multiplied by the rate, not by its root, so its effect dies out as the rate does
    assert abs(hidden.mean().item() - 0.5) < 0.01
    assert 0.001 < hidden.std().item() < 0.06
    assert filled.log_prob[-1].mean() > filled.log_prob[0].mean()


def test_the_paper_s_step_to_the_letter():
    torch.manual_seed(1)
    model, x, seen = Normal(), torch.rand(3, 6), torch.tensor([True, False] * 3)
    start, steps = inpaint(model, x, seen, method="paper", steps=0, seed=5).x, 3
    found = inpaint(model, x, seen, method="paper", steps=steps, seed=5)
    generator = torch.Generator().manual_seed(5)
    torch.rand(x.shape, generator=generator)
    now, scores = start.clone(), []
    precision = torch.linalg.inv(model.covariance)
    for i in range(steps):
        scores.append(model.log_prob(now).detach())
        gradient = (0.5 - now) @ precision
        eps = torch.randn(x.shape, generator=generator)
        moved = (now + 10 / (100 + i) * (gradient + eps)).clamp(0, 1)
        now = torch.where(seen, x, moved)
    scores.append(model.log_prob(now).detach())
    assert torch.allclose(found.x, now, atol=1e-5)
    assert torch.allclose(found.log_prob, torch.stack(scores), rtol=1e-4)
    assert found.steps.tolist() == [0, 1, 2, 3]


def test_the_gradient_is_each_image_s_own():
    """The gradient of a mean over rows would be a fiftieth, and Adam would not show it."""
    model, seen = Normal(4, 0.5, 0.0), torch.tensor([True, False, False, True])
    x = torch.full((50, 4), 0.5)
    before, after = (
        inpaint(model, x, seen, method="paper", steps=steps).x[:, ~seen] for steps in (0, 1)
    )
    inside = (after > 0) & (after < 1)
    # x + 0.1 (-4 (x - 0.5) + eps): the distance shrinks to 0.6 of it on average
    slope = ((after - 0.5) * (before - 0.5))[inside].sum() / (before - 0.5)[inside].square().sum()
    assert abs(slope.item() - 0.6) < 0.1


def test_log_prob_rises_without_a_fall_and_ends_higher(trained):
    flow, images = trained
    named = masks(6, 6)
    seen = torch.stack(list(named.values())).repeat(2, 1, 1).unsqueeze(1)
    filled = inpaint(flow, images[:20], seen, steps=300)
    assert (filled.log_prob.diff(dim=0) >= 0).all()
    mean = filled.log_prob.mean(1)
    assert mean[-1] > mean[0] + 100
    assert torch.allclose(filled.log_prob[-1], flow.log_prob(filled.x).detach(), atol=1e-2)
    # the density's own images are no better than what maximises it
    assert mean[-1] > flow.log_prob(images[:20]).mean()


def test_a_hidden_half_is_restored(trained):
    flow, images = trained
    upright = images[1:12:2]  # the upper half shows which column it is
    filled = inpaint(flow, upright, masks(6, 6)["bottom"], steps=300, restarts=2).x
    nothing = upright.mean(0, keepdim=True)
    error = (filled - upright)[:, :, 3:].square().mean()
    assert error < 0.35 * (nothing - upright)[:, :, 3:].square().mean()


def test_restarts_keep_the_best_of_each_image(trained):
    flow, images = trained
    x, seen = images[:6], masks(6, 6)["random-75"]
    runs = [inpaint(flow, x, seen, steps=60, seed=3 + k) for k in range(3)]
    best = inpaint(flow, x, seen, steps=60, seed=3, restarts=3)
    ends = torch.stack([run.log_prob[-1] for run in runs])
    assert torch.equal(best.log_prob[-1], ends.amax(0))
    for row, run in enumerate(ends.argmax(0).tolist()):
        assert torch.equal(best.x[row], runs[run].x[row])
        assert torch.equal(best.log_prob[:, row], runs[run].log_prob[:, row])


@pytest.mark.parametrize("method", METHODS)
def test_observed_features_keep_their_bits_and_hidden_ones_are_not_read(trained, method):
    flow, images = trained
    x = images[:4].clone()
    seen = torch.rand(x.shape) < 0.5
    x[0, 0, 0, 0], seen[0, 0, 0, 0] = -0.0, True
    x[1, 0, 0, 0], seen[1, 0, 0, 0] = 1.7, True  # outside the box, and observed
    given = x.clone()
    filled = inpaint(flow, x, seen, method=method, steps=20)
    assert torch.equal(x, given)
    assert torch.equal(filled.x[seen].view(torch.int32), x[seen].view(torch.int32))
    hidden = filled.x[~seen]
    assert ((hidden >= 0) & (hidden <= 1)).all()
    other = torch.where(seen, x, torch.nan)
    assert torch.equal(inpaint(flow, other, seen, method=method, steps=20).x, filled.x)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_result(trained, method):
    flow, images = trained
    arguments = {"method": method, "steps": 15}
    one = inpaint(flow, images[:3], masks(6, 6)["left"], seed=7, **arguments)
    torch.manual_seed(99)
    two = inpaint(flow, images[:3], masks(6, 6)["left"], seed=7, **arguments)
    other = inpaint(flow, images[:3], masks(6, 6)["left"], seed=8, **arguments)
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.log_prob, two.log_prob)
    assert not torch.equal(one.x, other.x)


def test_parameters_are_left_alone(trained):
    flow, images = trained
    flow.zero_grad(set_to_none=True)
    flow.scaling.log_scale.requires_grad_(False)
    before = [p.clone() for p in flow.parameters()]
    with torch.no_grad():  # gradients are taken all the same
        filled = inpaint(flow, images[:2], masks(6, 6)["top"], steps=5)
    assert not filled.x.requires_grad
    assert all(p.grad is None for p in flow.parameters())
    assert [p.requires_grad for p in flow.parameters()].count(False) == 1
    assert all(map(torch.equal, before, flow.parameters()))
    flow.scaling.log_scale.requires_grad_(True)


def test_parameters_want_gradients_again_after_an_error():
    class Broken(Normal):
        def log_prob(self, x):
            return super().log_prob(x) * torch.nan

    model = Broken()
    with pytest.raises(FloatingPointError, match=r"not finite in step 0 for 2 of 2 rows"):
        inpaint(model, torch.rand(2, 6), torch.zeros(6, dtype=torch.bool))
    assert model.mean.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_an_infinite_gradient_names_its_step_and_row(method):
    class Edge(torch.nn.Module):
        """Finite, with a gradient that is infinite where the first feature is small."""

        def log_prob(self, x):
            y = x * 1
            y.register_hook(lambda g: torch.where(x[:, :1] < 5, torch.inf, g))
            return -(y - 0.5).square().sum(1)

    x = torch.full((3, 2), 9.0)
    x[1, 0] = 1.0
    seen = torch.tensor([True, False])
    with pytest.raises(FloatingPointError, match=r"step 0 for 1 of 3 rows, the first .* row 1"):
        inpaint(Edge(), x, seen, method=method, steps=5)


def test_the_box_has_the_units_of_x():
    class Shifted(Normal):
        def log_prob(self, x):
            return super().log_prob((x + 1) / 2)

    x, seen = torch.zeros(4, 6), torch.tensor([True] * 3 + [False] * 3)
    filled = inpaint(Shifted(), x, seen, steps=300, low=-1.0, high=1.0)
    assert filled.x.abs().max() < 1e-3
    start = inpaint(Shifted(), x, seen, steps=0, low=-1.0, high=1.0).x[:, ~seen]
    assert start.min() < -0.3
    assert start.max() > 0.3


def test_the_released_noise_takes_x_for_levels():
    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def log_prob(self, x):
            self.seen.append(x.detach().clone())
            return -x.square().sum(1)

    levels = torch.randint(4, (50, 6))
    x, spy = -1 + 2 * levels / 3, Spy()
    seen = torch.ones(6, dtype=torch.bool)
    seen[0] = False
    inpaint(spy, x, seen, method="paper", steps=2, low=-1, high=1, noise=4)
    one, two, _ = (((v + 1) / 2 * 4)[:, 1:] for v in spy.seen)
    for cells in (one, two):
        assert torch.equal((cells + 1e-6).floor().clamp(max=3), levels[:, 1:].float())
    assert not torch.equal(one, two)


def test_with_noise_adam_still_rises(trained):
    flow, images = trained
    filled = inpaint(flow, images[:6], masks(6, 6)["right"], steps=200, noise=256)
    assert filled.log_prob[-1].mean() > filled.log_prob[0].mean()


def test_a_transform_stands_between_x_and_the_model():
    model = Normal()
    x, seen = torch.rand(3, 6), torch.tensor([True, False] * 3)

    def logit(v):
        v = v.clamp(1e-4, 1 - 1e-4)
        y = v.logit() / 10 + 0.5
        return y, -(10 * v * (1 - v)).log().sum(1)

    filled = inpaint(model, x, seen, steps=200, transform=logit)
    y, log_det = logit(filled.x)
    assert torch.allclose(filled.log_prob[-1], (model.log_prob(y) + log_det).detach(), atol=1e-3)
    half = inpaint(model, x * 2, seen, steps=200, high=2.0, transform=lambda v: v / 2)
    same = inpaint(model, x, seen, steps=200)
    assert torch.allclose(half.x / 2, same.x, atol=1e-3)


def test_records_are_few_and_hold_both_ends():
    model, x = Normal(), torch.rand(2, 6)
    seen = torch.zeros(6, dtype=torch.bool)
    for steps in (0, 1, 7, 450):
        found = inpaint(model, x, seen, steps=steps)
        assert (found.steps[0].item(), found.steps[-1].item()) == (0, steps)
        assert found.log_prob.shape == (len(found.steps), 2)
        assert len(found.steps) <= 202
        assert (found.steps.diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_come_back_as_they_went(dtype):
    x, seen = torch.rand(3, 6, dtype=dtype), torch.tensor([True, False] * 3)
    filled = inpaint(Normal(), x, seen, steps=30)
    assert filled.x.dtype == dtype
    assert torch.equal(filled.x[:, seen], x[:, seen])


def test_released_steps_are_the_script_s():
    assert sum(k**2 for k in range(70)) == RELEASED_STEPS


def test_nothing_hidden_and_nothing_observed():
    model, x = Normal(), torch.rand(2, 6)
    assert torch.equal(inpaint(model, x, torch.ones(6, dtype=torch.bool), steps=5).x, x)
    free = inpaint(model, x, torch.zeros(6, dtype=torch.bool), steps=300)
    highest = model.log_prob(torch.full((1, 6), 0.5)).detach()
    assert (highest - free.log_prob[-1]).max() < 0.01


SEEN = torch.ones(6, dtype=torch.bool)
BAD = [
    ({"x": torch.zeros(2, 6, dtype=torch.uint8)}, TypeError, r"x must be .*uint8"),
    ({"x": [1.0]}, TypeError, r"x must be .*list"),
    ({"observed": torch.ones(6)}, TypeError, r"observed must be a bool .*float32"),
    ({"observed": torch.ones(5, dtype=torch.bool)}, ValueError, r"broadcastable .*\(5,\)"),
    ({"x": torch.zeros(6)}, ValueError, r"x must have shape"),
    ({"x": torch.zeros(0, 6)}, ValueError, r"x must have shape .*\(0, 6\)"),
    ({"x": torch.full((2, 6), torch.nan)}, ValueError, "finite where it is observed"),
    ({"method": "sgd"}, ValueError, r"one of paper, adam, got 'sgd'"),
    ({"steps": -1}, ValueError, r"steps must be an integer >= 0, got -1"),
    ({"restarts": 0}, ValueError, r"restarts must be an integer >= 1"),
    ({"restarts": 2, "method": "paper"}, ValueError, r"restarts must be 1 for method 'paper'"),
    ({"noise": 1}, ValueError, r"noise must be an integer >= 2, got 1"),
    ({"low": 1.0, "high": 1.0}, ValueError, r"low < high, got 1.0 and 1.0"),
    ({"high": math.inf}, ValueError, "high must be finite"),
    ({"low": math.nan}, ValueError, "low must be finite, got nan"),
    ({"low": "a"}, TypeError, "low must be a number, got 'a'"),
    ({"high": None}, TypeError, "high must be a number, got None"),
    ({"steps": 1.5}, ValueError, "steps must be an integer >= 0, got 1.5"),
    ({"method": ["adam"]}, ValueError, "method must be one of"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
    ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
    ({"transform": 3}, TypeError, "transform must be a function, got int"),
    ({"model": "a"}, TypeError, "model must have log_prob, got str"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_what_is_refused(wrong, error, message):
    given = {"x": torch.zeros(2, 6), "observed": SEEN, **wrong}
    with pytest.raises(error, match=message):
        inpaint(**{"model": Normal(), **given})


def test_a_model_that_gives_no_value_for_each_row_is_refused():
    class Sum(torch.nn.Module):
        def log_prob(self, x):
            return -x.square().sum()

    with pytest.raises(ValueError, match=r"one value for each of 2 rows, got shape \(\)"):
        inpaint(Sum(), torch.rand(2, 6), ~SEEN)
