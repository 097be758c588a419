# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Serve LoRA adapters by name with NVIDIA Triton and TensorRT-LLM.

`__all__` is what a Python user may rely on; docs/python.md has an example of each. Each name is imported when it is
first asked for (PEP 562), so that `import tritonlora` takes no time. torch is imported only for an adapter's values.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tritonlora.serving import __version__

if TYPE_CHECKING:
    from tritonlora.check.checks import check as check_repository
    from tritonlora.check.findings import Finding
    from tritonlora.conversion.convert import Converted, convert
    from tritonlora.engine.cache_plan import CachePlan
    from tritonlora.errors import TritonLoraError
    from tritonlora.launch import client
    from tritonlora.launch.serve import serve
    from tritonlora.launch.server import Server
    from tritonlora.peft.adapter import Adapter, load_adapter
    from tritonlora.repository.add import Added, Options, Refused, add, add_all
    from tritonlora.repository.compose import Composed, compose
    from tritonlora.repository.init import create_repository, init
    from tritonlora.repository.paths import Repository, open_repository, read_table
    from tritonlora.repository.registry import Aliased, Removed, alias, remove
    from tritonlora.repository.state import plan
    from tritonlora.repository.undo import FileChange
    from tritonlora.serving.adapter_table import AdapterEntry, AdapterTable

__all__ = [
    "Adapter",
    "AdapterEntry",
    "AdapterTable",
    "Added",
    "Aliased",
    "CachePlan",
    "Composed",
    "Converted",
    "FileChange",
    "Finding",
    "Options",
    "Refused",
    "Removed",
    "Repository",
    "Server",
    "TritonLoraError",
    "__version__",
    "add",
    "add_all",
    "alias",
    "check_repository",
    "client",
    "compose",
    "convert",
    "create_repository",
    "init",
    "load_adapter",
    "open_repository",
    "plan",
    "read_table",
    "remove",
    "serve",
]

# Name -> module and attribute, as above; without an attribute it is the module. `check` is a package here, so that its
# function has a longer name.
_PLACES = {
    "Adapter": "peft.adapter:Adapter",
    "AdapterEntry": "serving.adapter_table:AdapterEntry",
    "AdapterTable": "serving.adapter_table:AdapterTable",
    "Added": "repository.add:Added",
    "Aliased": "repository.registry:Aliased",
    "CachePlan": "engine.cache_plan:CachePlan",
    "Composed": "repository.compose:Composed",
    "Converted": "conversion.convert:Converted",
    "FileChange": "repository.undo:FileChange",
    "Finding": "check.findings:Finding",
    "Options": "repository.add:Options",
    "Refused": "repository.add:Refused",
    "Removed": "repository.registry:Removed",
    "Repository": "repository.paths:Repository",
    "Server": "launch.server:Server",
    "TritonLoraError": "errors:TritonLoraError",
    "add": "repository.add:add",
    "add_all": "repository.add:add_all",
    "alias": "repository.registry:alias",
    "check_repository": "check.checks:check",
    "client": "launch.client:",
    "compose": "repository.compose:compose",
    "convert": "conversion.convert:convert",
    "create_repository": "repository.init:create_repository",
    "init": "repository.init:init",
    "load_adapter": "peft.adapter:load_adapter",
    "open_repository": "repository.paths:open_repository",
    "plan": "repository.state:plan",
    "read_table": "repository.paths:read_table",
    "remove": "repository.registry:remove",
    "serve": "launch.serve:serve",
}

if not TYPE_CHECKING:  # or a type checker would believe that every name is there

    def __getattr__(name: str) -> object:
        """Import a public name when it is first asked for."""
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _PLACES[name].partition(":")
        found = importlib.import_module(f"{__name__}.{module}")
        found = globals()[name] = getattr(found, attribute) if attribute else found
        return found


def __dir__() -> list[str]:
    """The public names."""
    return __all__
