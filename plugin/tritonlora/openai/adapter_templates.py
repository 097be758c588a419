# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The chat templates that adapters bring, by the names that clients send, live with adapters.json."""

from __future__ import annotations

import logging
from pathlib import Path

from tritonlora.openai.api_error import invalid, unavailable
from tritonlora.repository import chat_templates
from tritonlora.repository.paths import open_repository
from tritonlora.serving.file_version import read_file
from tritonlora.serving.table_file import TableFile

log = logging.getLogger("tritonlora.openai")


class AdapterTemplates:
    """The chat templates of the adapters of one repository on this machine."""

    def __init__(self, root: Path) -> None:
        """Read adapters.json. Raises RepositoryError or AdapterTableError when `root` has no valid table."""
        self._repository = open_repository(root)
        self._table = TableFile(self._repository.table_path, log.warning)

    def template_of(self, name: str) -> str | None:
        """The template of an adapter, or of the adapters that an alias leads to; None if they have none of their own.

        ApiError when it cannot be read, or when an alias leads to adapters with different templates: the resolver
        chooses among these adapters only when it has the prompt.
        """
        table = self._table.table()
        adapters = [one for one in table.aliases.get(name, (name,)) if one in table.entries]
        found = {self._template(one, table.entries[one].lora_task_id) for one in adapters}
        if len(found) > 1:
            raise invalid(f"the adapters of {name!r} have different chat templates; name one of {adapters}", "model")
        return next(iter(found), None)

    def _template(self, name: str, lora_task_id: int) -> str | None:
        try:
            return read_file(chat_templates.path_of(self._repository, lora_task_id)).decode()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            log.warning("the chat template of %s cannot be read: %s", name, error)
            raise unavailable(f"the chat template of {name!r} cannot be read on the server") from None
