"""Pictures of finished runs from the command line."""

import pytest

for package in ("typer", "rich", "matplotlib", "safetensors", "sklearn"):
    pytest.importorskip(package, reason=f"needs {package}")

from typer.testing import CliRunner

from nicefast import cli

QUICK = ("--epochs", "2", "--hidden", "8", "--couplings", "2", "--noise-draws", "2")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("digits", "moons"):
        result = run("fit", name, "--out", folder / name, *QUICK)
        assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(
    ("name", "arguments", "picture"),
    [
        ("digits", ["sample"], "sample.png"),
        ("digits", ["sample", "--count", "9", "--temperature", "0.5"], "sample.png"),
        ("digits", ["sample", "--neighbours", "--count", "20"], "neighbours.png"),
        ("digits", ["inpaint", "--steps", "20"], "inpainting-adam.png"),
        ("digits", ["inpaint", "--steps", "20", "--method", "paper"], "inpainting-paper.png"),
        ("digits", ["spectrum"], "spectrum.png"),
        ("digits", ["interpolate", "--pairs", "3", "--length", "5"], "interpolation.png"),
        ("moons", ["density"], "density.png"),
        ("moons", ["spectrum"], "spectrum.png"),
    ],
)
def test_a_picture(runs, name, arguments, picture, tmp_path):
    command, *options = arguments
    result = run(command, runs / name, *options)
    assert result.exit_code == 0, result.output
    assert (runs / name / picture).read_bytes().startswith(b"\x89PNG")
    assert picture in result.output
    elsewhere = tmp_path / "picture.png"
    assert run(command, runs / name, *options, "--out", elsewhere).exit_code == 0
    assert elsewhere.stat().st_size > 1000


def test_inpainting_says_what_was_gained(runs):
    result = run("inpaint", runs / "digits", "--steps", "50", "--seed", "3")
    lines = [line.split() for line in result.output.splitlines() if line.startswith("  ")]
    assert [line[0] for line in lines][:2] == ["top", "bottom"]
    assert len(lines) == 10
    assert all(float(after) > float(before) for _, before, after in lines)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("none", ["sample"], "is no run folder"),
        ("moons", ["inpaint"], "are no images"),
        ("moons", ["interpolate"], "are no images"),
        ("moons", ["sample"], "images must"),
        ("digits", ["density"], "has 64 features, density needs 2"),
        ("digits", ["inpaint", "--method", "guess"], "method must be"),
        ("digits", ["sample", "--device", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(runs, name, arguments, says, tmp_path):
    command, *options = arguments
    result = run(command, runs / name, *options, "--out", tmp_path / "picture.png")
    assert result.exit_code in (1, 2), result.output
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
