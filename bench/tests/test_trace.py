"""What a call passes through is counted, and put back as it was."""

import doctest
import sys

import torch

import nicefast as nf
from bench import trace
from bench.__main__ import main


def test_calls_functions_files_and_moves():
    found = trace.trace(lambda: (nf.Partition.half(4), nf.get_backend(), nf.Partition.half(4)))
    assert found.files == ["partition.py", "runtime/backend.py"]
    assert found.moves == 2
    assert found.calls > len(found.functions)  # half() twice
    assert "partition.py: Partition.half" in found.functions
    assert sys.getprofile() is None


def test_the_backward_pass_is_seen_too():
    flow, x = nf.NICE(4, hidden=(8,)), torch.randn(3, 4)
    forward = trace.trace(lambda: flow.log_prob(x))
    both = trace.trace(lambda: flow.log_prob(x).mean().backward())
    assert "engine/backward.py" in both.files
    assert set(forward.functions) < set(both.functions)


def test_the_command(capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["trace"]) == 0
        table = capsys.readouterr().out.splitlines()
        assert len(table) == 2 + len(trace.calls())
        assert main(["trace", "--list", "frozen"]) == 0
        assert "engine/frozen.py: FrozenFlow.log_prob" in capsys.readouterr().out.splitlines()
        assert main(["trace", "--list", "nothing"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    finally:
        torch.set_num_threads(threads)


def test_examples_run():
    result = doctest.testmod(trace)
    assert result.attempted
    assert not result.failed
