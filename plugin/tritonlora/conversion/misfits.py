# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Collect the reasons why an adapter's modules do not fit the engine, and tell each reason once."""

from __future__ import annotations

from dataclasses import dataclass, field

from tritonlora.errors import layers_text


@dataclass(frozen=True, slots=True)
class Misfits:
    """The reasons why modules do not fit the engine. Modules and layers with the same reason share one line."""

    reasons: dict[str, dict[str, set[int]]] = field(default_factory=dict)  # reason -> module or layer's name -> layers

    def add(self, name: str, reason: str, layer: int) -> None:
        """Note `reason` for the module or layer `name`, in `layer`. `name` is "" if `reason` names the modules."""
        self.reasons.setdefault(reason, {}).setdefault(name, set()).add(layer)

    def lines(self) -> list[str]:
        """A line for each reason: "attn_q, attn_k: reason (layers 0 to 31)"."""
        lines = []
        for reason, names in self.reasons.items():
            by_layers: dict[str, list[str]] = {}
            for name, layers in names.items():
                by_layers.setdefault(layers_text(layers), []).append(name)
            for in_layers, same in by_layers.items():
                subject = f"{', '.join(same)}: " if any(same) else ""
                lines.append(f"{subject}{reason} ({in_layers})")
        return lines
