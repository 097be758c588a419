# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of the models' files: values that are not filled in, tritonlora's code, and files that were left behind."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from tritonlora import __version__
from tritonlora.check.findings import REPAIR, Finding, Subject, error, warning
from tritonlora.pbtxt.model_config import Unfilled, has_template
from tritonlora.repository import generated, shipped, warmup
from tritonlora.repository.paths import COPY_AGAIN, dead_links, half_written, served_version
from tritonlora.repository.undo import WITH_CODE
from tritonlora.serving.file_version import has_content

# Upstream's models do not load without these parameters. Other parameters that are still a ${…} get default values.
_OF_THE_ENGINE = ("gpt_model_path",)
_OF_THE_TEXT_MODELS = ("tokenizer_dir",)


def placeholders(subject: Subject) -> Iterator[Finding]:
    """An error for each value, in any model, that is needed and is still a placeholder, ${…}."""
    for name, config in subject.configs.items():
        values: list[object] = [config.max_batch_size, config.decoupled, config.instance_count, config.response_cache]
        for spec in (*config.inputs, *config.outputs):
            values += [spec.data_type, spec.dims, spec.optional]
        unfilled = [(value.what, value.template) for value in values if isinstance(value, Unfilled)]
        needed = _OF_THE_ENGINE if name == subject.repository.target else _OF_THE_TEXT_MODELS
        parameters = {key: config.parameters.get(key, "") for key in needed}
        unfilled += [(key, value) for key, value in parameters.items() if has_template(value)]
        for what, template in unfilled:
            yield error(
                f"{name}/config.pbtxt",
                f"{what} is still {template}",
                "fill it in with upstream's tools/fill_template.py, or edit the file",
            )


def serving_code(subject: Subject) -> Iterator[Finding]:
    """The models that tritonlora wrote have all the code of the installed version, unaltered."""
    root = subject.repository.root
    for link in dead_links(root):
        yield error(link.relative_to(root).as_posix(), "the link leads nowhere: the model does not load", COPY_AGAIN)
    remedy = f"tritonlora init {shlex.quote(str(root))}"
    for model in (model for model in WITH_CODE if (root / model).is_dir()):
        version = served_version(root, model)
        if version is None:
            yield error(
                f"{model}/1", "it has no code that a version of tritonlora wrote: the model does not load", remedy
            )
        elif version != __version__:
            problem = f"it runs the code of tritonlora {version}, and {__version__} is installed here"
            yield warning(f"{model}/1", problem, f"{remedy} puts {__version__} there; or install tritonlora {version}")
        else:
            for name, content in shipped.code_of(model).items():
                if not (root / name).exists():
                    yield error(name, "it is missing: the model does not load", remedy)
                elif not has_content(root / name, content.encode()):
                    yield warning(name, "it was edited since tritonlora wrote it", remedy)


def leftovers(subject: Subject) -> Iterator[Finding]:
    """Files that a stopped command or a replaced adapter left behind."""
    for path in half_written(subject.repository.root):
        yield warning(subject.repository.relative(path), "a command that was stopped left it half-written", REPAIR)
    outlived = {*generated.left_over(subject.state)}
    mine = subject.state.foreign_files
    for path in sorted(subject.repository.warmup_directory.glob("*")):
        task_id = warmup.task_id_of(path.name)
        if path in outlived:
            yield warning(f"warmup/{path.name}", "it belongs to an adapter that was removed or replaced", REPAIR)
        elif path.name not in mine and (task_id or 0) >= subject.table.next_lora_task_id:
            yield warning(
                f"warmup/{path.name}",
                "no adapter has it: an `add` that was stopped left it, or it is a file of your own",
                "add that adapter again, or delete the file",
            )
