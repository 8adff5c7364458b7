"""What the shapes of a module's parameters do not show, as a small tensor of its state_dict.

Two flows with other random partitions, priors or activations have parameters of the same names and
shapes: without this, the state_dict of one loads into the other and gives wrong densities.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

KEY = "fingerprint"


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

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + KEY] = fingerprint(self.described())

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
        own = fingerprint(self.described())
        if given is not None and not _equal(given, own):
            error_msgs.append(
                f"{prefix}{KEY}: these tensors are of a {type(self).__name__} with another "
                f"{self.says}"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def fingerprint(text: str) -> Tensor:
    """The first eight bytes of the text's SHA-256, (8,) uint8, on the CPU.

    >>> fingerprint("a").tolist()
    [202, 151, 129, 18, 202, 27, 189, 202]
    """
    digest = hashlib.sha256(text.encode()).digest()[:8]
    return torch.tensor(list(digest), dtype=torch.uint8, device="cpu")


def _equal(given: Any, own: Tensor) -> bool:
    """Also where a mean of equal fingerprints was taken, as averages of state_dicts are."""
    if not isinstance(given, Tensor) or given.shape != own.shape:
        return False
    if given.is_meta:
        return True
    return torch.equal(given.detach().double().round().to("cpu"), own.double())
