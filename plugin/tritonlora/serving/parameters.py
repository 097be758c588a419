# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Refuses requests whose parameters name an adapter.

An adapter is named by an input, and other servers take a parameter. Triton's generate extension turns each JSON member
that is no input into a parameter, such as a misspelt lora_name. Without this check the base model would respond to such
a request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from .adapter_table import AdapterTable
from .errors import InvalidRequest

# Other servers take an adapter by these names: lora_name (Triton's vLLM backend), lora_request (the servers of
# TensorRT-LLM and vLLM), adapter_id and merged_adapters (TGI, LoRAX), lora_path (SGLang), lora (llama.cpp). So a
# parameter names an adapter if a word of its own name begins with "lora" or "adapter".
_NAMES_AN_ADAPTER = re.compile(r"(?i:(?:^|[^a-z])(?:lora|adapter))|(?<=[a-z])(?:Lo[Rr][Aa]|LORA|Adapter)")
# In lower case. OpenAI's `model` names an adapter only if its value is an adapter's name: it may be the base model's.
_MAY_NAME_AN_ADAPTER = frozenset({"model", "model_name"})
_QUOTED = re.compile(r"""["']([\w-]+)["']""")
MOST_JSON_CHARACTERS = 1 << 18  # in the parameters of a request


class ParametersOfRequest(Protocol):
    """A request of Triton's Python backend. Each method raises UnicodeDecodeError when its value is not UTF-8."""

    def request_id(self) -> str: ...
    def correlation_id(self) -> int | str: ...
    def parameters(self) -> str: ...


class HasId(Protocol):
    """A request of Triton's Python backend, of which the id alone is needed."""

    def request_id(self) -> str: ...


def id_of(request: HasId) -> str:
    """The id that the client gave the request, "" without one. InvalidRequest when it is not UTF-8."""
    try:
        return request.request_id()
    except UnicodeDecodeError:
        raise InvalidRequest("the request's id is not UTF-8") from None


def parameters_of(request: ParametersOfRequest) -> dict[str, Any]:
    """The parameters of a request. InvalidRequest when the parameters, the id or the correlation id is not UTF-8.

    A request without valid ids could not be sent on.
    """
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
    """Raise InvalidRequest when a parameter of a request names an adapter. A parameter names an adapter in three ways:

    - by its own name, in capitals or not
    - as `model` or `model_name`, with an adapter's name as its value
    - by a member of the JSON that is its value, as in the sampling_parameters of Triton's vLLM backend
    """
    found = _Parameters(table)
    if names := sorted(name for name, value in parameters.items() if found.names_an_adapter(name, value)):
        raise InvalidRequest(f"{', '.join(names)}: not taken as a parameter; name the adapter with the input lora_name")


class _Parameters:
    """Searches the parameters of one request. It reads at most MOST_JSON_CHARACTERS of them as JSON."""

    def __init__(self, table: AdapterTable) -> None:
        self._known = (table.entries, table.aliases, table.unavailable)
        self._unread = MOST_JSON_CHARACTERS

    def names_an_adapter(self, name: str, value: object) -> bool:
        """Whether the parameter, or a member of its value, names an adapter. List elements have the list's name."""
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
        """The JSON value of `text`. If it is not JSON, an object with every word in quotes as a name."""
        self._unread -= len(text)
        if self._unread < 0:
            most = f"{MOST_JSON_CHARACTERS} characters of JSON are read in the parameters of a request"
            raise InvalidRequest(f"{name}: at most {most}; send less")
        try:
            return json.loads(text, parse_int=str, parse_float=str)  # parsing the numbers would take far longer
        except (ValueError, RecursionError):
            return dict.fromkeys(_QUOTED.findall(text), True)
