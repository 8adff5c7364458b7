import copy
import pickle

import numpy as np
import pytest
import torch

import nicefast as nf
from helpers import partitions

P = nf.Partition


def test_half():
    assert P.half(4).mask.tolist() == [True, True, False, False]
    assert P.half(5).mask.tolist() == [True, True, True, False, False]


def test_alternating():
    assert P.alternating(5).conditioning.tolist() == [0, 2, 4]
    assert P.alternating(5, parity=1).conditioning.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("height", "width", "channels"), [(2, 2, 1), (3, 5, 1), (4, 3, 2), (1, 2, 3)]
)
@pytest.mark.parametrize("parity", [0, 1])
def test_checkerboard(height, width, channels, parity):
    mask = P.checkerboard(height, width, channels, parity).mask.view(channels, height, width)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                assert mask[c, i, j].item() == ((i + j) % 2 == parity)


def test_random_is_a_function_of_its_seed():
    assert P.random(50, 1) == P.random(50, 1)
    assert P.random(50, 1) != P.random(50, 2)
    assert len(P.random(51, 1).conditioning) == 26
    before = torch.get_rng_state()
    P.random(50, 3)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone


@pytest.mark.parametrize("d", [2, 3, 8, 13])
def test_sides(d):
    for p in partitions(d):
        assert p.features == len(p) == d
        assert p.mask.dtype == torch.bool
        assert p.conditioning.tolist() == p.mask.nonzero().flatten().tolist()
        assert p.shifted.tolist() == (~p.mask).nonzero().flatten().tolist()
        assert torch.equal((~p).mask, ~p.mask)
        assert ~~p == p
        assert (~p).features == d


def test_located_features_are_the_shifted_ones():
    device = torch.device("cpu")
    for d in (2, 3, 8, 13):
        for p in partitions(d):
            for conditioning, expected in ((False, p.shifted), (True, p.conditioning)):
                f = p.locate(device, conditioning)
                assert f.size == len(expected)
                if f.step:
                    assert f.indices is None
                    assert [f.start + f.step * j for j in range(f.size)] == expected.tolist()
                else:
                    assert torch.equal(f.indices, expected)
                    assert torch.equal(f.slots[expected], torch.arange(f.size, dtype=torch.int32))
                    assert (f.slots == -1).sum() == d - f.size


def test_maps_made_in_inference_mode_or_a_trace_serve_training():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = nf.NICE(8, hidden=(4,), partition=P.random(8, 77))
    with FakeTensorMode() as mode:
        mode.allow_non_fake_inputs = True
        model.log_prob(torch.zeros(3, 8))
    with torch.inference_mode():
        model.log_prob(torch.zeros(3, 8))
    model.log_prob(torch.zeros(3, 8)).sum().backward()


def test_half_and_alternating_are_arithmetic():
    """No map on the device: index arithmetic in the kernel."""
    device = torch.device("cpu")
    for p in (P.half(9), ~P.half(9), P.alternating(9), ~P.alternating(9)):
        assert p.locate(device).step in (1, 2)
    assert P.random(9, 0).locate(device).step == 0
    assert P.checkerboard(4, 4).locate(device).step == 0


def test_equality_and_hash_follow_the_mask():
    assert P.from_mask(torch.tensor([True, True, False])) == P.half(3)
    assert hash(P.from_mask(torch.tensor([True, True, False]))) == hash(P.half(3))
    assert {P.half(4): 1}[P.from_mask(P.half(4).mask)] == 1
    assert P.half(4) != P.alternating(4)
    assert P.half(4) != "half"


def test_immutable():
    p = P.half(4)
    with pytest.raises(AttributeError, match="immutable"):
        p.features = 3
    p.mask[0] = False  # a copy
    assert p.mask.tolist() == [True, True, False, False]
    with pytest.raises(TypeError, match=r"Partition\.half"):
        P()


def test_printable_and_copyable():
    assert repr(P.alternating(8, parity=1)) == "Partition.alternating(8, parity=1)"
    assert repr(~P.half(8)) == "~Partition.half(8)"
    assert repr(~~P.half(8)) == "Partition.half(8)"
    assert "x.x" in repr(P.from_mask(torch.tensor([True, False, True])))
    for p in partitions(8):
        assert pickle.loads(pickle.dumps(p)) == p
        assert copy.deepcopy(p) == p
        assert copy.copy(p) == p


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: P.half(1), ValueError, "features must be at least 2, got 1"),
        (lambda: P.half(4.5), TypeError, "features must be an integer, got 4.5"),
        (lambda: P.alternating(4, parity=2), ValueError, "parity must be 0 or 1, got 2"),
        (lambda: P.checkerboard(0, 4), ValueError, "height must be at least 1, got 0"),
        (lambda: P.checkerboard(1, 1), ValueError, "at least 2 features, got 1"),
        (lambda: P.random(4, seed=-1), ValueError, "seed must be at least 0, got -1"),
        (lambda: P.from_mask(torch.ones(4)), TypeError, r"mask must be a bool tensor.*float32"),
        (lambda: P.from_mask(None), TypeError, "mask must be a bool tensor or a seq.*got NoneType"),
        (lambda: P.from_mask("ab"), TypeError, "mask must be a bool tensor or a seq.*got str"),
        (lambda: P.from_mask(torch.ones(2, 2, dtype=torch.bool)), ValueError, r"mask .*\(2, 2\)"),
        (lambda: P.from_mask(torch.ones(4, dtype=torch.bool)), ValueError, "no feature is shifted"),
        (lambda: P.from_mask(torch.zeros(4, dtype=torch.bool)), ValueError, "no feature is cond"),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_masked_mask_is_none():
    with pytest.raises(ValueError, match="mask has masked values"):
        nf.Partition.from_mask(np.ma.array([True, False, True], mask=[False, True, False]))
