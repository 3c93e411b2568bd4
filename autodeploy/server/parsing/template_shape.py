"""What a chat template wants messages to look like, read from its syntax tree.

Templates differ in what they take: content as a string or as a list of parts, arguments of calls
as a dict or as text, no content as None or as an empty string. None says so; each shows it by
what it does with the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, nodes

# transformers' own block tag, which marks what the assistant wrote; it changes no text.
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_JOINS = (nodes.Output, nodes.Add, nodes.Concat)
_TAKES_DICT = ("tojson", "items", "dictsort")


@dataclass(frozen=True)
class TemplateShape:
    """How a template takes messages; the defaults are what most do.

    content_parts: content must be a list of parts. none_content: a message that only calls tools
    has None as its content. text_arguments: arguments must be JSON text. developer: it knows that
    role. thinking: reasoning is in a field of that name.
    """

    content_parts: bool = False
    none_content: bool = False
    text_arguments: bool = False
    developer: bool = False
    thinking: bool = False


@lru_cache(maxsize=64)
def template_shape(chat_template: str) -> TemplateShape:
    """The shape that this template takes."""
    source = _GENERATION.sub("", chat_template)
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except TemplateSyntaxError:
        # It cannot be rendered either; whoever does that gets the message.
        return TemplateShape()
    content = _Field(tree, "content")
    arguments = _Field(tree, "arguments")
    return TemplateShape(
        content_parts=content.looped and "string" not in content.tests,
        none_content="none" in content.tests,
        text_arguments=arguments.as_text and not arguments.as_dict and not arguments.tests,
        developer=any(node.value == "developer" for node in tree.find_all(nodes.Const)),
        thinking=_Field(tree, "thinking").read,
    )


class _Field:
    """What a template does with a field of messages, under any name."""

    def __init__(self, tree: nodes.Template, name: str) -> None:
        self._name = name
        # A macro's argument has the field's name; `set x = message.content` gives it another.
        self._aliases = {name}
        self._aliases |= {
            node.target.name
            for node in tree.find_all(nodes.Assign)
            if isinstance(node.target, nodes.Name) and self._passes_on(node.node)
        }
        self.read = any(self._is(node) for node in tree.find_all((nodes.Getattr, nodes.Getitem)))
        self.looped = any(self._is(node.iter) for node in tree.find_all(nodes.For))
        self.tests = frozenset(self._tests(tree))
        self.as_dict = self.looped or any(map(self._takes_dict, tree.find_all(nodes.Expr)))
        self.as_text = any(map(self._takes_text, tree.find_all(_JOINS)))

    def _is(self, node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == self._name
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == self._name
        if isinstance(node, nodes.Call) and node.args:
            # message.get('content')
            name = node.args[0]
            is_get = isinstance(node.node, nodes.Getattr) and node.node.attr == "get"
            return is_get and isinstance(name, nodes.Const) and name.value == self._name
        return isinstance(node, nodes.Name) and node.name in self._aliases

    def _tests(self, tree: nodes.Template) -> Iterator[str]:
        for test in tree.find_all(nodes.Test):
            if self._is(test.node) and test.name in ("string", "mapping", "none"):
                yield test.name
        for compare in tree.find_all(nodes.Compare):
            if self._is(compare.expr) and any(
                isinstance(op.expr, nodes.Const) and op.expr.value is None for op in compare.ops
            ):
                yield "none"

    def _passes_on(self, node: nodes.Node) -> bool:
        """Whether an expression is the field or, as in `message.content or ''`, may be."""
        if isinstance(node, (nodes.Or, nodes.CondExpr)):
            return any(self._is(child) for child in node.iter_child_nodes())
        return self._is(node)

    def _takes_text(self, node: nodes.Node) -> bool:
        return any(self._is(child) for child in node.iter_child_nodes())

    def _takes_dict(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Filter):
            return node.name in _TAKES_DICT and self._is(node.node)
        return isinstance(node, (nodes.Getattr, nodes.Getitem)) and self._is(node.node)
