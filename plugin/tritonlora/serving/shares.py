# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Divides the requests for an alias between adapters, by shares in percent.

The division depends on the key and the shares alone. So a user stays with one adapter in every topology, on every
replica and after a restart. Each adapter draws a number from the hash of its name and the key, and the smallest number
in relation to the share wins. When the shares of two adapters change, only the keys between the old and the new share
move. With more adapters, no other method without a memory moves fewer keys in every case (Moulton and Jiang, Maximally
Consistent Sampling and the Jaccard Index of Probability Distributions, 2018).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from typing import TypeAlias

WHOLE = 100
Shares: TypeAlias = "Mapping[str, int]"  # lora_name of an adapter -> percent of the requests, WHOLE in all


def choose(shares: Shares, split_key: bytes | None) -> str:
    """The lora_name of the adapter that responds. Equal keys get the same adapter; None gets one at random."""
    if len(shares) == 1:
        return next(iter(shares))
    key = os.urandom(16) if split_key is None else split_key
    return min(shares, key=lambda name: (_exponential(name, key) / shares[name], name))


def _exponential(name: str, key: bytes) -> float:
    """A number above 0 from an exponential distribution, which depends on `name` and `key` alone."""
    digest = hashlib.sha256(name.encode() + b"\0" + key).digest()
    return -math.log((int.from_bytes(digest[:6], "big") + 0.5) / 2**48)


def problems_of(shares: Mapping[str, object]) -> list[tuple[str, object]]:
    """(what must be, what was given) for each problem of shares that come from outside."""
    problems = [
        (f"the share of {name[:200]!r} must be a whole number from 1 to {WHOLE}", value)
        for name, value in shares.items()
        if type(value) is not int or not 1 <= value <= WHOLE
    ]
    total = sum(value for value in shares.values() if type(value) is int)
    return problems or ([(f"the shares must add up to {WHOLE}", total)] if total != WHOLE else [])
