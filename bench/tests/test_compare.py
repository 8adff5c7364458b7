"""The comparison finds what got slower, and keeps quiet where there is only noise."""

import numpy as np
import pytest

from bench import compare, records

SHAPE = {"rows": 1024, "features": 8, "hidden": [32, 32], "couplings": 4}


def measurement(samples=None, seconds=1e-2, **given):
    record = {
        "device": "some CPU",
        "case": "tabular",
        "direction": "log_prob",
        "precision": "float32",
        "provider": "nicefast",
        "status": "timed",
        "allocator": "default",
        "median": seconds,
        **SHAPE,
    }
    if samples is not None:
        low, median, high = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
        record |= {"samples": list(samples), "median": median, "low": low, "high": high}
    return record | given


def noisy(generator, seconds=1e-2, rounds=9, spread=0.05):
    """Rounds as on a shared machine: scattered, and every tenth disturbed by somebody else."""
    times = seconds * np.exp(spread * generator.standard_normal(rounds))
    disturbed = generator.random(rounds) < 0.1
    return (times * np.where(disturbed, 1 + generator.random(rounds), 1)).tolist()


def store(path, *found):
    for record in found:
        records.append(path, record)
    return str(path)


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.mark.parametrize("rounds", [4, 5, 9, 10, 40])
@pytest.mark.parametrize("spread", [0.01, 0.05, 0.15])
def test_pure_noise_is_rarely_called_a_difference(generator, rounds, spread):
    cries = sum(
        compare.ratio(
            *(measurement(noisy(generator, rounds=rounds, spread=spread)) for _ in "ab")
        ).verdict
        != "same"
        for _ in range(200)
    )
    assert cries <= 10


@pytest.mark.parametrize("rounds", [9, 40])
def test_noise_without_samples_is_rarely_called_a_difference(generator, rounds):
    def one():
        return measurement(noisy(generator, rounds=rounds)) | {"samples": None}

    cries = sum(compare.ratio(one(), one()).verdict != "same" for _ in range(200))
    assert cries <= 10


@pytest.mark.parametrize(("rounds", "found"), [(9, 150), (40, 200)])
def test_a_slowdown_of_a_fifth_is_found(generator, rounds, found):
    verdicts = [
        compare.ratio(
            measurement(noisy(generator, 1.0, rounds, 0.03)),
            measurement(noisy(generator, 1.2, rounds, 0.03)),
        ).verdict
        for _ in range(200)
    ]
    assert verdicts.count("slower") >= found
    assert "faster" not in verdicts


def test_the_exit_code_hardly_ever_cries_over_many_measurements(tmp_path, generator, capsys):
    cries = 0
    for run in range(20):
        a, b = (
            store(
                tmp_path / f"{side}{run}.jsonl",
                *(measurement(noisy(generator, spread=0.1), rows=n) for n in range(1, 41)),
            )
            for side in "ab"
        )
        cries += compare.main([a, b])
    assert cries <= 3


@pytest.mark.parametrize("n", [5, 6, 9, 40])
def test_medians_are_distributed_as_those_of_drawn_resamples(generator, n):
    samples = np.sort(generator.random(n))
    drawn = np.median(samples[generator.integers(0, n, (40_000, n))], axis=1)
    found = compare.resampled_medians(samples, generator, 40_000)
    # two-sample Kolmogorov-Smirnov, on the values that there are
    at = np.unique(np.concatenate((drawn, found)).round(12)) + 1e-9
    cumulative = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (drawn, found)]
    assert np.abs(cumulative[0] - cumulative[1]).max() < 0.015


def test_the_band_is_never_narrower_than_the_floor():
    same = compare.ratio(measurement([1e-2] * 9), measurement([1.04e-2] * 9))
    assert same.verdict == "same"
    assert same.low == pytest.approx(1.04 / 1.05)
    assert same.high == pytest.approx(1.04 * 1.05)
    assert compare.ratio(measurement([1e-2] * 9), measurement([1.06e-2] * 9)).verdict == "slower"
    assert compare.ratio(measurement([1e-2] * 9), measurement([0.94e-2] * 9)).verdict == "faster"


def test_quantiles_serve_where_samples_are_absent():
    a = measurement(seconds=1.0, low=0.9, high=1.15)
    assert compare.ratio(a, measurement(seconds=1.2, low=1.1, high=1.3)).verdict == "same"
    assert compare.ratio(a, measurement(seconds=1.4, low=1.3, high=1.5)).verdict == "slower"
    assert compare.ratio(a, measurement([0.5] * 9)).verdict == "faster"
    assert compare.ratio(measurement(), measurement(seconds=2e-2)).verdict == "slower"


def test_exit_codes_and_table(tmp_path, generator, capsys):
    a = store(
        tmp_path / "a.jsonl",
        measurement(noisy(generator, 1e-2, spread=0.02)),
        measurement(noisy(generator, 1e-2, spread=0.02), case="MNIST"),
        measurement(noisy(generator, 1e-2, spread=0.02), provider="plain"),
    )
    b = store(
        tmp_path / "b.jsonl",
        measurement(noisy(generator, 1.2e-2, spread=0.02), device="another CPU"),
        measurement(noisy(generator, 0.5e-2, spread=0.02), case="MNIST", device="another CPU"),
        measurement(noisy(generator, 1e-2, spread=0.02), provider="plain", device="another CPU"),
    )
    assert compare.main([a, b]) == 1
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith(("tab", "MN"))}
    name = "tabular log_prob float32, 1,024 rows, D=8, hidden 32 x 2, 4 couplings, default"
    assert lines["tabular"].startswith(name)
    assert lines["tabular"].endswith(" slower")
    assert lines["MNIST"].endswith(" faster")
    assert "nicefast: 2 compared: 1 faster, 1 slower, 0 same" in text
    assert compare.main([a, b, "--provider", "plain"]) == 0
    assert compare.main([a, a]) == 0


def test_what_is_timed_on_one_side_only_is_counted_and_named(tmp_path, capsys):
    lost = {"status": "failed: too\nlarge", "median": None}
    a = store(
        tmp_path / "a" / "x.jsonl",
        measurement(),
        measurement(case="CIFAR"),
        measurement(case="MNIST"),
        measurement(allocator="no-faults") | lost,
    )
    store(
        tmp_path / "b" / "x.jsonl",
        measurement(),
        measurement(case="MNIST") | lost,
        measurement(precision="bf16"),
        measurement(allocator="no-faults") | lost,
    )
    assert compare.main([a, str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "2 timed in A only:\n  CIFAR log_prob" in text
    assert "default (failed: too large)" in text
    assert "1 timed in B only:\n  tabular log_prob bf16" in text
    assert "no-faults" not in text


def test_the_newest_run_is_compared(tmp_path, capsys):
    def at(day, seconds):
        return measurement(seconds=seconds, run={"date": f"2026-01-0{day}T00:00:00Z"})

    a = store(tmp_path / "a.jsonl", at(2, 1.0), at(1, 3.0))
    b = store(tmp_path / "b.jsonl", at(1, 9.0), at(3, 1.0))
    assert compare.main([a, b]) == 0


def test_nothing_in_common_is_one_line_and_code_2(tmp_path, capsys):
    a = store(tmp_path / "a.jsonl", measurement())
    b = store(tmp_path / "b.jsonl", measurement(case="MNIST"))
    for arguments in ([a, b], [a, a, "--provider", "zuko"], [a, str(tmp_path / "absent")]):
        assert compare.main(arguments) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1


def test_several_devices_on_one_side_are_refused(tmp_path, capsys):
    a = store(tmp_path / "a.jsonl", measurement())
    b = store(tmp_path / "b.jsonl", measurement(), measurement(device="GPU"))
    assert compare.main([a, b]) == 2
    assert "holds several devices, name the folder of one: GPU; some CPU" in capsys.readouterr().err
