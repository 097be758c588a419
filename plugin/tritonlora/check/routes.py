# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of the ways that lead to the engine's model: the ensembles, the router and the resolver."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence

from tritonlora.check.findings import Finding, Subject, error, warning
from tritonlora.pbtxt.model_config import ModelConfig, Step
from tritonlora.repository import init
from tritonlora.repository.paths import LISTING, RESOLVER, ROUTER
from tritonlora.repository.undo import OURS
from tritonlora.serving.response_cache import CACHED
from tritonlora.serving.wire import STATE
from tritonlora.targets import target_of

LETS_GO = "26.02"  # the first release whose ensembles end a stream that its client has left
LETS_GO_VERSION = (2, 66)  # of the server in that release


def steps(subject: Subject) -> Iterator[Finding]:
    """An error for each step of an ensemble whose model is missing. By default Triton then loads no model at all."""
    root = subject.repository.root
    for name, config in subject.configs.items():
        for step in config.steps:
            if not (root / step.model_name).is_dir():
                yield error(
                    f"{name}/config.pbtxt",
                    f"it has a step for {step.model_name!r}, and there is no such model",
                    f"put the model into the repository, or move {name} out of it",
                )


def batch_sizes(subject: Subject) -> Iterator[Finding]:
    """An error for each ensemble that takes larger batches than one of its steps. Triton does not load it.

    A step without batches, max_batch_size 0, is no limit (core, src/ensemble_scheduler/ensemble_utils.cc).
    """
    # `steps` reports models that are missing, and `placeholders` numbers that are not filled in.
    sizes = {name: config.max_batch_size for name, config in subject.configs.items()}
    taken = {name: size for name, size in sizes.items() if isinstance(size, int) and size > 0}
    for name in taken:
        steps = [
            (taken[step.model_name], step.model_name)
            for step in subject.configs[name].steps
            if step.model_name in taken
        ]
        most, smallest = min(steps, default=(taken[name], name))
        if most < taken[name]:
            remedy = f"set max_batch_size to {most} in {name}/config.pbtxt"
            if smallest in OURS and taken.get(subject.repository.target, 0) >= taken[name]:
                remedy = f"tritonlora init {shlex.quote(str(subject.repository.root))}"
            yield error(
                f"{name}/config.pbtxt",
                f"max_batch_size is {taken[name]}, and its step {smallest} takes {most}: the ensemble does not load",
                remedy,
            )


def router(subject: Subject) -> Iterator[Finding]:
    """The router declares what the engine's model declares, and no ensemble goes past the router."""
    root, target = subject.repository.root, subject.repository.target
    remedy = f"tritonlora init {shlex.quote(str(root))}"
    own = subject.configs[ROUTER]
    declared = {spec.name: spec for spec in (*own.inputs, *own.outputs)}
    for spec in (*subject.config.inputs, *subject.config.outputs):
        here = declared.get(spec.name)
        if spec.name in subject.kind.WIRE.router_only:
            continue
        if here is None or (here.data_type, here.dims) != (spec.data_type, spec.dims):
            yield error(f"{ROUTER}/config.pbtxt", f"{spec.name} is not declared as {target} declares it", remedy)
    if own.decoupled != subject.config.decoupled:
        yield error(f"{ROUTER}/config.pbtxt", f"its transaction policy is not that of {target}", remedy)
    for name, config in subject.configs.items():
        if config.leads_to(target) and not config.leads_to(ROUTER) and not config.leads_to(RESOLVER):
            yield error(f"{name}/config.pbtxt", f"it leads to {target} past the router: names have no effect", remedy)


def resolver(subject: Subject) -> Iterator[Finding]:
    """The resolver declares its tensors as the engine's model does, and the engine's step requires its outputs.

    Triton does not load an ensemble whose tensors differ between steps. An empty response of the resolver must make the
    engine's step fail, so that step takes a required input from the resolver.
    """
    root, target = subject.repository.root, subject.repository.target
    required = target_of(subject.config).WIRE.required
    for name, config in subject.configs.items():
        given = {tensor for step in config.steps if step.model_name == RESOLVER for tensor in step.output_map.values()}
        past = [step for step in config.steps if step.model_name == target]
        if given and any(step.input_map.get(required) not in given for step in past):
            yield warning(
                f"{name}/config.pbtxt",
                f"{required} goes past {RESOLVER}: {target} would take an empty response for a base model request",
                f"tritonlora init {shlex.quote(str(root))}",
            )
    for spec in subject.configs[RESOLVER].outputs if RESOLVER in subject.configs else ():
        if spec.name == STATE:
            continue
        declared = subject.config.input(spec.name)
        if declared is None or declared.data_type != spec.data_type:
            yield error(
                f"{RESOLVER}/config.pbtxt",
                f"{spec.name} is not declared as {target} declares it",
                f"tritonlora init {shlex.quote(str(root))}",
            )


def models_past_the_router(subject: Subject) -> Iterator[Finding]:
    """A warning for each model that calls the engine's model itself.

    Triton's generate endpoint silently drops a lora_name if the model does not declare it as an input.
    """
    target = subject.repository.target
    for name in init.models_past_the_router(subject.configs, target):
        yield warning(
            f"{name}/config.pbtxt",
            f"it calls {target} itself: a lora_name in a request to it has no effect",
            "send requests for adapters to the ensemble",
        )


def left_streams(subject: Subject) -> Iterator[Finding]:
    """Triton ends a stream when its client has left: see `batched_streams`."""
    yield from batched_streams(subject.configs, subject.repository.target)


def batched_streams(configs: Mapping[str, ModelConfig], target: str) -> Iterator[Finding]:
    """A warning for each model that has dynamic_batching and gets the responses of a stream.

    Triton's batcher refuses the steps of a client that has left, which is an error in the ensemble. Before 26.02 an
    ensemble with an error no longer counts the steps that end (triton-inference-server/core, pull request 466). The
    engine's step has not ended by then, so the ensemble never ends.
    """
    for name, ensemble in after_streams(configs, target).items():
        if configs[name].dynamic_batching:
            yield warning(
                f"{name}/config.pbtxt",
                f"it has dynamic_batching: before {LETS_GO}, Triton never lets go of a stream of {ensemble} that its "
                "client has left, nor of its memory, and takes all its time to stop",
                f"take dynamic_batching out of it, unless your Triton is {LETS_GO} or later",
            )


def torn_streams(subject: Subject) -> Iterator[Finding]:
    """An error for each model with several instances that gets a stream: its responses would come out of order."""
    for name, ensemble in after_streams(subject.configs, subject.repository.target).items():
        count = subject.configs[name].instance_count
        if isinstance(count, int) and count > 1:  # `placeholders` reports a count that is not filled in
            yield error(
                f"{name}/config.pbtxt",
                f"it has {count} instances, which run at the same time: the pieces of a stream of {ensemble} come out "
                "of order",
                f"set count to 1 in the instance_group of {name}/config.pbtxt",
            )


def forwarded_streams(subject: Subject) -> Iterator[Finding]:
    """A warning where the router has fewer instances than the engine takes requests. A stream occupies an instance."""
    most = subject.config.max_batch_size
    count = subject.configs[ROUTER].instance_count if ROUTER in subject.configs else 0
    forwarding = [name for name, config in subject.configs.items() if config.leads_to(ROUTER)]
    if forwarding and isinstance(count, int) and isinstance(most, int) and 0 < count < most:
        instead = (
            ", or lead past the router: tritonlora init --topology resolve" if subject.kind.WIRE.sends_weights else ""
        )
        yield warning(
            f"{ROUTER}/config.pbtxt",
            f"it has {count} instances, which forward one request each at a time, and the engine takes {most}: further "
            f"requests of {', '.join(forwarding)} wait",
            f"set a larger count in its instance_group{instead}",
        )


def after_streams(configs: Mapping[str, ModelConfig], target: str) -> dict[str, str]:
    """Each model that gets a stream's responses one by one -> the ensemble that sends them to it.

    Empty if the engine's model, `target`, is not decoupled, since it then does not stream.
    """
    if not configs[target].decoupled:
        return {}
    streaming, found = {target, ROUTER}, dict[str, str]()
    for _ in configs:  # an ensemble may be a step of another one
        streaming |= {name for name, config in configs.items() if _streamed(config.steps, streaming)}
    for ensemble, config in configs.items():
        tensors = _streamed(config.steps, streaming)
        for step in config.steps:
            if step.model_name in configs and not tensors.isdisjoint(step.input_map.values()):
                found.setdefault(step.model_name, ensemble)
    return found


def _streamed(steps: Sequence[Step], streaming: Collection[str]) -> set[str]:
    """The tensors of an ensemble that come once per response: outputs of `streaming` models and of later steps."""
    tensors = set[str]()
    for _ in steps:  # the config may list the steps in any order
        for step in steps:
            if step.model_name in streaming or not tensors.isdisjoint(step.input_map.values()):
                tensors.update(step.output_map.values())
    return tensors


def response_caches(subject: Subject) -> Iterator[Finding]:
    """Triton's response cache is off for every model that adapters depend on: see `cached_responses`."""
    yield from cached_responses(subject.configs, subject.repository.target)


def cached_responses(configs: Mapping[str, ModelConfig], target: str) -> Iterator[Finding]:
    """An error for each response_cache that is on in the engine's model, tritonlora's, or models that lead to them."""
    concerned = {ROUTER, RESOLVER, LISTING, target, *init.models_past_the_router(configs, target)}
    for _ in configs:  # an ensemble may be a step of another one
        concerned |= {name for name, config in configs.items() if any(map(config.leads_to, concerned))}
    for name, config in configs.items():
        if name in concerned and config.response_cache is True:
            yield error(f"{name}/config.pbtxt", f"response_cache is on: {CACHED}", "take response_cache out of it")
