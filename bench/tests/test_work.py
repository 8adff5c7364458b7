"""Work counted by hand, and on a real flow by PyTorch."""

import doctest

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nicefast as nf
from bench import work
from bench.work import elementwise_work, flow_work
from nicefast.roofline import DIRECTIONS, Work

# D = 4, hidden (3,), 2 couplings, 10 rows. A conditioner is 2 -> 3 -> 2: 6 + 6 = 12 weights and
# 3 + 2 = 5 biases. Two of them and 4 log_scales: 24 + 10 + 4 = 38 parameters, 152 bytes.
# 10 rows of 4 numbers are 160 bytes, their log_prob 40.
EVEN = {
    "log_prob": Work(2 * 10 * 24, 160 + 40 + 152),
    "forward": Work(480, 160 + 160 + 152),
    "inverse": Work(480, 160 + 160 + 152),
    "sample": Work(480, 160 + 152),
    # 3 x 480, without the gradient of x: 2 * 10 * (2 x 3) = 120; weights twice, gradients once
    "training": Work(1440 - 120, 2 * 160 + 40 + 3 * 152),
}
# D = 5, 3 couplings: 3 -> 3 -> 2, then 2 -> 3 -> 3, then 3 -> 3 -> 2. Weights 9 + 6, 6 + 9, 9 + 6,
# in all 45; biases 5 + 6 + 5 = 16; 5 log_scales: 66 parameters, 264 bytes. 10 rows are 200 bytes.
ODD = {
    "log_prob": Work(900, 200 + 40 + 264),
    "forward": Work(900, 200 + 200 + 264),
    "inverse": Work(900, 200 + 200 + 264),
    "sample": Work(900, 200 + 264),
    # the gradient of x would take 2 * 10 * (3 x 3) = 180
    "training": Work(2700 - 180, 2 * 200 + 40 + 3 * 264),
}
# D = 4, context 2, 2 couplings: each 2 + 2 -> 3 -> 2: 12 + 6 = 18 weights, 5 biases; 50 parameters,
# 200 bytes. 10 rows are 160 bytes and their context is 80.
CONTEXT = {
    "log_prob": Work(720, 160 + 80 + 40 + 200),
    "forward": Work(720, 160 + 80 + 160 + 200),
    "inverse": Work(720, 160 + 80 + 160 + 200),
    "sample": Work(720, 80 + 160 + 200),
    # no gradient of x and context in the first (2 * 10 * 4 x 3), of the context in the second
    "training": Work(2160 - 240 - 120, 2 * (160 + 80) + 40 + 3 * 200),
}
# 10 rows of 5 features, 2 of which are shifted: rows are 200 bytes, the shifted half or a shift 80
ELEMENTWISE = {
    "coupling forward": 200 + 80 + 200,
    "coupling inverse": 200 + 80 + 200,
    "coupling in place": 80 + 80 + 80,
    "coupling backward": 80 + 80,
    "scaling forward": 200 + 40,
    "scaling backward": 200 + 40 + 200,
    "sampling": 200,
}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_work_of_a_flow_is_what_one_counts_by_hand(direction):
    assert flow_work(10, 4, (3,), 2, direction) == EVEN[direction]
    assert flow_work(10, 5, (3,), 3, direction) == ODD[direction]
    assert flow_work(10, 4, (3,), 2, direction, context=2) == CONTEXT[direction]


def test_work_without_hidden_layers():
    # 2 -> 2 twice: 8 weights, 4 biases, 4 log_scales; the first product's input is x
    assert flow_work(1, 4, (), 2, "log_prob") == (16, 16 + 4 + 64)
    assert flow_work(1, 4, (), 2, "training") == (48 - 8, 32 + 4 + 192)


def test_without_rows_only_the_weights_are_left():
    assert flow_work(0, 4, (3,), 2, "log_prob") == (0, 152)


@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
@pytest.mark.parametrize(("features", "context"), [(6, 0), (7, 0), (7, 3)])
def test_work_is_that_of_a_real_flow(partition, features, context):
    hidden, couplings, rows = (8, 5), 3, 10
    flow = nf.NICE(features, hidden, couplings, partition=partition, context=context)
    x = torch.randn(rows, features)
    c = torch.randn(rows, context) if context else None

    scored = flow_work(rows, features, hidden, couplings, "log_prob", context)
    assert scored.flops == rows * flow.plan(x, c).engine.stack.flops
    parameters = sum(p.numel() for p in flow.parameters())
    assert scored.bytes == 4 * (x.numel() + rows * context + rows + parameters)

    with FlopCounterMode(display=False) as counter:  # layer by layer: products as autograd has them
        h = x
        for coupling in flow.couplings:
            h, _ = coupling(h, c)
        h.square().sum().backward()
    trained = flow_work(rows, features, hidden, couplings, "training", context)
    assert trained.flops == counter.get_total_flops()


@pytest.mark.parametrize("operation", ELEMENTWISE)
def test_work_of_elementwise_operations_is_what_one_counts_by_hand(operation):
    assert elementwise_work(10, 5, operation) == (0, ELEMENTWISE[operation])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: flow_work(1, 4, (3,), 2, "backward"),
            "direction must be one of log_prob, .*training, got 'backward'",
        ),
        (
            lambda: elementwise_work(1, 4, "scaling"),
            "operation must be one of coupling forward, .*sampling, got 'scaling'",
        ),
        (lambda: flow_work(-1, 4, (3,), 2, "sample"), "rows must be at least 0, got -1"),
        (lambda: flow_work(1, 1, (3,), 2, "sample"), "features must be at least 2, got 1"),
        (lambda: flow_work(1, 4, (3, 0), 2, "sample"), "hidden must be at least 1, got 0"),
        (lambda: flow_work(1, 4, (3,), 0, "sample"), "couplings must be at least 1, got 0"),
        (lambda: flow_work(1, 4, (3,), 2, "sample", -1), "context must be at least 0, got -1"),
        (lambda: elementwise_work(-1, 4, "sampling"), "rows must be at least 0, got -1"),
        (lambda: elementwise_work(1, 1, "coupling forward"), "features must be at least 2, got 1"),
    ],
)
def test_errors_name_the_argument_what_fits_and_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples_run():
    result = doctest.testmod(work)
    assert result.attempted
    assert not result.failed
