"""The table of what a fleet would need: bound by memory, products or links, all of it computed."""

import doctest

import pytest

from bench import fleet
from nicefast.roofline import DEVICES, PRECISIONS

H100 = DEVICES["H100 SXM"]
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


def test_hidden_that_is_given_again_adds_layers(capsys):
    fleet.main(["--hidden", "64", "--hidden", "32", "16"])
    assert capsys.readouterr().out == fleet.table(hidden=(64, 32, 16)) + "\n"
    fleet.main([])
    assert capsys.readouterr().out == fleet.table() + "\n"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fleet.table(share=0), "share must be above 0 and at most 1, got 0"),
        (lambda: fleet.table(share=1.5), "share must be above 0 and at most 1, got 1.5"),
        (lambda: fleet.seconds(H100, "bf16", 1, 0, 4, (3,), 2), "gpus must be at least 1, got 0"),
    ],
)
def test_errors_name_the_argument_what_fits_and_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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


def test_examples_run():
    result = doctest.testmod(fleet)
    assert result.attempted
    assert not result.failed
