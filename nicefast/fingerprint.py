"""What the shapes of a module's parameters do not show, as a small tensor of its state_dict.

Two flows with other random partitions, priors or activations have parameters of the same names and
shapes: without this, the state_dict of one loads into the other and gives wrong densities.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

KEY = "_extra_state"  # PyTorch's own name for what a module adds to its state_dict


class Fingerprinted(nn.Module):
    """A module whose state_dict has :data:`KEY`, (8,) uint8: a digest of :meth:`described`.

    It is made when the state_dict is, and is no buffer: it takes no part in ``.to()``, and changes
    with what it describes. A state_dict without it, of an earlier version or of another library,
    loads as before.
    """

    says: str  # what is described, for an error

    def described(self) -> str:
        """What a state_dict must agree on."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """What the state_dict has under :data:`KEY`."""
        return fingerprint(self.described())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = state_dict.pop(prefix + KEY, None)
        if given is not None and not _equal(given, self.get_extra_state()):
            where = f"{prefix.removesuffix('.')}: " if prefix else ""
            kind = type(self).__name__
            error_msgs.append(f"{where}these tensors are of a {kind} with another {self.says}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def fingerprint(text: str) -> Tensor:
    """The first six bytes of the text's SHA-256 and two that check them, (8,) uint8, on the CPU.

    >>> fingerprint("a").tolist()
    [202, 151, 129, 18, 202, 27, 7, 210]
    """
    digest = hashlib.sha256(text.encode()).digest()[:6]
    return torch.tensor([*digest, *_check(digest)], dtype=torch.uint8, device="cpu")


def _check(digest: bytes) -> bytes:
    return hashlib.sha256(b"nicefast" + digest).digest()[:2]


def _equal(given: Any, own: Tensor) -> bool:
    """Whether ``given`` is this fingerprint, or none at all.

    Code that changes every tensor of a state_dict leaves something that is no fingerprint, which
    says nothing; a mean of equal ones, as averages of state_dicts are, still is one. Without
    values, as on the meta device and in FakeTensorMode, nobody can tell.
    """
    if not isinstance(given, Tensor) or given.shape != own.shape or given.is_complex():
        return True
    if any(t.is_meta or isinstance(t, FakeTensor) for t in (given, own)):
        return True
    found = given.detach().double().round().to("cpu")
    if not ((found >= 0) & (found < 256)).all():
        return True
    numbers = bytes(int(v) for v in found.tolist())
    return numbers[6:] != _check(numbers[:6]) or torch.equal(found, own.double())
