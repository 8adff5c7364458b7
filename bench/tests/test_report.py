"""The report says what the stored lines say, wins and losses, and survives what is missing."""

import json
import struct
from pathlib import Path

import pytest

from bench import records, report
from bench.providers import FROZEN

pytest.importorskip("matplotlib", reason="needs matplotlib")

DEVICE = "Some CPU, 2 threads"
PROVIDERS = ("nicefast", "plain", "compile", "nflows", "normflows", "FrEIA", "zuko")
FLOPS, BYTES = 4e12, 3e10


def measurement(provider="nicefast", seconds=1e-2, **given):
    shape = {"rows": 16384, "features": 64, "hidden": [256, 256, 256], "couplings": 4} | {
        k: v for k, v in given.items() if k in ("rows", "features", "hidden", "couplings")
    }
    layers = [shape["features"] // 2, *shape["hidden"], shape["features"] // 2]
    operations = (
        2 * shape["rows"] * shape["couplings"] * sum(map(int.__mul__, layers, layers[1:]))
        if shape["hidden"]
        else 0
    )
    moved = 4 * shape["rows"] * (shape["features"] + 1)
    least = max(operations / FLOPS, moved / BYTES)
    record = {
        "case": "tabular",
        "title": "D=64, hidden 256 x 3, 4 couplings, 16,384 rows",
        "direction": "log_prob",
        "precision": "float32",
        "provider": provider,
        "status": "timed",
        **shape,
        "allocator": "no-faults",
        "mode": "float32",
        "timer": "perf_counter",
        "median": seconds,
        "low": 0.95 * seconds,
        "high": 1.1 * seconds,
        "samples": [seconds * f for f in (0.9, 0.95, 1.0, 1.1, 1.2)],
        "rounds": 5,
        "faults": 0.0,
        "launches": None,
        "peak_bytes": 3 << 20,
        "operations": operations,
        "bytes": moved,
        "ceilings": {"flops": FLOPS, "bytes": BYTES},
        "error": 1.5e-5,
        "rows_per_s": shape["rows"] / seconds,
        "flops_per_s": operations / seconds,
        "bytes_per_s": moved / seconds,
        "bound": "products" if operations / FLOPS > moved / BYTES else "bytes",
        "share": least / seconds,
        "to_best_other": None,
        "best_other": None,
        "device": DEVICE,
        "device_type": "cpu",
        "run": {
            "commit": "0123456789abcdef",
            "uncommitted_changes": False,
            "date": "2026-01-02T03:04:05Z",
            "seed": 0,
            "threads": 2,
            "versions": {"torch": "2.13.0", "nflows": "0.14"},
        },
    }
    return record | given


def failure(provider, status, **given):
    record = measurement(provider, **given)
    absent = ("median", "low", "high", "samples", "rows_per_s", "flops_per_s", "share", "error")
    return {k: v for k, v in record.items() if k not in absent} | {"status": status}


def group(factors, **given):
    """One measurement of each provider, its time in units of 10 ms, with the ratios."""
    seconds = {p: 1e-2 * f for p, f in factors.items()}
    found = []
    for p, own in seconds.items():
        best = min((o for o in seconds if o != p), key=seconds.get)
        ratio = {"to_best_other": seconds[best] / own, "best_other": best}
        found.append(measurement(p, own, **ratio, **given))
    return found


def whole_run():
    """Two allocator states, two precisions, wins and losses, growth, element-wise, failures."""
    slower = {p: 1 + 0.25 * i for i, p in enumerate(PROVIDERS)}
    found = []
    for state in ("no-faults", "default"):
        for precision in ("float32", "bf16"):
            for direction in ("log_prob", "training"):
                given = {"allocator": state, "precision": precision, "direction": direction}
                found += group(slower, **given)
        found += group({"nicefast": 1.25, "plain": 1.0}, case="MNIST", allocator=state)
        for i in range(5):
            rows = 256 * 4**i
            times = {p: 0.1 * f * 3**i for p, f in slower.items()}
            found += group(times, case="growth-rows", rows=rows, allocator=state)
        for i, couplings in enumerate((2, 4, 8, 16)):
            kept = {"nicefast": 4, "plain": 2 + 3 * couplings}
            times = {p: slower[p] * 2**i for p in kept}
            given = {"case": "growth-couplings", "couplings": couplings, "allocator": state}
            for r in group(times, direction="training", **given):
                found.append(r | {"peak_bytes": kept[r["provider"]] << 20})
        found += group(
            {"nicefast": 0.2, "plain": 0.5},
            case="coupling",
            direction="forward",
            hidden=[],
            couplings=1,
            allocator=state,
        )
    found.append(failure("zuko", "failed: log_prob is off by 1e-2,\n allowed 1e-5", case="MNIST"))
    found.append(failure("nflows", "not installed: No module named 'nflows'", case="MNIST"))
    return found


def store(path, found, tail=""):
    for record in found:
        records.append(path, record)
    with path.open("a") as file:
        file.write(tail)
    return path


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_records_come_back_as_they_were(tmp_path):
    found = whole_run()
    store(tmp_path / "deep" / "er" / "a.jsonl", found[:3])
    store(tmp_path / "deep" / "b.jsonl", found[3:5])
    assert len(records.read([tmp_path])) == 5
    assert records.read([tmp_path / "deep" / "er" / "a.jsonl"]) == found[:3]
    # a file that is named twice, by itself and by its folder, counts once
    assert len(records.read([tmp_path, tmp_path / "deep" / "b.jsonl"])) == 5


def test_the_cut_off_last_line_is_skipped_and_the_next_run_goes_on_below_it(tmp_path):
    line = json.dumps(measurement("plain"))
    path = store(tmp_path / "a.jsonl", [measurement()], tail=line[: len(line) // 2])
    with pytest.warns(UserWarning, match=r"a\.jsonl: skipped 1 broken of 2 lines"):
        assert records.read([path]) == [measurement()]
    records.append(path, measurement("zuko"))
    with pytest.warns(UserWarning, match="skipped 1 broken of 3"):
        assert [r["provider"] for r in records.read([path])] == ["nicefast", "zuko"]


@pytest.mark.parametrize("text", ["", "\n", '{"case": "tab', "[1, 2]\n", '{"case": "x"}\n'])
def test_a_file_without_any_measurement_is_named(tmp_path, text):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"no measurement in .*bad\.jsonl"):
        records.read([tmp_path])


def test_paths_without_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no \*\.jsonl in"):
        records.read([tmp_path])
    with pytest.raises(ValueError, match=r"no such file or folder: .*absent"):
        records.read([tmp_path / "absent"])


def test_the_newest_run_of_a_provider_counts_even_if_it_failed():
    def at(day, record):
        return record | {"run": record["run"] | {"date": f"2026-01-{day:02}T00:00:00Z"}}

    old, new = at(1, measurement(seconds=1.0)), at(2, measurement(seconds=2.0))
    broken = at(3, failure("plain", "failed: oh"))
    other = at(1, measurement(rows=7))
    found = records.groups([new, old, at(1, measurement("plain")), other, broken])
    assert [[r["provider"] for r in g] for g in found.values()] == [
        ["nicefast", "plain"],
        ["nicefast"],
    ]
    assert next(iter(found.values())) == [new, broken]
    assert len(records.groups([old, old | {"allocator": "default"}])) == 2


def test_slug():
    assert records.slug("AMD EPYC, 2 threads") == "amd-epyc-2-threads"
    assert records.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert records.slug("///") == "device"


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    path = report.report(whole_run(), tmp_path_factory.mktemp("report"))
    return path, path.read_text()


def test_the_report_names_where_and_what(reported):
    path, text = reported
    assert path.name == "report.md"
    assert text.startswith(f"# Benchmark: {DEVICE}\n")
    for part in ("`0123456789ab`", "2026-01-02T03:04:05Z", "torch 2.13.0", "no-faults, default"):
        assert part in text
    assert "measured ceilings, bf16: 4 TFLOP/s, 30 GB/s" in text


def test_every_group_has_a_table_with_its_numbers(reported):
    _, text = reported
    title = "### tabular: D=64, hidden 256 x 3, 4 couplings, 16,384 rows; training, bf16, default"
    assert text.count("### ") == len(records.groups(whole_run()))
    lines = text[text.index(title) :].splitlines()
    assert "TFLOP/s" in lines[2]
    cells = [c.strip() for c in lines[4].strip("|").split("|")]
    assert cells[:4] == ["**nicefast**", "10", "9.5-11", "1,638,400"]
    assert cells[6:] == ["1.25", "-", "0", "3.0", "1.5e-05", "float32"]
    assert all(line.count("|") == lines[2].count("|") for line in lines[2:11])
    assert "GB/s" in text[text.index("### coupling") :].splitlines()[2]


def test_who_was_not_timed_is_there_with_the_reason(reported):
    _, text = reported
    assert "- zuko: failed: log_prob is off by 1e-2, allowed 1e-5\n" in text
    assert "- nflows: not installed: No module named 'nflows'\n" in text


def test_the_summary_shows_losses_and_both_states_side_by_side(reported):
    _, text = reported
    summary = text[text.index("## nicefast and the best other") : text.index("## Pictures")]
    assert "| case | direction | precision | no-faults | default |" in summary
    assert "| tabular | log_prob | float32 | 1.25 (plain) | 1.25 (plain) |" in summary
    lost = "**0.80 (plain), slower**"
    assert f"| MNIST | log_prob | float32 | {lost} | {lost} |" in summary
    assert "| growth-rows, 4,096 rows |" in summary
    assert "it is slower in 2." in summary


def test_the_least_times_are_those_of_the_roofline(reported):
    _, text = reported
    # 4 couplings of 32 -> 256 -> 256 -> 256 -> 32: 77.3 GFLOP for 16,384 rows
    flops = 2 * 16384 * 4 * (2 * 32 * 256 + 2 * 256 * 256)
    row = next(line for line in text.splitlines() if line.endswith(_bounds_end(flops)))
    here = max(flops / FLOPS, (4 * 16384 * 65 + 4 * _PARAMETERS) / BYTES)
    assert row.startswith(
        f"| D=64, hidden 256 x 3, 4 couplings, 16,384 rows | log_prob | {here * 1e3:.3g} |"
    )
    assert "Least time to score 10^12 rows" in text


_PARAMETERS = 4 * (2 * 32 * 256 + 2 * 256 * 256 + 3 * 256 + 32) + 64


def _bounds_end(flops):
    """The row's last cell: MI300X, three TF32 products of 653.7 TFLOP/s, or bf16."""
    return f"| {3 * flops / 653.7e12 * 1e3:.3g} / {flops / 1307.4e12 * 1e3:.3g} |"


def test_the_pictures_are_pictures(reported):
    path, text = reported
    for name in ("ratios.png", "roofline.png", "throughput.png", "memory.png"):
        assert f"]({name})" in text
        width, height = png_size(path.parent / name)
        assert width > 600
        assert height > 300
        assert (path.parent / name).stat().st_size > 10_000


def test_pictures_without_data_are_neither_drawn_nor_linked_nor_left_over(tmp_path):
    report.report(whole_run(), tmp_path)
    text = report.report([failure("nicefast", "failed: oh")], tmp_path).read_text()
    assert not list(tmp_path.glob("*.png"))
    assert "png" not in text
    assert "| tabular | log_prob | float32 | failed: oh |" in text


@pytest.mark.parametrize(
    "field", ["low", "samples", "error", "operations", "ceilings", "share", "peak_bytes", "run"]
)
@pytest.mark.parametrize("absent", [True, False])
def test_missing_numbers_are_dashes(tmp_path, field, absent):
    record = measurement(to_best_other=1.5, best_other="plain") | {field: None}
    if absent:
        del record[field]
    text = report.report([record, measurement("plain")], tmp_path).read_text()
    assert "| **nicefast** | 10 |" in text
    assert "None" not in text


def test_a_record_of_the_required_fields_alone_is_reported(tmp_path):
    found = [{"device": "d", "case": "c", "provider": p, "status": "timed"} for p in "ab"]
    found += [found[0] | {"median": float("nan"), "provider": "n"}]
    found += [found[0] | {"median": 1e-3, "provider": "m|m"}]
    text = report.report(found, tmp_path).read_text()
    assert "- a: no time stored" in text
    assert "- n: no time stored" in text
    assert r"| m\|m | 1 |" in text


def test_whoever_was_measured_earlier_is_told(tmp_path):
    late = measurement()
    late["run"] = late["run"] | {"date": "2026-02-02T00:00:00Z"}
    text = report.report([late, measurement("plain")], tmp_path).read_text()
    assert "- measured in an earlier run than the others: plain" in text
    assert "no other timed in this run" in text


def test_one_report_for_each_device_in_its_folder(tmp_path, capsys):
    for device in ("One GPU", "Two, CPU"):
        path = tmp_path / records.slug(device) / "a.jsonl"
        store(path, group({"nicefast": 1, "plain": 2}, device=device))
    assert report.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / d / "report.md") for d in ("one-gpu", "two-cpu")]
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "two-cpu" / "report.md").exists()
    one = tmp_path / "one-gpu" / "a.jsonl"
    assert report.main([str(one), "--out", str(tmp_path / "alone")]) == 0
    assert (tmp_path / "alone" / "report.md").read_text().startswith("# Benchmark: One GPU")
    with pytest.raises(ValueError, match="of one device, got 2: One GPU; Two, CPU"):
        report.report(records.read([tmp_path / "one-gpu", tmp_path / "two-cpu"]), tmp_path)


def test_files_of_another_folder_are_reported_in_the_devices_own(tmp_path):
    path = store(tmp_path / "a.jsonl", [measurement()], tail='{"cut')
    with pytest.warns(UserWarning, match="skipped 1 broken"):
        assert report.main([str(path)]) == 0
    assert (tmp_path / records.slug(DEVICE) / "report.md").exists()


def test_nothing_to_report_is_said_in_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_readme_s_table_is_made_of_the_committed_measurements():
    root = Path(__file__).parents[2]
    found = sorted((root / "bench" / "results").glob("*/default.jsonl"))
    assert found
    readme = set((root / "README.md").read_text().splitlines())
    tables = (
        report.headline, report.without_compile, report.across, report.small_batches
    )  # fmt: skip
    complete = []
    for path in found:
        measured = records.read([path])
        head, *more = (list(m(measured)) for m in tables)
        assert len(head) > 2
        assert set(head) <= readme
        complete.append(all(set(table) <= readme for table in more))
    assert any(complete)  # of one machine, what else its report begins with, too


def test_bfloat16_beside_the_others_in_float32():
    found = group({"nicefast": 1.0, "plain": 3.0, "FrEIA": 2.0}, precision="float32")
    found += group({"nicefast": 0.5, "plain": 0.7}, precision="bf16")
    found += group({"nicefast": 0.1, "plain": 0.2}, precision="bf16", direction="sample")
    found += [failure("zuko", "failed: off", precision="float32")]
    found += group({"nicefast": 0.1, "plain": 9.0}, rows=64, precision="float32")  # other rows
    header, _, *rows = report.across(found)
    assert "log_prob" in header
    assert "sample" not in header  # others were not measured at it in float32
    assert rows == ["| D=64, hidden 256 x 3, 4 couplings, 16,384 rows | 4.00 (FrEIA) |"]
    assert list(report.across(found[:3])) == []


def test_beside_those_that_need_no_compiler():
    found = group({"nicefast": 1.0, "plain": 3.0, "FrEIA": 2.0, "compile": 1.5})
    found += group({"nicefast": 1.0, "plain": 3.0}, direction="inverse")
    header, _, *rows = report.without_compile(found)
    assert header == "|  | log_prob, float32, without torch.compile |"  # inverse: as it was
    assert rows == ["| D=64, hidden 256 x 3, 4 couplings, 16,384 rows | 2.00 (FrEIA) |"]
    assert list(report.without_compile(found[:3])) == []


def test_small_batches_by_a_call_and_frozen():
    title = "D=64, hidden 128 x 2, 8 couplings, 128 rows"
    found = group({"plain": 2.0, "FrEIA": 1.5, "nicefast": 1.0}, case="small-batch", title=title)
    frozen = {"to_best_other": 3.0, "best_other": "FrEIA"}
    found.append(measurement(FROZEN, 0.5, case="small-batch", title=title, **frozen))
    found += group({"nicefast": 1.0, "plain": 3.0})  # too many rows for a frozen flow
    header, _, *rows = report.small_batches(found)
    assert header == "|  | log_prob, float32: call / frozen |"
    assert rows == [f"| {title} | 1.50 / 3.00 |"]
    assert list(report.small_batches(found[:3])) == []


def test_a_frozen_flow_is_none_of_the_others():
    found = group({"nicefast": 1.0, "plain": 3.0})
    found.append(measurement(FROZEN, 0.001))
    found += [r | {"precision": "bf16"} for r in found if r["provider"] == "nicefast"]
    *_, row = report.across(found)
    assert row.endswith("| 3.00 (plain) |")
