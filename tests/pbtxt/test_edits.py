# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""edits.py, text_format.py and model_config.py, against protobuf's own parser."""

from __future__ import annotations

import contextlib
import io
import random
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import DataType
from tritonclient.grpc.model_config_pb2 import ModelConfig as ModelConfigProto

from random_configs import field_text, message_text, scalar_literal
from tritonlora.errors import ConfigError
from tritonlora.pbtxt.edits import append_value, insert_field, quote, remove_value, replace_value
from tritonlora.pbtxt.model_config import DATA_TYPES, Step, TensorSpec, filled, has_template, parse_config
from tritonlora.pbtxt.text_format import MAX_DEPTH, Document, Message, Scalar, parse
from upstream_configs import NAMES, PATHS, fill, protobuf, upstream

# --- Helpers -------------------------------------------------------------------------------------------------------


def python_value(value: Scalar, field: Any) -> object:
    """What a scalar of our tree means to a field of protobuf's."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        assert value.quoted

        return value.value
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return value.value in ("true", "True", "t", "1")
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        named = field.enum_type.values_by_name.get(value.value)
        return named.number if named else int(value.value)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return float(value.value.rstrip("f") if value.value[-2:] != "nf" else value.value)
    digits = value.value.lstrip("-")
    return int(value.value, 8 if digits[0] == "0" and digits.isdecimal() else 0)


def to_protobuf(message: Message, into: Any) -> Any:
    """Our tree, put into a protobuf message field by field."""
    for field in message.fields:
        descriptor = into.DESCRIPTOR.fields_by_name[field.name]
        for value in field.values:
            add_value(value, into, descriptor)
    return into


def add_value(value: Scalar | Message, into: Any, descriptor: Any) -> None:
    """One value of the field, set or added."""
    target = getattr(into, descriptor.name)
    if isinstance(value, Scalar):
        if descriptor.is_repeated:
            target.append(python_value(value, descriptor))
        else:
            setattr(into, descriptor.name, python_value(value, descriptor))
    elif descriptor.message_type.GetOptions().map_entry:
        key_field, value_field = descriptor.message_type.fields
        key = value.scalar("key")
        key_value = python_value(key, key_field) if key else key_field.default_value
        if value_field.message_type:
            target[key_value].Clear()
            to_protobuf(value.message("value") or Message(0, 0, ()), target[key_value])
        else:
            scalar = value.scalar("value")
            target[key_value] = python_value(scalar, value_field) if scalar else value_field.default_value
    elif descriptor.is_repeated:
        to_protobuf(value, target.add())
    else:
        target.SetInParent()
        to_protobuf(value, target)


def messages_in(message: Message, proto: Any) -> list[tuple[Message, Any]]:
    """`message` and all messages inside, each with its protobuf twin; entries of maps are left out."""
    pairs = [(message, proto)]
    seen: Counter[str] = Counter()
    for field in message.fields:
        descriptor = proto.DESCRIPTOR.fields_by_name[field.name]
        for value in field.values:
            index, seen[field.name] = seen[field.name], seen[field.name] + 1
            if isinstance(value, Message) and not descriptor.message_type.GetOptions().map_entry:
                target = getattr(proto, field.name)
                pairs += messages_in(value, target[index] if descriptor.is_repeated else target)
    return pairs


def random_document(seed: int) -> tuple[random.Random, Document, Any, list[tuple[Message, Any]]]:
    """A random config: its tree, what protobuf sees in it, and all its messages with their twins."""
    rng = random.Random(seed)  # noqa: S311  reproducible on purpose
    text = message_text(rng, ModelConfigProto.DESCRIPTOR)
    document, proto = parse(text), protobuf(text)
    return rng, document, proto, messages_in(document.message, proto)


def is_map(field: Any) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


def literal_of(field: Any, value: Any) -> str:
    """A value as protobuf prints it."""
    if field.message_type:
        return "{\n" + textwrap.indent(text_format.MessageToString(value, as_utf8=True), "  ") + "}"
    out = io.StringIO()
    text_format.PrintFieldValue(field, value, out, as_utf8=True)
    return out.getvalue()


def common_length(one: str, other: str) -> int:
    """The number of characters that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def pieces_added(shorter: str, longer: str) -> tuple[str, str]:
    """The at most two pieces that have to be put into `shorter` to get `longer`."""
    prefix = common_length(shorter, longer)
    left, right = shorter[prefix:], longer[prefix:]
    suffix = common_length(left[::-1], right[::-1])
    left, right = left[: len(left) - suffix], right[: len(right) - suffix]
    assert left in right

    before, _, after = right.partition(left) if left else (right, "", "")
    return before, after


SEEDS = st.integers(0, 2**32)

# --- Parsing -------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_parse_sees_what_protobuf_sees(seed: int) -> None:
    """Random configs in random spelling mean the same to `parse` as to protobuf's own parser."""
    _, document, proto, _ = random_document(seed)

    assert proto == to_protobuf(document.message, ModelConfigProto())


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_parse_sees_what_protobuf_sees_in_upstream_configs(path: Path) -> None:
    """Upstream's configs, filled, mean the same to `parse` as to protobuf's own parser."""
    text = fill(path.read_text())

    assert protobuf(text) == to_protobuf(parse(text).message, ModelConfigProto())


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_parse_takes_upstream_configs_that_nobody_has_filled(path: Path) -> None:
    """Templates in an upstream config change values, and nothing about its structure."""
    text = path.read_text()

    assert [f.name for f in parse(fill(text)).message.fields] == [f.name for f in parse(text).message.fields]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a: ${x}", ["${x}"]),
        ("a: [ 1, ${x} , ${y}]", ["1", "${x}", "${y}"]),
        ("a: TYPE_${x}", ["TYPE_${x}"]),
        ("a: $x;", ["$x"]),
        ("a: ${x:-default value}", ["${x:-default value}"]),
        ('a: "${x}/y"', ["${x}/y"]),
        ("a: - 1 # blanks after a sign\n", ["-1"]),
        ("a: -inf", ["-inf"]),
        (r"'\u00e9\U0001F642\?\a\"'".join(["a: ", ""]), ['é🙂?\a"']),
        ("a: 'x' # one\n \"y\"\r\n'z'", ["xyz"]),
        ("a <> a { } a: [ ]", []),
    ],
)
def test_parse_takes_what_the_python_parser_of_protobuf_does_not(text: str, values: list[str]) -> None:
    """Templates, and spellings that only the C++ parser of protobuf (Triton's) takes."""
    assert values == [value.value for value in parse(text).message.scalars("a")]


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("a: 1\nb: 'x", 2, 4, "expected a closing ' on the same line"),
        ('a: "x\n"', 1, 4, 'expected a closing " on the same line'),
        ("a {", 1, 4, "expected a field name or '}', got the end of the file"),
        ("a <}", 1, 4, "expected a field name or '>', got '}'"),
        ("}", 1, 1, "expected a field name, got '}'"),
        ("a: [ 1,\n]", 2, 1, "expected a value, got ']'"),
        ("a: [ 1 2 ]", 1, 8, "expected ',' or ']', got '2'"),
        ("a: [ [ 1 ] ]", 1, 6, r"expected a value, got '\["),
        ("a: [ 1", 1, 7, "expected ',' or ']', got the end of the file"),
        ("a 1", 1, 3, "expected ':' or a message, got '1'"),
        ("a [ 1 ]", 1, 5, "expected ':' or a message, got '1'"),
        ("a:", 1, 3, "expected a value, got the end of the file"),
        ("1: 2", 1, 1, "expected a field name, got '1'"),
        ("a: 1.2.3", 1, 4, "expected a number, a name or a string, got '1.2.3'"),
        ("a: 1,;b: 2", 1, 6, "expected a field name, got ';'"),
        ("a: @", 1, 4, "expected a field or a value, got the character '@'"),
        ("\ufeffa: 1", 1, 1, r"expected a field or a value, got the character '\\ufeff'"),
        ("a: ${x", 1, 4, "got the character '\\$'"),
        (r'a: "\q"', 1, 4, r"expected an escape that protobuf knows, got '\\\\q'"),
        (r'a: "\U00110000"', 1, 4, "expected an escape that protobuf knows"),
        (r'a: "\xff"', 1, 4, "expected a string that is UTF-8"),
        ("a: '\udc80'", 1, 4, "expected a string that is UTF-8"),
        ("a {" * 100_000, 1, 99, f"expected at most {MAX_DEPTH} messages inside each other"),
        ("a <\n" * 100_000, MAX_DEPTH + 1, 3, f"expected at most {MAX_DEPTH} messages inside each other"),
        ("a: " + "[" * 100_000, 1, 5, r"expected a value, got '\["),
        ("#" * 500_000 + "\n" + "#\n" * 100_000 + "!", 100_002, 1, "got the character '!'"),
        ("a: '" + "x" * 1_000_000, 1, 4, "expected a closing '"),
        ("x" * 1_000_000, 1, 1_000_001, "expected ':' or a message, got the end of the file"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else str(value),
)
def test_parse_says_where_and_what_was_expected(text: str, line: int, column: int, message: str) -> None:
    """A text that is not pbtxt is one named error with line, column and what was expected there."""
    with pytest.raises(ConfigError, match=message) as error:
        parse(text)

    assert (line, column) == (error.value.line, error.value.column)


def test_parse_refuses_a_huge_text_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text longer than any config is refused before anything is built from it."""
    monkeypatch.setattr("tritonlora.pbtxt.text_format.MAX_LENGTH", 10)

    with pytest.raises(ConfigError, match="expected at most 10 characters, got 11"):
        parse("#" * 11)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("a:{}<>[],;'\"\\#\n\r ${}1-.xé"), max_size=40))
def test_parse_raises_nothing_but_config_errors(text: str) -> None:
    """Whatever the text, it is a tree or a ConfigError."""
    with contextlib.suppress(ConfigError):
        parse(text)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_quote_is_read_back_as_it_was(content: str) -> None:
    """Any string survives `quote`, `parse` and protobuf's parser."""
    assume(all(not 0xD800 <= ord(character) <= 0xDFFF for character in content))
    text = f"name: {quote(content)}"

    assert [content, content] == [protobuf(text).name, next(s.value for s in parse(text).message.scalars("name"))]


# --- Edits ---------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_replace_value_changes_that_value_and_no_other_byte(seed: int) -> None:
    """protobuf sees the new value in the old one's place; the text around it is the same."""
    rng, document, proto, pairs = random_document(seed)
    places = [(field, value, twin) for message, twin in pairs for field in message.fields for value in field.values]
    scalars = [(field, value, twin) for field, value, twin in places if isinstance(value, Scalar)]
    assume(scalars)
    field, value, twin = rng.choice(scalars)
    descriptor = twin.DESCRIPTOR.fields_by_name[field.name]
    literal = scalar_literal(rng, descriptor)
    wanted = getattr(text_format.Parse(f"{field.name}: {literal}", type(twin)()), field.name)
    if descriptor.is_repeated:
        values = [other for message, t in pairs if t is twin for other in message.all(field.name)]
        getattr(twin, field.name)[next(i for i, other in enumerate(values) if other is value)] = wanted[0]
    else:
        setattr(twin, field.name, wanted)

    edited = replace_value(document, value, literal).text

    assert proto == protobuf(edited)
    assert document.text[: value.start] == edited[: value.start]
    assert document.text[value.end :] == edited[value.start + len(literal) :]


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_append_value_adds_that_value_and_changes_no_byte(seed: int) -> None:
    """protobuf sees one value more at the end of the repeated field; the old text is all there."""
    rng, document, proto, pairs = random_document(seed)
    message, twin = rng.choice(pairs)
    repeated = [field for field in twin.DESCRIPTOR.fields if field.is_repeated and not is_map(field)]
    assume(repeated)
    field = rng.choice(repeated)
    values: Any = ()
    while not values:
        values = getattr(text_format.Parse(field_text(rng, field, depth=3), type(twin)()), field.name)
    literal = literal_of(field, values[0])
    getattr(twin, field.name).append(values[0])

    edited = append_value(document, message, field.name, literal).text

    assert proto == protobuf(edited)
    comma, rest = pieces_added(document.text, edited)
    assert not rest or comma == ","


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_insert_field_adds_that_field_and_changes_no_byte(seed: int) -> None:
    """protobuf sees one field more; the old text is all there."""
    rng, document, proto, pairs = random_document(seed)
    message, twin = rng.choice(pairs)
    present = {field.name for field in message.fields}
    oneofs = {oneof.name for oneof in twin.DESCRIPTOR.oneofs if twin.WhichOneof(oneof.name)}
    absent = [
        field for field in twin.DESCRIPTOR.fields
        if field.name not in present and not (field.containing_oneof and field.containing_oneof.name in oneofs)
    ]  # fmt: skip
    assume(absent)
    other = text_format.Parse(field_text(rng, rng.choice(absent), depth=3), type(twin)())
    assume(other.ListFields())
    twin.MergeFrom(other)

    edited = insert_field(document, message, text_format.MessageToString(other, as_utf8=True).rstrip("\n")).text

    assert proto == protobuf(edited)
    assert "" == pieces_added(document.text, edited)[1]


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_remove_value_takes_that_value_and_no_other_byte(seed: int) -> None:
    """protobuf sees one value less; of the text only the value, one separator and blanks around them are gone."""
    rng, document, proto, pairs = random_document(seed)
    places = [
        (message, field, value, twin) for message, twin in pairs for field in message.fields for value in field.values
        if not is_map(twin.DESCRIPTOR.fields_by_name[field.name])
    ]  # fmt: skip
    assume(places)
    message, field, value, twin = rng.choice(places)
    if twin.DESCRIPTOR.fields_by_name[field.name].is_repeated:
        index = next(i for i, other in enumerate(message.all(field.name)) if other is value)
        del getattr(twin, field.name)[index]
    else:
        twin.ClearField(field.name)

    edited = remove_value(document, message, value).text

    assert proto == protobuf(edited)
    removed = "".join(pieces_added(edited, document.text))
    span = document.text[value.start : value.end] if field.in_list else document.text[field.start : field.end]
    extra = Counter("".join(removed.split())) - Counter("".join(span.split()))
    assert extra <= Counter(",")
    assert not Counter("".join(span.split())) - Counter("".join(removed.split()))


ELEMENT = '{\n  name: "new"\n  dims: [ 1 ]\n}'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            'input [\n  {\n    name: "a"\n  }\n]\n',
            'input [\n  {\n    name: "a"\n  },\n  {\n    name: "new"\n    dims: [ 1 ]\n  }\n]\n',
            id="a list of messages",
        ),
        pytest.param(
            'input [\r\n\t{\r\n\t\t\tname: "a"\r\n\t} # why, oh why\r\n]',
            'input [\r\n\t{\r\n\t\t\tname: "a"\r\n\t}, # why, oh why\r\n\t{\r\n\t\t\tname: "new"\r\n'
            "\t\t\tdims: [ 1 ]\r\n\t}\r\n]",
            id="CRLF, tabs, a comment, no newline at the end",
        ),
        pytest.param(
            'input [{ name: "a" }]',
            'input [{ name: "a" }, { name: "new" dims: [ 1 ] }]',
            id="on one line",
        ),
        pytest.param(
            'input: {\n    name: "a"\n},\noutput { }\n',
            'input: {\n    name: "a"\n},\ninput: {\n    name: "new"\n    dims: [ 1 ]\n}\noutput { }\n',
            id="repeats, with a colon and a comma",
        ),
        pytest.param("input < >;output < >", 'input < >; input { name: "new" dims: [ 1 ] } output < >', id="repeats"),
        pytest.param("input [ ]", 'input [ { name: "new" dims: [ 1 ] }  ]', id="an empty list"),
        pytest.param(
            '# nothing\nname: "x" # yet',
            '# nothing\nname: "x" # yet\ninput: {\n  name: "new"\n  dims: [ 1 ]\n}\n',
            id="the first one",
        ),
    ],
)
def test_append_value_writes_in_the_style_of_its_neighbours(before: str, after: str) -> None:
    """Indentation, line ends, spelling and comments of the file stay as the user has them."""
    document = parse(before)

    assert after == append_value(document, document.message, "input", ELEMENT).text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("a [\n  { n: 1 },\n  { n: 2 }\n]\n", "a [\n  { n: 1 }\n]\n", id="last"),
        pytest.param("a [\n  { n: 2 },\n  { n: 1 }\n]\n", "a [\n  { n: 1 }\n]\n", id="first"),
        pytest.param("a [\n  { n: 2 }\n]\n", "a [\n]\n", id="only"),
        pytest.param(
            "a [\n  { n: 2 } # c, d\n  ,{ n: 1 }]\n", "a [\n  # c, d\n  { n: 1 }]\n", id="comma on the next line"
        ),
        pytest.param("a [{ n: 1 } # c, d\n, { n: 2 }] # e", "a [{ n: 1 } # c, d\n ] # e", id="comma in a comment"),
        pytest.param("a { n: 1 } a { n: 2 } # c", "a { n: 1 } # c", id="on one line"),
        pytest.param("a { n: 2 }; b: 1", "b: 1", id="with its semicolon"),
        pytest.param("b: 1\r\na {\r\n n: 2\r\n}\r\nb: 3", "b: 1\r\nb: 3", id="CRLF"),
        pytest.param("b: 1\na {\n n: 2\n}", "b: 1\n", id="at the end of the file"),
    ],
)
def test_remove_value_leaves_tidy_text(before: str, after: str) -> None:
    """A separator goes with its value, a line goes when nothing is left on it, and comments stay."""
    document = parse(before)
    value = next(m for m in document.message.messages("a") if m.scalar("n") and m.scalars("n")[0].value == "2")

    assert after == remove_value(document, document.message, value).text


# --- What a config says --------------------------------------------------------------------------------------------


def tensor_spec(tensor: Any) -> TensorSpec:
    """The TensorSpec of a protobuf ModelInput or ModelOutput."""
    return TensorSpec(
        name=tensor.name,
        data_type=DATA_TYPES[tensor.data_type],
        dims=tuple(tensor.dims),
        optional=getattr(tensor, "optional", False),
        allow_ragged_batch=getattr(tensor, "allow_ragged_batch", False),
    )


def assert_model_config_agrees(text: str) -> None:
    """Every field of ModelConfig has the value that protobuf reads."""
    proto, config = protobuf(text), parse_config(text)

    assert (proto.name, proto.backend) == (config.name, config.backend)
    assert (proto.max_batch_size, proto.model_transaction_policy.decoupled) == (config.max_batch_size, config.decoupled)
    assert [tensor_spec(tensor) for tensor in proto.input] == list(config.inputs)
    assert [tensor_spec(tensor) for tensor in proto.output] == list(config.outputs)
    assert {key: value.string_value for key, value in proto.parameters.items()} == config.parameters
    steps = proto.ensemble_scheduling.step
    assert [Step(s.model_name, dict(s.input_map), dict(s.output_map)) for s in steps] == list(config.steps)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_model_config_of_upstream_configs_agrees_with_protobuf(path: Path) -> None:
    """What upstream's configs say, and the number of instances."""
    text = fill(path.read_text())

    assert_model_config_agrees(text)
    assert (sum(group.count for group in protobuf(text).instance_group) or 1) == parse_config(text).instance_count


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_model_config_of_random_configs_agrees_with_protobuf(seed: int) -> None:
    """What random configs in random spelling say."""
    rng = random.Random(seed)  # noqa: S311  reproducible on purpose

    assert_model_config_agrees(message_text(rng, ModelConfigProto.DESCRIPTOR))


def test_data_types_are_numbered_as_in_protobuf() -> None:
    """DATA_TYPES lists the enum's names in the order of their numbers."""
    assert tuple(DataType.keys()) == DATA_TYPES
    assert tuple(range(len(DATA_TYPES))) == tuple(DataType.values())


def test_dims_with_a_template_are_unfilled_as_a_whole() -> None:
    """One dim that nobody knows leaves the shape unknown, and says where."""
    config = parse_config("input { name: 'x' dims: [ -1, ${rows} ] }")
    (spec,) = config.inputs

    with pytest.raises(ConfigError, match=r"line 1, column 31: dims of input 'x' is still \$\{rows\}"):
        filled(spec.dims)


def test_unfilled_is_an_error_only_for_the_one_who_needs_the_value() -> None:
    """A template is carried along; `filled` raises with the place, the placeholder and the remedy."""
    config = parse_config(upstream("v0.18.0", "tensorrt_llm"))
    spec = config.output("context_logits")
    assert spec is not None

    with pytest.raises(
        ConfigError,
        match=r"^line 458, column 16: data_type of output 'context_logits' is still \$\{logits_datatype\}: .*fill_temp",
    ):
        filled(spec.data_type)
    with pytest.raises(ConfigError, match=r"decoupled is still \$\{decoupled_mode\}"):
        bool(config.decoupled)
    assert (-1, -1) == filled(spec.dims)
    assert has_template(config.parameters["gpt_model_path"])
    assert not has_template(config.parameters["executor_worker_path"])


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("max_batch_size: many", ["line 1, column 17: expected max_batch_size to be an integer, got 'many'"]),
        ("max_batch_size: 1 max_batch_size: 2", ["column 35: max_batch_size is given twice"]),
        ("max_batch_size: { }", ["expected max_batch_size to be one value, got a message"]),
        ("name: x", ["expected name to be a string in quotes, got 'x'"]),
        ("model_transaction_policy { decoupled: yes }", ["expected decoupled to be true or false, got 'yes'"]),
        ("ensemble_scheduling { } ensemble_scheduling { }", ["ensemble_scheduling is given twice"]),
        ("input: 5", ["expected input { … }, got '5'"]),
        (
            "input { name: 'x'\n data_type: TYPE_FP12\n dims: [ 'a' ]\n dims { } }",
            [
                "line 2, column 13: expected data_type of input 'x' to be one of TYPE_BOOL,",
                "got 'TYPE_FP12'",
                "expected dims of input 'x' to be integers, got a message",
                "line 3, column 10: expected dims of input 'x' to be an integer, got 'a'",
            ],
        ),
    ],
)
def test_parse_config_reports_every_problem_with_its_place(text: str, problems: list[str]) -> None:
    """Values of the wrong kind are all named in one ConfigError."""
    with pytest.raises(ConfigError) as error:
        parse_config(text)

    for problem in problems:
        assert problem in str(error.value)
    assert (len(problems) == 1) == (error.value.line == 1)


def test_parse_config_reads_numbers_in_every_spelling() -> None:
    """Octal, hexadecimal, negative and enum numbers mean what they mean to protobuf."""
    text = (
        "max_batch_size: 010 input { name: 'x' data_type: 14 dims: [ -1, 0x10, - 2 ] optional: t } instance_group { }"
    )

    config = parse_config(text)

    assert 8 == config.max_batch_size
    assert (TensorSpec("x", "TYPE_BF16", (-1, 16, -2), optional=True),) == config.inputs
    assert 1 == config.instance_count
