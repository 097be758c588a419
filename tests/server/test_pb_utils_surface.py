# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The stubs and the fake of triton_python_backend_utils against the real module, inside a real tritonserver.

A model there describes the module and evaluates expressions; the same is done here with the stub files and the fake.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc

import fake_pb_utils
from tritonlora.launch.server import Server

STUBS = Path(__file__).parents[1] / "stubs"
PYTHON_STUB = STUBS / "triton_python_backend_utils.pyi"
COMPILED_STUB = STUBS / "c_python_backend_utils.pyi"

# name -> whether it has a default; parameters that go by position only are named by their place.
Signature = dict[str, bool]

CONFIG = """
backend: "python"
max_batch_size: 0
input [
  { name: "expression" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "bf16" data_type: TYPE_BF16 dims: [ -1 ] }
]
output [ { name: "result" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""

# `outcome` evaluates to the repr of a value, or to the type and the first line of an error; `sent` tells whether a
# tensor's memory moves when it is sent for the first time, or again, and what was in it before and is in the end, when
# it was written to in between.
FUNCTIONS = """
def outcome(expression, names):
    try:
        return repr(eval(expression, names))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"

def sent(tensor):
    def send():
        pb_utils.InferenceRequest(model_name="nope", inputs=[tensor], requested_output_names=["o"]).exec()
        return torch.from_dlpack(tensor.to_dlpack())
    before = torch.from_dlpack(tensor.to_dlpack())
    first = send()
    first[0, 1] = 3.5
    second = send()
    moved = [before.data_ptr() != first.data_ptr(), first.data_ptr() != second.data_ptr()]
    return moved, before.tolist(), second.tolist()
"""

MODEL = (
    """
import inspect, json
import numpy as np
import torch
import c_python_backend_utils
import triton_python_backend_utils as pb_utils
"""
    + FUNCTIONS
    + """
def describe(value):
    if not inspect.isclass(value):
        signature = None
        if inspect.isfunction(value):
            parameters = inspect.signature(value).parameters.values()
            signature = {p.name: p.default is not p.empty for p in parameters if p.name != "self"}
        return {"doc": value.__doc__ if callable(value) else None, "signature": signature}
    return {"members": {name: describe(getattr(value, name)) for name in dir(value) if name != "__class__"}}

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            expression, bf16 = request.inputs()
            expression = expression.as_numpy()[0].decode()
            if expression == "surface":
                modules = (pb_utils, c_python_backend_utils)
                surfaces = [{name: describe(getattr(module, name)) for name in dir(module)} for module in modules]
                result = json.dumps(surfaces)
            else:
                names = {"pb_utils": pb_utils, "np": np, "torch": torch, "request": request, "bf16": bf16,
                         "sent": sent}
                result = outcome(expression, names)
            tensor = pb_utils.Tensor("result", np.array([result.encode()], np.object_))
            responses.append(pb_utils.InferenceResponse([tensor]))
        return responses
"""
)

Ask = Callable[[str], str]


@pytest.fixture(scope="module")
def ask(launch: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """`ask(expression)`: what becomes of it in the real model."""
    repository = tmp_path_factory.mktemp("repository")
    version = repository / "surface" / "1"
    version.mkdir(parents=True)
    (repository / "surface" / "config.pbtxt").write_text(CONFIG)
    (version / "model.py").write_text(MODEL)
    client = tritonclient.grpc.InferenceServerClient(launch(repository).grpc_url)

    def real(expression: str) -> str:
        inputs = [
            tritonclient.grpc.InferInput("expression", [1], "BYTES"),
            tritonclient.grpc.InferInput("bf16", [2], "BF16"),
        ]
        inputs[0].set_data_from_numpy(np.array([expression.encode()], np.object_))
        inputs[1]._raw_content = bytes(4)
        result: bytes = client.infer("surface", inputs).as_numpy("result")[0]
        return result.decode()

    return real


@pytest.fixture(scope="module")
def surface(ask: Ask) -> list[dict[str, Any]]:
    """What the real module and the compiled one have: name -> description."""
    described: list[dict[str, Any]] = json.loads(ask("surface"))
    return described


# Signatures, three ways


def signature_from_docstring(owner: str, doc: str | None) -> Signature | None:
    """`f(self: c_python_backend_utils.Tensor, arg0: str, flags: int = 0) -> None`, as pybind11 writes it."""
    match = re.match(r"\w+\((.*)\) -> ", doc or "", re.DOTALL)
    if not match:
        return None
    parameters = split_at_top_level(match[1])
    if parameters and parameters[0].startswith("self: ") and parameters[0].endswith(f".{owner}"):
        del parameters[0]
    signature: Signature = {}
    for place, parameter in enumerate(parameters):
        name = parameter.split(":")[0]
        signature[str(place) if re.fullmatch(r"arg\d+|self", name) else name] = " = " in parameter
    return signature


def split_at_top_level(text: str) -> list[str]:
    """Split at the commas that no bracket or quote encloses."""
    parts, depth = [""], 0
    for character in text:
        depth += character in "[(<"
        depth -= character in "])>"
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def signature_from_inspect(signature: inspect.Signature) -> Signature:
    """That of a Python function; `self` is left out."""
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    return {
        str(place) if parameter.kind is parameter.POSITIONAL_ONLY else parameter.name: (
            parameter.default is not parameter.empty
        )
        for place, parameter in enumerate(parameters)
    }


def signature_from_stub(function: ast.FunctionDef) -> Signature:
    """That of a function in a .pyi file; `self` is left out."""
    arguments = function.args
    by_place = [*arguments.posonlyargs, *arguments.args]
    defaults = [False] * (len(by_place) - len(arguments.defaults)) + [True] * len(arguments.defaults)
    names = [
        *((argument, default) for argument, default in zip(by_place, defaults, strict=True) if argument.arg != "self"),
        *zip(arguments.kwonlyargs, (default is not None for default in arguments.kw_defaults), strict=True),
    ]
    return {
        str(place) if argument in arguments.posonlyargs else argument.arg: default
        for place, (argument, default) in enumerate(names)
    }


def stub_surface(stub: Path) -> dict[str, dict[str, Any]]:
    """name -> {} for a value, {"": signature} for a function, {member: signature or None} for a class."""
    found: dict[str, dict[str, Any]] = {}
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef():
                found[node.name] = {}
                for child in node.body:  # of an overloaded method the first signature has all the defaults
                    for name, signature in stub_member(child):
                        found[node.name].setdefault(name, signature)
            case ast.FunctionDef():
                found[node.name] = {"": signature_from_stub(node)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = {}
            case ast.ImportFrom(module="c_python_backend_utils"):
                found.update({alias.name: {} for alias in node.names})
    return found


def stub_member(node: ast.stmt) -> list[tuple[str, Signature | None]]:
    """What a statement in the body of a class defines."""
    match node:
        case ast.FunctionDef():
            return [(node.name, signature_from_stub(node))]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [(name, None)]
        case ast.ClassDef():
            return [(node.name, None)]
        case _:
            return []


# The comparison


def differences(real: dict[str, Any], ours: dict[str, dict[str, Any]]) -> list[str]:
    """What `ours` has and `real` has not, and where their signatures differ."""
    found = []
    for name, members in ours.items():
        if name not in real:
            found.append(f"{name}: not in the real module")
            continue
        for member, signature in members.items():
            described = real[name] if member == "" else real[name]["members"].get(member)
            if described is None:
                found.append(f"{name}.{member}: not in the real module")
                continue
            expected = described.get("signature") or signature_from_docstring(name, described.get("doc"))
            if signature is not None and expected is not None and not fits(signature, expected):
                found.append(f"{name}.{member}: the real one takes {expected}, not {signature}")
    return found


def fits(ours: Signature, real: Signature) -> bool:
    """Whether all that `ours` takes `real` takes too. `ours` may leave out what has a default."""
    return ours.items() <= real.items() and all(name in ours or default for name, default in real.items())


def test_stub_of_the_module_has_nothing_that_the_real_one_lacks(surface: list[dict[str, Any]]) -> None:
    """Every name and every signature of triton_python_backend_utils.pyi is real."""
    assert [] == differences(surface[0], stub_surface(PYTHON_STUB))


def test_stub_of_the_compiled_module_has_nothing_that_the_real_one_lacks(surface: list[dict[str, Any]]) -> None:
    """Every class, method and signature of c_python_backend_utils.pyi is real."""
    assert [] == differences(surface[1], stub_surface(COMPILED_STUB))


def test_stub_covers_the_real_module(surface: list[dict[str, Any]]) -> None:
    """All that the real module offers is typed, but for the modules that it imports itself."""
    offered = {name for name in surface[0] if not name.startswith("__")} - {"json", "np", "struct"}

    assert offered == set(stub_surface(PYTHON_STUB))


def test_stub_covers_the_classes_that_models_use(surface: list[dict[str, Any]]) -> None:
    """Each public method of the compiled classes is typed."""
    stub = stub_surface(COMPILED_STUB)
    missing = {
        f"{name}.{member}"
        for name, members in stub.items()
        for member in surface[1][name].get("members", ())
        if members and not member.startswith("_") and member not in members and member not in EXCEPTION_MEMBERS
    }

    assert set() == missing


EXCEPTION_MEMBERS = frozenset(dir(Exception))


def test_fake_has_nothing_that_the_real_module_lacks(surface: list[dict[str, Any]]) -> None:
    """Every name and every signature of the fake is real; its own attributes are private."""
    fake = fake_pb_utils.module()
    seen = {name: value for name, value in vars(fake).items() if not name.startswith("__")}
    others = {name: getattr(fake_pb_utils, name) for name in ("InferenceResponseSender", "InferenceTrace")}
    real = {**surface[1], **surface[0]}

    assert [] == differences(real, {name: fake_surface(value) for name, value in {**seen, **others}.items()})


def fake_surface(value: object) -> dict[str, Any]:
    """The public members of a class of the fake with their signatures; or the signature of a function."""
    if not inspect.isclass(value):
        return {"": signature_from_inspect(inspect.signature(value))} if callable(value) else {}
    own = {name: member for name, member in vars(value).items() if name == "__init__" or not name.startswith("_")}
    return {
        name: signature_from_inspect(inspect.signature(getattr(value, name)))
        if inspect.isfunction(member) or isinstance(member, staticmethod)
        else None
        for name, member in own.items()
        if (value.__name__, name) not in MADE_BY_TRITON
    }


# Python code cannot call these constructors in the real module.
MADE_BY_TRITON = {("InferenceResponseSender", "__init__"), ("Logger", "__init__")}


EXPRESSIONS = [
    "bf16.as_numpy()",
    "bf16.shape(), bf16.name(), bf16.is_cpu()",
    "torch.from_dlpack(bf16.to_dlpack()).dtype",
    "bf16.__dlpack_device__()",
    "pb_utils.Tensor('a', np.zeros((1, 1, 0), np.int32)).shape()",
    "pb_utils.Tensor(name='a', array=np.zeros(1))",
    "pb_utils.Tensor('a', [1, 2])",
    "pb_utils.Tensor('a', np.float32(1))",
    "pb_utils.Tensor(None, np.zeros(1))",
    "pb_utils.Tensor('a', np.array(['a', 'b']))",
    "pb_utils.Tensor('a', np.zeros(2, np.complex64))",
    "pb_utils.Tensor('a', np.array(['x', b'y'], np.object_)).as_numpy()",
    "pb_utils.Tensor('a', np.arange(6, dtype=np.int32).reshape(2, 3).T).as_numpy().tolist()",
    "pb_utils.Tensor('a', np.zeros(1, np.uint64)).as_numpy().dtype",
    "pb_utils.Tensor('a', np.array(3)).shape()",
    "pb_utils.Tensor('a', np.array([b'x'], np.object_)).to_dlpack()",
    "setattr(pb_utils.Tensor('a', np.zeros(1)), 'foo', 1)",
    "pb_utils.Tensor.from_dlpack('a', torch.zeros(1, 2, dtype=torch.bfloat16)).shape()",
    "pb_utils.Tensor.from_dlpack('a', torch.zeros(1, 2, dtype=torch.bfloat16)).as_numpy()",
    "pb_utils.Tensor.from_dlpack('a', torch.zeros(1, 2, dtype=torch.uint64)).as_numpy().dtype",
    "pb_utils.Tensor.from_dlpack('a', torch.zeros(3, 2).T)",
    "pb_utils.Tensor.from_dlpack('a', torch.zeros(3, dtype=torch.float8_e4m3fn))",
    "pb_utils.Tensor.from_dlpack('a', torch.zeros(3, dtype=torch.bool)).as_numpy()",
    "pb_utils.TritonError('x').message()",
    "pb_utils.TritonError('x').code() == pb_utils.TritonError.INTERNAL",
    "pb_utils.TritonError(message='x', code=pb_utils.TritonError.NOT_FOUND).code().name",
    "{name: int(getattr(pb_utils.TritonError, name)) for name in dir(pb_utils.TritonError) if name.isupper()}",
    "pb_utils.TritonError.NOT_FOUND == 2",
    "pb_utils.TritonError('x', 3)",
    "pb_utils.TritonError(None)",
    "setattr(pb_utils.TritonError('x'), 'foo', 1)",
    "pb_utils.TritonModelException('x').args",
    "pb_utils.InferenceResponse().output_tensors()",
    "pb_utils.InferenceResponse().error()",
    "pb_utils.InferenceResponse([]).has_error()",
    "pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError('x')).has_error()",
    "pb_utils.InferenceResponse(error=pb_utils.TritonError('x')).error().message()",
    "pb_utils.InferenceResponse(None)",
    "pb_utils.InferenceResponse([], 'x')",
    "pb_utils.InferenceResponse(['x'])",
    "bls(request_id='7', correlation_id=9, timeout=5).requested_output_names()",
    "bls(request_id='7').request_id(), bls(correlation_id='c').correlation_id(), bls(timeout=5).timeout()",
    "bls().request_id(), bls().correlation_id(), bls().timeout(), bls().flags(), bls().parameters()",
    "bls(trace=request.trace()).trace().get_context()",
    "bls(correlation_id=1.5)",
    "bls(request_id=5)",
    "bls(parameters={'a': 1, 'b': 'c', 'd': True}).parameters()",
    "bls(parameters={'a': [1]})",
    "bls(parameters='x')",
    "bls(preferred=1)",
    "pb_utils.InferenceRequest(inputs=[], requested_output_names=[])",
    "bls().exec().error().message()",
    "[response.error().message() for response in bls().exec(decoupled=True)]",
    "bls().exec(False, 5)",
    "sent(pb_utils.Tensor('a', np.zeros((1, 4), np.float16)))",
    "sent(pb_utils.Tensor.from_dlpack('a', torch.zeros(1, 4, dtype=torch.bfloat16)))",
    "setattr(bls(), 'foo', 1)",
    "request.parameters(), request.request_id(), request.timeout(), request.flags()",
    "request.is_cancelled()",
    "request.preferred_memory",
    "setattr(request, 'foo', 1)",
    "request.get_response_sender().is_cancelled()",
    "request.get_response_sender().send()",
    "request.get_response_sender().send(5)",
    "request.get_response_sender().send(flags=7)",
    "pb_utils.get_input_tensor_by_name(request, 'none')",
    "pb_utils.get_input_tensor_by_name(request, 'bf16').name()",
    "pb_utils.get_output_tensor_by_name(pb_utils.InferenceResponse(), 'none')",
    "pb_utils.using_decoupled_model_transaction_policy({})",
    "pb_utils.using_decoupled_model_transaction_policy({'model_transaction_policy': {'decoupled': True}})",
    "pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL",
    "pb_utils.Logger.log_info(5)",
    "pb_utils.Logger.log_info(message='hello')",
    "pb_utils.Logger.log_warning('hello')",
    "pb_utils.Logger()",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_fake_does_what_the_real_module_does(expression: str, ask: Ask) -> None:
    """The same value, or the same error with the same text."""
    names: dict[str, Any] = {"pb_utils": fake_pb_utils.module(), "torch": torch}
    exec(FUNCTIONS, names)  # noqa: S102  those that the real model has
    tensor = fake_pb_utils.Tensor.from_dlpack("bf16", torch.zeros(2, dtype=torch.bfloat16))
    request = fake_pb_utils.Client().send(
        fake_pb_utils.InferenceRequest(model_name="surface", inputs=[tensor], requested_output_names=["result"])
    )
    scope = {**names, "np": np, "request": request, "bf16": tensor}

    pretended = names["outcome"](expression.replace("bls(", BLS), scope)

    assert comparable(ask(expression.replace("bls(", BLS))) == comparable(pretended)


BLS = (
    "(lambda **more: pb_utils.InferenceRequest(model_name='nope', requested_output_names=['o', 'o'], "
    "inputs=[pb_utils.Tensor('a', np.zeros((1, 1)))], **more))("
)


def comparable(outcome: str) -> str:
    """Without addresses and module names, and of a TypeError only that it is one: pybind11 has its own texts."""
    outcome = re.sub(r"<[\w.]+ object at 0x\w+>", "<object>", outcome).replace("c_python_backend_utils.", "")
    return re.sub(r"^TypeError: .*", "TypeError", outcome)
