# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Note which of an adapter's values cannot be converted, and which change nothing, while its rows are filled."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tritonlora.conversion.coverage import zero_remarks
from tritonlora.errors import AdapterError, InvalidAdapter, UnsupportedAdapter, merge_layers, one_message
from tritonlora.peft.adapter import Adapter


class ValueNotes:
    """The notes on the values of one adapter, which are converted to `dtype`."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._nonfinite: set[str] = set()
        self._too_large: set[str] = set()
        self._vanished: set[str] = set()
        self._zero: set[str] = set()  # paths of modules with a row in which A or B is zero
        self._nonzero: set[str] = set()

    def look_for_zero(self, path: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Note whether A or B of a row is zero. Both are flat."""
        (self._zero if _is_zero(a) or _is_zero(b) else self._nonzero).add(path)

    def look_for_nonfinite(self, what: str, path: str, converted: torch.Tensor, original: torch.Tensor) -> None:
        """Note a tensor that is not finite: in the adapter already, or only in `converted`."""
        was, stays = original.isfinite(), converted.isfinite()
        if not was.all():
            self._nonfinite.add(f"{what} of {path!r}")
        if (was & ~stays).any():
            self._too_large.add(f"{what} of {path!r}")

    def look_for_vanished(
        self, what: str, path: str, converted: torch.Tensor, original: Callable[[], torch.Tensor]
    ) -> None:
        """Note a tensor if all its values became zero in `converted`, and `original` has a value that is not."""
        # The sum is fast, so it comes first.
        if not converted.sum() and not converted.any() and original().any():
            self._vanished.add(f"{what} of {path!r}")

    def raise_unfit(self, adapter: Adapter, *, allow_nonfinite: bool) -> None:
        """Raise one error that names every tensor so far that is not finite, is too large, or becomes zero.

        With `allow_nonfinite`, a tensor that was not finite in the adapter is no reason.
        """
        nonfinite = frozenset() if allow_nonfinite else self._nonfinite
        problems = [f"{tensor} has NaN or infinite values (--allow-nonfinite converts them)" for tensor in nonfinite]
        problems += [
            f"{tensor} has values too large for {self._dtype}; convert to bfloat16" for tensor in self._too_large
        ]
        problems += [f"{tensor} vanishes in {self._dtype}; convert to bfloat16" for tensor in self._vanished]
        if problems:
            kind: type[AdapterError] = InvalidAdapter if nonfinite else UnsupportedAdapter
            heading = f"cannot convert the weights in {str(adapter.directory)!r}"
            raise kind(one_message(heading, merge_layers(sorted(problems))))

    def remarks(self, adapter: Adapter) -> tuple[str, ...]:
        """Remarks on modules whose LoRA is zero in all rows so far."""
        zero = [adapter.modules[path] for path in self._zero - self._nonzero]
        return zero_remarks(
            {(module.name, module.layer) for module in zero},
            others=bool(self._nonzero),
            dora=any(module.magnitude is not None for module in zero),
        )


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # NaN and infinities survive a sum, and a sum is far cheaper than a look at each value. The sum of finite values may
    # overflow, so each value decides in that case.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _is_zero(tensor: torch.Tensor) -> bool:
    return not tensor[0] and not tensor.any()  # the first element nearly always decides
