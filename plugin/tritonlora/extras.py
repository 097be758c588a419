# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The extras of the package, `pip install 'tritonlora[EXTRA]'`, and the modules that each one brings.

pyproject.toml declares the extras. Without any, the package has what the commands need that only look at files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from tritonlora.errors import MissingExtra

_CONVERT = ("torch",)
_CPU = (*_CONVERT, "safetensors", "tokenizers", "transformers")
_OPENAI = (
    "fastapi",
    "grpc",
    "httptools",
    "jinja2",
    "prometheus_client",
    "pydantic",
    "tokenizers",
    "transformers",
    "tritonclient",
    "uvicorn",
)
_DEMO = (*_CPU, "gguf", "pip")
MODULES: Mapping[str, Sequence[str]] = {
    "hub": ("huggingface_hub",),
    "s3": ("s3fs",),
    "convert": _CONVERT,
    "cpu": _CPU,
    "openai": _OPENAI,
    "demo": _DEMO,
    "otel": (*_OPENAI, "opentelemetry"),
    "bench": (*_CPU, *_OPENAI, "matplotlib", "openai"),
    "train": (*_DEMO, "peft"),
}
"""Extra -> the modules that the package's own code imports from it; a smaller extra comes before those that hold it."""


def require(extra: str) -> None:
    """MissingExtra, naming what is missing, unless every module of `extra` is installed. Imports none of them."""
    missing = [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"{', '.join(missing)}: not installed; run: {install(extra)}")


def extra_of(module: str) -> str | None:
    """The smallest extra that brings a module; None where no extra does."""
    return next((extra for extra, modules in MODULES.items() if module in modules), None)


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'tritonlora[{extra}]'"
