# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which sources may be used, and whether the network may be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules for one command. Directories and archives on this machine are always allowed."""

    offline: bool = False  # use only what earlier downloads left on this machine
    allowed: tuple[str, ...] | None = None  # beginnings of allowed sources; None: all


def policy(*, offline: bool = False, allowed: Sequence[str] = ()) -> Policy:
    """The rules from a command's options and from the environment."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        offline = True
    return Policy(offline, tuple(allowed) or None)
