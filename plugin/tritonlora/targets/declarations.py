# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Declare the LoRA tensors of a model with the types and dims of the adapters. Edits are lossless."""

from __future__ import annotations

from collections.abc import Collection

from tritonlora.errors import ConfigError
from tritonlora.pbtxt.edits import insert_field, replace_value
from tritonlora.pbtxt.text_format import Document, Message
from tritonlora.serving.dtypes import DTYPES


def declare_lora_weights(document: Document, dtype: str, columns: Collection[int] = (3,)) -> Document:
    """The target's config.pbtxt with `lora_weights` declared as `dtype` ("bfloat16", "float16" or "float32").

    The last dim of lora_config becomes the number of `columns` of the adapters (4 with DoRA), or -1 (any number) if the
    adapters differ. A document that has these declarations already is returned as it is. Raises ConfigError when the
    model has no LoRA inputs.
    """
    document = _set_data_type(document, _declared(document, "input", "lora_weights"), DTYPES[dtype].triton)
    size, *others = {*columns}
    return _set_last_dim(document, _declared(document, "input", "lora_config"), -1 if others else size)


def declare_output(document: Document, name: str, data_type: str) -> Document:
    """A config.pbtxt with the output `name` declared as `data_type`, TYPE_…; ConfigError without such an output."""
    return _set_data_type(document, _declared(document, "output", name), data_type)


def _declared(document: Document, kind: str, name: str) -> Message:
    tensor = document.message.find(kind, "name", name)
    if tensor is None:
        raise ConfigError(f"the model declares no {kind} {name!r}, so it takes no adapters as tensors")
    return tensor


def _set_data_type(document: Document, tensor: Message, data_type: str) -> Document:
    current = tensor.scalar("data_type")
    if current is None:
        return insert_field(document, tensor, f"data_type: {data_type}")
    return document if current.value == data_type else replace_value(document, current, data_type)


def _set_last_dim(document: Document, tensor: Message, size: int) -> Document:
    dim = tensor.scalar("dims")
    if dim is None or dim.value in ("-1", str(size)):
        return document
    return replace_value(document, dim, str(size))
