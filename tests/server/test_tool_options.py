import json

import pytest

from autodeploy.errors import InvalidRequestError
from autodeploy.server.parsing import (
    answer_parser,
    required_output,
    tool_format,
    tool_options,
)


def function(name, **fields):
    return {"type": "function", "function": {"name": name, **fields}}


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}, "$ref": {"type": "string"}},
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"$ref": "#/$defs/node"}, "x": {"const": {"$ref": "#/a"}}},
        }
    },
}
TOOLS = [function("weather", parameters=CITY), function("tree", parameters=TREE)]


def test_tools_are_read_in_both_of_openais_shapes():
    (tool,) = tool_options([function("f", description="d", parameters=CITY, strict=True)]).tools
    assert (tool.name, tool.description, tool.parameters, tool.strict) == ("f", "d", CITY, True)
    assert tool_options([{"type": "function", "name": "f"}]).tools[0].name == "f"


@pytest.mark.parametrize("tools", [None, []])
def test_without_tools_none_is_chosen(tools):
    for choice in (None, "none", "auto"):
        options = tool_options(tools, choice)
        assert (options.choice, options.tools) == ("none", ())


def test_the_choices():
    assert tool_options(TOOLS).choice == "auto"
    assert tool_options(TOOLS, "none").choice == "none"
    assert tool_options(TOOLS, "none").for_template() is None
    assert tool_options(TOOLS, "required").choice == "required"
    for named in (function("tree"), {"type": "function", "name": "tree"}):
        options = tool_options(TOOLS, named)
        assert (options.choice, options.named.name) == ("required", "tree")
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": TOOLS[:1]}}
    options = tool_options(TOOLS, allowed)
    assert (options.choice, list(options.parameters)) == ("auto", ["weather"])
    assert len(options.for_template()) == 2
    assert tool_options(TOOLS, parallel_tool_calls=False).parallel is False


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        ({"tools": "f"}, "tools:"),
        ({"tools": ["f"]}, r"tools\[0\]:"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].type"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\].function:"),
        ({"tools": [function("")]}, r"tools\[0\].function.name"),
        ({"tools": [function("a b")]}, r"tools\[0\].function.name"),
        ({"tools": [function(3)]}, r"tools\[0\].function.name"),
        ({"tools": [function("f", description=1)]}, "description"),
        ({"tools": [function("f", parameters=[])]}, "parameters:"),
        ({"tools": [function("f", parameters={"type": "string"})]}, "parameters.type"),
        ({"tools": [function("f", parameters={"properties": []})]}, "parameters.properties"),
        ({"tools": [function("f", strict="yes")]}, "strict"),
        ({"tools": [function("f"), function("f")]}, "declared twice"),
        ({"tools": [function(f"f{i}") for i in range(129)]}, "at most 128"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": ["auto"]}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": function("other")}, "no such function"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "no such function"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "tools": [1]}}, "tools"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(request_, path):
    with pytest.raises(InvalidRequestError, match=path):
        tool_options(**request_)


def test_a_template_always_gets_a_description_and_an_object():
    assert tool_options([function("f")]).for_template() == [
        function("f", description="", parameters={"type": "object", "properties": {}})
    ]


def test_nothing_is_required_of_the_output_where_the_model_chooses():
    assert required_output(tool_options(TOOLS)) is None
    assert required_output(tool_options(TOOLS, "none")) is None


def test_a_named_tool_requires_its_arguments():
    assert required_output(tool_options(TOOLS, function("weather"))) == CITY
    assert required_output(tool_options([function("f")], function("f"))) == {"type": "object"}


def resolve(root, pointer):
    for key in pointer.removeprefix("#").split("/")[1:]:
        root = root[key]
    return root


def test_any_tool_requires_a_list_of_calls_whose_references_still_hold():
    schema = required_output(tool_options(TOOLS, "required"))
    weather, tree = schema["items"]["anyOf"]
    assert schema["minItems"] == 1
    assert "maxItems" not in schema
    assert weather["properties"] == {
        "name": {"type": "string", "enum": ["weather"]},
        "parameters": CITY,
    }
    moved = resolve(schema, tree["properties"]["parameters"]["$ref"])
    node = resolve(schema, moved["properties"]["root"]["$ref"])
    assert resolve(schema, node["properties"]["next"]["$ref"]) is node
    # Data and a property of that name are not references.
    assert node["properties"]["x"] == {"const": {"$ref": "#/a"}}
    assert moved["properties"]["$ref"] == {"type": "string"}


def test_one_call_at_most_where_calls_may_not_be_parallel():
    options = tool_options(TOOLS, "required", parallel_tool_calls=False)
    assert required_output(options)["maxItems"] == 1


def test_required_output_is_read_as_calls():
    options = tool_options(TOOLS, "required")
    text = json.dumps([{"name": "weather", "parameters": {"city": "Ulm"}}])
    parsed = answer_parser(options, tool_format("hermes")).whole(text)
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [
        ("weather", '{"city": "Ulm"}')
    ]
    assert parsed.content is None


def test_a_named_tools_output_is_its_arguments():
    parser = answer_parser(tool_options(TOOLS, function("weather")), None)
    (call,) = parser.whole('{"city": "Ulm"}').tool_calls
    assert (call.name, call.arguments) == ("weather", '{"city": "Ulm"}')
    assert parser.whole('{"city": "Ul').content == '{"city": "Ul'


def test_where_no_tool_may_be_called_calls_are_content():
    parser = answer_parser(tool_options(TOOLS, "none"), tool_format("hermes"))
    text = '<tool_call>{"name": "weather"}</tool_call>'
    assert parser.whole(text).content == text
