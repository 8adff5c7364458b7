"""What bench/gpu_check.sh does: the parts of the check on a GPU, in their time, into one archive.

Every part is a few steps, each a command of its own whose output goes to a text. $OUT gets two
files: gpu_check.tar.gz, which has everything, and summary.txt, which says what passed, failed and
was measured. Both are written anew, at once, after each step and every few seconds within one, so
that they are there whenever this is killed. docs/gpu.md is for whoever runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import timing

SECONDS = {"kernels": 300, "sanitize": 240, "tests": 300, "bench": 420}  # of each part by itself
TOGETHER = 540  # of all parts: a command of ten minutes ends before it is killed
GRACE = 15  # seconds in which what is cut off writes what it has
REFRESH = 10  # seconds between two archives within a step
PROVIDERS = "plain,nicefast,nicefast (frozen),nflows,normflows,FrEIA,zuko"
REFUSED = "dropped: "


@dataclass(frozen=True)
class Step:
    """A command and the share of its part's remaining time that it may take.

    Several ``commands`` run at once. ``tool`` is a program that a machine may lack or refuse:
    without it, or without ``proof`` in its output, the step is dropped by one line.
    """

    name: str
    commands: Sequence[Sequence[str]]
    share: float = 1.0
    tool: str | None = None
    proof: str = ""
    may_be_cut: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__)
    parser.add_argument("part", nargs="?", choices=(*SECONDS, "all"), default="all")
    parser.add_argument("--seconds", type=int, help="in all; default: see docs/gpu.md")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, a little of each part")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_check: torch finds no GPU here", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT", "bench/results/gpu"))
    parts = list(SECONDS) if options.part == "all" else [options.part]
    seconds = options.seconds or (SECONDS[parts[0]] if len(parts) == 1 else TOGETHER)
    with tempfile.TemporaryDirectory() as folder:
        return Check(out, Path(folder), options.dry_run).run(parts, seconds)


class Check:
    """One run: what was found so far, and the archive of it."""

    def __init__(self, out: Path, work: Path, dry: bool) -> None:
        self.out, self.work, self.dry = out, work, dry
        self.found: list[str] = []
        self.failed = False

    def run(self, parts: Sequence[str], seconds: float) -> int:
        self.out.mkdir(parents=True, exist_ok=True)
        device = torch.device("cpu" if self.dry else "cuda")
        about = timing.machine(device, ("numpy", "nicefast", "triton", "pytest", "hypothesis"))
        (self.work / "machine.json").write_text(json.dumps(about, indent=1))
        self.found.append(
            f"{about['gpu'] or about['cpu']}, {about['cores']} cores, {about['date']}"
        )
        self.pack()
        whole, start, due = sum(SECONDS[part] for part in parts), time.monotonic(), 0.0
        for part in parts:
            due += SECONDS[part] / whole  # what a part leaves, the next may take
            for step in PARTS[part](self.work, self.dry):
                left = start + due * seconds - time.monotonic()
                self.step(part, step, left * step.share)
                self.pack()
        print("\n".join(self.found))
        return 1 if self.failed else 0

    def step(self, part: str, step: Step, seconds: float) -> None:
        if step.tool and not shutil.which(step.tool):
            self.found.append(f"{part}: {step.name}: {REFUSED}no {step.tool} here")
            return
        if seconds < 1:
            self.found.append(f"{part}: {step.name}: not run, no time was left")
            return
        began = time.monotonic()
        codes, cut = self.commands(step, seconds)
        texts = [p.read_text(errors="replace") for p in sorted(self.work.glob(f"{step.name}*.txt"))]
        said = "\n".join(texts)
        failures = re.findall(r"^(?:FAILED|ERROR) .*|^.*\bfailed: .*", said, re.MULTILINE)
        bad = bool(failures) or (any(codes) and not cut) or (cut and not step.may_be_cut)
        status = "failed" if bad else "cut off" if cut else "passed"
        if step.tool and step.proof not in said and not cut:
            bad, status = False, f"{REFUSED}{step.tool} refused: {last(said)}"
        self.failed |= bad
        self.found.append(f"{part}: {step.name}: {status}, {time.monotonic() - began:.0f} s")
        self.found += [f"    {line}" for line in (*measured(said), *failures[:20])]

    def commands(self, step: Step, seconds: float) -> tuple[list[int], bool]:
        """Exit codes, and whether time was up. SIGINT first: pytest then writes what it has."""
        processes, environment = [], os.environ | step.environment
        for i, command in enumerate(step.commands):
            suffix = f"-{i}" if len(step.commands) > 1 else ""
            with (self.work / f"{step.name}{suffix}.txt").open("w") as text:
                processes.append(
                    subprocess.Popen(
                        command,
                        stdout=text,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        env=environment,
                        start_new_session=True,
                    )
                )
        end, cut = time.monotonic() + seconds, False
        self.wait(processes, end)
        for signal_, grace in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
            if running := [p for p in processes if p.poll() is None]:
                cut = True
                for process in running:
                    os.killpg(process.pid, signal_)
                self.wait(processes, time.monotonic() + grace)
        return [process.wait() for process in processes], cut

    def wait(self, processes: Sequence[subprocess.Popen[bytes]], end: float) -> None:
        refresh = time.monotonic() + REFRESH
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            time.sleep(0.1)
            if time.monotonic() > refresh:
                self.pack()
                refresh = time.monotonic() + REFRESH

    def pack(self) -> None:
        """Write the archive and the summary, each whole or not at all."""
        summary = self.work / "summary.txt"
        summary.write_text("\n".join(self.found) + "\n")
        part = self.out / ".gpu_check.part"
        with tarfile.open(part, "w:gz") as archive:
            for path in sorted(self.work.rglob("*")):
                if path.is_file():
                    archive.add(path, f"gpu_check/{path.relative_to(self.work)}")
        part.replace(self.out / "gpu_check.tar.gz")
        shutil.copyfile(summary, part)
        part.replace(self.out / "summary.txt")


def last(said: str) -> str:
    """The last line of a text that has any."""
    return next((line for line in reversed(said.splitlines()) if line.strip()), "nothing")


def measured(said: str) -> Iterator[str]:
    """The lines of a step's output that belong in the summary."""
    for line in said.splitlines():
        if re.match(
            r"(ceiling|time|elementwise|tile) |.*\d+ passed|ERROR SUMMARY|.*kernels, ", line
        ):
            yield line


def kernels(work: Path, dry: bool) -> Iterator[Step]:
    jobs = str(1 if dry else max(1, (os.cpu_count() or 1) - 2))
    own = [sys.executable, "-m", "bench.gpu_kernels"]
    device = ["--device", "cpu", "--quick", "--rows", "4"] if dry else []
    yield Step("warm", [[*own, *device, "--warm", jobs]], 0.3, may_be_cut=True)
    out = str(work / "kernels.jsonl")
    yield Step("kernels", [[*own, *device, "--out", out]], environment=interpreted(dry))


def sanitize(work: Path, dry: bool) -> Iterator[Step]:
    flow = [sys.executable, "-m", "bench.gpu_kernels", "--flow", "--out", str(work / "flow.jsonl")]
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels"]
    check = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    summary, uncached = "SUMMARY", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    yield Step("memcheck", [[*check, "memcheck", *tests]], 0.5, check[0], summary, True, uncached)
    yield Step("racecheck", [[*check, "racecheck", *flow]], 0.6, check[0], summary, True)
    ncu = ["ncu", "--clock-control", "none", "--set", "full", "--launch-count", "1"]
    ncu += ["--kernel-name", "regex:flow_fwd_kernel", *flow]
    yield Step("ncu", [ncu], 1.0, "ncu", "Duration", True)


def tests(work: Path, dry: bool) -> Iterator[Step]:
    n = 2 if dry else max(1, (os.cpu_count() or 1) - 2)
    common = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu_tests", "--on-device"]
    common += ["--ignore=tests/test_compile.py", "-o", "junit_logging=system-out"]
    common += ["-p", "no:cacheprovider", "tests/kernels/test_determinism.py" if dry else "tests"]
    each = [[*common, f"--shard={i}/{n}", f"--junitxml={work}/tests-{i}.xml"] for i in range(n)]
    yield Step("tests", each, may_be_cut=True, environment=interpreted(dry))


def bench(work: Path, dry: bool) -> Iterator[Step]:
    flows = "tabular-small,tabular,MNIST,small-batch"
    own = [sys.executable, "-m", "bench"]
    own += (
        ["--device", "cpu", "--quick", "--rounds", "1", "--seconds", "0", "--direction", "log_prob"]
        if dry
        else []
    )
    device = [] if dry else ["--device", "cuda"]
    todo = [
        ("elementwise", 0.2, ["--case", "small-batch" if dry else "elementwise"]),
        ("flows", 0.7, ["--case", "small-batch" if dry else flows, "--provider", PROVIDERS]),
        ("compiled", 1.0, [
            "--case", "tabular-small,tabular,MNIST", "--direction", "log_prob,training",
            "--dtype", "float32", "--provider", "plain,nicefast,compile",
        ]),
    ]  # fmt: skip
    for name, share, options in todo[:1] if dry else todo:
        out = ["--out", str(work / "bench" / name / "default.jsonl")]
        yield Step(name, [[*own, *device, *options, *out]], share, may_be_cut=True)


def interpreted(dry: bool) -> dict[str, str]:
    return {"TRITON_INTERPRET": "1"} if dry else {}


PARTS: dict[str, Callable[[Path, bool], Iterator[Step]]] = {
    "kernels": kernels, "sanitize": sanitize, "tests": tests, "bench": bench,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
