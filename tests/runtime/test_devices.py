"""What is known of the processor."""

import pathlib

import pytest
import torch

from nicefast.runtime import devices


def test_amd_s_processors_are_known():
    path = pathlib.Path("/proc/cpuinfo")
    if not path.exists() or not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("neither the system nor PyTorch says which processor this is")
    assert devices.is_amd() == ("AuthenticAMD" in path.read_text())
