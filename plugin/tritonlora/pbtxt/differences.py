# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Tell how two versions of a model's config.pbtxt differ, old and new, as text for the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tritonlora.pbtxt.model_config import ModelConfig, TensorSpec


def differences(before: ModelConfig, after: ModelConfig) -> Iterator[str]:
    """One line for each setting that differs, "what: old -> new", in the order of the file."""
    yield from _changed("backend", {"": before.backend}, {"": after.backend})
    yield from _changed("instances", {"": str(before.instance_count)}, {"": str(after.instance_count)})
    yield from _changed("decoupled", {"": str(before.decoupled)}, {"": str(after.decoupled)})
    yield from _changed("input", _specs(before.inputs), _specs(after.inputs))
    yield from _changed("output", _specs(before.outputs), _specs(after.outputs))
    yield from _changed("parameter", before.parameters, after.parameters)
    yield from _changed("steps", {"": _steps(before)}, {"": _steps(after)})


def _changed(kind: str, before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    for name in {**before, **after}:
        old, new = before.get(name, "none"), after.get(name, "none")
        if old != new:
            yield f"{kind} {name}: {old} -> {new}".replace(" :", ":")


def _specs(specs: tuple[TensorSpec, ...]) -> dict[str, str]:
    return {one.name: f"{one.data_type} {list(one.dims) if isinstance(one.dims, tuple) else one.dims}" for one in specs}


def _steps(config: ModelConfig) -> str:
    return ", ".join(step.model_name for step in config.steps)
