# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The chat templates that adapters bring, kept in the repository beside the adapters' other files.

A directory of PEFT has one if the adapter was saved with its tokenizer: chat_template.jinja, or the member of that name
in tokenizer_config.json. The OpenAI API renders an adapter's conversations with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tritonlora.errors import InvalidAdapter
from tritonlora.files import delete, write_text
from tritonlora.repository.paths import Repository
from tritonlora.serving.file_version import has_content, read_file

_MOST_NBYTES = 4 << 20


def path_of(repository: Repository, lora_task_id: int) -> Path:
    """The file of an adapter's chat template, which is there only if the adapter has one."""
    return repository.warmup_directory / f"chat_template_{lora_task_id}.jinja"


def keep(repository: Repository, lora_task_id: int, adapter_directory: Path) -> None:
    """Keep the chat template of the adapter in `adapter_directory`, in the place of the one that it had before."""
    path, template = path_of(repository, lora_task_id), template_in(adapter_directory)
    if template is None:
        delete(path)
    elif not has_content(path, template.encode()):
        write_text(path, template)


def template_in(directory: Path) -> str | None:
    """The chat template in an adapter's directory; None without one. InvalidAdapter when it cannot be read."""
    try:
        own, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
        if own.is_file():
            return read_file(own, _MOST_NBYTES).decode()
        document = json.loads(read_file(config, _MOST_NBYTES)) if config.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidAdapter(f"the chat template in {str(directory)!r} cannot be read: {error}") from None
    found: Any = document.get("chat_template") if isinstance(document, dict) else None
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
