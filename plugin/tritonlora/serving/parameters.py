# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The parameters of a request: none of them names an adapter, as parameters do for other servers.

Triton's generate extension makes a parameter of each JSON member that is no input, a misspelt lora_name for one. Other
servers take parameters. The base model must not answer for these, and no client may choose what only the router sends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from .adapter_table import AdapterTable
from .errors import InvalidRequest

# By these names other servers are told of an adapter: lora_name (Triton's vLLM backend), lora_request (the servers of
# TensorRT-LLM and vLLM), adapter_id and merged_adapters (TGI, LoRAX), lora_path (SGLang), lora (llama.cpp). One of the
# name's words begins with "lora" or "adapter".
_NAMES_AN_ADAPTER = re.compile(r"(?i:(?:^|[^a-z])(?:lora|adapter))|(?<=[a-z])(?:Lo[Rr][Aa]|LORA|Adapter)")
# OpenAI's `model` may be the base model's name, which nobody knows here. In lower case.
_MAY_NAME_AN_ADAPTER = frozenset({"model", "model_name"})
_QUOTED = re.compile(r"""["']([\w-]+)["']""")
MOST_JSON_CHARACTERS = 1 << 18  # in the parameters of a request


class ParametersOfRequest(Protocol):
    """A request of Triton's Python backend. Each of these raises UnicodeDecodeError for what is no UTF-8."""

    def request_id(self) -> str: ...
    def correlation_id(self) -> int | str: ...
    def parameters(self) -> str: ...


class HasId(Protocol):
    """The part of it that has an id."""

    def request_id(self) -> str: ...


def id_of(request: HasId) -> str:
    """A request's id, which its client has chosen. InvalidRequest when it is not UTF-8."""
    try:
        return request.request_id()
    except UnicodeDecodeError:
        raise InvalidRequest("the request's id is not UTF-8") from None


def parameters_of(request: ParametersOfRequest) -> dict[str, Any]:
    """A request's parameters. InvalidRequest when these, or its ids, are not UTF-8: nothing can be passed on then."""
    id_of(request)
    try:
        request.correlation_id()
    except UnicodeDecodeError:
        raise InvalidRequest("the request's correlation id is not UTF-8") from None
    try:
        text = request.parameters()
        parameters: dict[str, Any] = {} if text in {"", "{}"} else json.loads(text)
    except ValueError:
        raise InvalidRequest("the request's parameters are not UTF-8, or cannot be read") from None
    return parameters


def check_parameters(table: AdapterTable, parameters: Mapping[str, object]) -> None:
    """InvalidRequest when a parameter of a request names an adapter.

    A parameter does by its own name, in capitals or not; as `model` with an adapter's name; or because it is JSON that
    holds such a parameter, as the sampling_parameters of Triton's vLLM backend may.
    """
    found = _Parameters(table)
    if names := sorted(name for name, value in parameters.items() if found.names_an_adapter(name, value)):
        raise InvalidRequest(f"{', '.join(names)}: not taken as a parameter; name the adapter with the input lora_name")


class _Parameters:
    """Looks through the parameters of one request, of which a bounded number of characters is read as JSON."""

    def __init__(self, table: AdapterTable) -> None:
        self._known = (table.entries, table.aliases, table.unavailable)
        self._unread = MOST_JSON_CHARACTERS

    def names_an_adapter(self, name: str, value: object) -> bool:
        """Whether the parameter, or a member of it, names an adapter. Elements of a list have the list's name."""
        left = [(name, value)]
        while left:
            key, value = left.pop()
            if value is not None and _NAMES_AN_ADAPTER.search(key):
                return True
            if isinstance(value, str):
                if key.casefold() in _MAY_NAME_AN_ADAPTER and any(value in known for known in self._known):
                    return True
                if value.lstrip().startswith(("{", "[")):
                    value = self._read(name, value)
            if isinstance(value, dict):
                left += value.items()
            elif isinstance(value, list):
                left += [(key, element) for element in value]
        return False

    def _read(self, name: str, text: str) -> object:
        """What a text that begins like JSON says. Where it is not JSON, every word in quotes may be a name in it."""
        self._unread -= len(text)
        if self._unread < 0:
            most = f"{MOST_JSON_CHARACTERS} characters of JSON are read in the parameters of a request"
            raise InvalidRequest(f"{name}: at most {most}; send less")
        try:
            return json.loads(text, parse_int=str, parse_float=str)  # to make numbers of them takes far longer
        except (ValueError, RecursionError):
            return dict.fromkeys(_QUOTED.findall(text), True)
