"""Work counted by hand, ceilings that bound it, and the table of what a fleet would need."""

import doctest
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nicefast as nf
from bench import fleet
from nicefast.roofline import (
    DEVICES,
    DIRECTIONS,
    OPERATIONS,
    PRECISIONS,
    Ceilings,
    Work,
    elementwise_work,
    flow_work,
)

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
H100 = DEVICES["H100 SXM"]


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
    assert scored.flops == rows * nf.choose_path(flow, x, c).chain.flops
    parameters = sum(p.numel() for p in flow.parameters())
    assert scored.bytes == 4 * (x.numel() + rows * context + rows + parameters)

    with FlopCounterMode(display=False) as counter:  # layer by layer: products as autograd has them
        h = x
        for coupling in flow.couplings:
            h, _ = coupling(h, c)
        h.square().sum().backward()
    trained = flow_work(rows, features, hidden, couplings, "training", context)
    assert trained.flops == counter.get_total_flops()


@pytest.mark.parametrize("operation", OPERATIONS)
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
        (lambda: H100.ceilings("fp16"), "precision must be one of bf16, .*fp32, got 'fp16'"),
        (lambda: flow_work(-1, 4, (3,), 2, "sample"), "rows must be at least 0, got -1"),
        (lambda: flow_work(1, 1, (3,), 2, "sample"), "features must be at least 2, got 1"),
        (lambda: flow_work(1, 4, (3, 0), 2, "sample"), "hidden must be at least 1, got 0"),
        (lambda: flow_work(1, 4, (3,), 0, "sample"), "couplings must be at least 1, got 0"),
        (lambda: flow_work(1, 4, (3,), 2, "sample", -1), "context must be at least 0, got -1"),
        (lambda: elementwise_work(-1, 4, "sampling"), "rows must be at least 0, got -1"),
        (lambda: elementwise_work(1, 1, "coupling forward"), "features must be at least 2, got 1"),
        (lambda: fleet.table(share=0), "share must be above 0 and at most 1, got 0"),
        (lambda: fleet.table(share=1.5), "share must be above 0 and at most 1, got 1.5"),
        (lambda: fleet.seconds(H100, "bf16", 1, 0, 4, (3,), 2), "gpus must be at least 1, got 0"),
    ],
)
def test_errors_name_the_argument_what_fits_and_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_larger_of_the_two_times_counts():
    ceilings = Ceilings(flops=100.0, bytes=10.0)
    assert ceilings.seconds(*Work(300, 20)) == 3  # products: 3 s, memory: 2 s
    assert ceilings.seconds(*Work(300, 50)) == 5  # memory: 5 s


@pytest.mark.parametrize("device", DEVICES)
def test_published_rates_are_in_order(device):
    published = DEVICES[device]
    assert 0 < published.fp32 < published.tf32 <= published.bf16
    assert 0 < published.host < published.bytes
    for precision in PRECISIONS:
        ceilings = published.ceilings(precision)
        assert 0 < ceilings.flops <= published.bf16
        assert ceilings.bytes == published.bytes
    assert 3 * published.ceilings("tf32x3").flops == pytest.approx(published.tf32)


# 8,000,000 rows of D = 4, hidden (3,), 2 couplings: 48 operations and 20 bytes each, so that
# memory takes longest, and 16 bytes of each come over the link; 152 bytes of weights for each GPU
FLOW = (4, (3,), 2)
ROWS = 8_000_000


def test_a_fleet_is_bound_by_memory_or_by_its_links():
    assert fleet.seconds(H100, "bf16", ROWS, 1, *FLOW) == pytest.approx((20 * ROWS + 152) / 3.35e12)
    fed = fleet.seconds(H100, "bf16", ROWS, 1, *FLOW, fed=True)
    assert fed == pytest.approx(16 * ROWS / 64e9)


def test_a_wide_flow_is_bound_by_products():
    # D = 64, hidden 256 x 3: 32 * 256 + 2 * 256 * 256 + 256 * 32 = 147,456 weights, 4 times
    least = fleet.seconds(H100, "bf16", 10**9, 1, 64, (256,) * 3, 4)
    assert least == pytest.approx(2 * 589_824 * 1e9 / 989.4e12)


@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_eight_gpus_take_an_eighth(precision, fed):
    one, eight = (fleet.seconds(H100, precision, ROWS, n, *FLOW, fed=fed) for n in (1, 8))
    assert eight == pytest.approx(one / 8, rel=1e-4)  # but each reads the weights


def test_rows_that_do_not_divide_wait_for_the_longest_share():
    assert fleet.seconds(H100, "bf16", 9, 8, *FLOW) == fleet.seconds(H100, "bf16", 2, 1, *FLOW)


def test_half_of_the_roofline_takes_twice_as_long():
    whole, half = (fleet.seconds(H100, "tf32", ROWS, 1, *FLOW, share=s) for s in (1, 0.5))
    assert half == 2 * whole


def test_the_table_has_every_device_and_precision_and_its_assumptions():
    text = fleet.table()
    lines = text.splitlines()
    for device in DEVICES:
        for precision in PRECISIONS:
            assert sum(line.startswith(f"| {device} | {precision} |") for line in lines) == 2
    assert {line.count("|") for line in lines if line.startswith("|")} == {9}
    # 589,824 weights: 2 * 589,824 * 1e9 / 989.4e12 = 1.192 s; 256 bytes at 64e9 B/s: 4 s
    assert "| H100 SXM | bf16 | 1.19 s | 149 ms | 1.19 ms | 4 s | 500 ms | 4 ms |" in lines
    assert "A bound, not a promise: all of the roofline" in text
    assert "1,179,648 operations" in text
    assert "A bound, not a promise: 0.5 of the roofline" in fleet.table(share=0.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.000524, "0.524 ms"),
        (0.0125, "12.5 ms"),
        (0.4727, "473 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (59.94, "59.9 s"),
        (59.96, "60 s"),
        (59.99, "1 min"),
        (90, "1.5 min"),
        (3599, "1 h"),
        (7200, "2 h"),
        (86_390, "1 day"),
        (129_600, "1.5 days"),
        (86_400 * 12_345, "12,300 days"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert fleet.duration(seconds) == text


def test_the_command_prints_the_table(capsys):
    assert fleet.main(["--features", "8", "--hidden", "16", "--couplings", "2"]) == 0
    assert capsys.readouterr().out == fleet.table(8, (16,), 2) + "\n"
    with pytest.raises(SystemExit):
        fleet.main(["--share", "2"])
    assert "share must be above 0 and at most 1, got 2.0" in capsys.readouterr().err


def test_examples_of_the_table_run():
    result = doctest.testmod(sys.modules["bench.fleet"])
    assert result.attempted
    assert not result.failed
