"""<tool_call>f, then <arg_key>a</arg_key><arg_value>1</arg_value> for each argument, </tool_call>.

Source: the published chat templates.
"""

from __future__ import annotations

import re

from ..bare_calls import LONGEST_NAME, member
from ..reader import Wait
from ..stream import Format, Stream

ALSO = ("glm47",)
_BEGIN, _END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"
_NAME = re.compile(r"[\w.:/-]*")


def read(stream: Stream, marker: str) -> Wait[None]:
    """One call."""
    text = stream.text
    yield from text.space()
    name = yield from text.run(_NAME, LONGEST_NAME)
    yield from text.space()
    if (yield from text.accept(_END)):
        stream.call(name, "{}")
        return
    yield from text.expect(_KEY)
    first = True
    while first or (yield from text.accept(_KEY)):
        key = (yield from text.through(_KEY_END, LONGEST_NAME)).strip()
        yield from text.space()
        yield from text.expect(_VALUE)
        if first:
            stream.begin(name)
        yield from member(stream, name, key, first, _VALUE_END, breaks=False)
        yield from text.space()
        first = False
    stream.arguments("}")
    stream.finish()
    yield from text.accept(_END)


FORMAT = Format(
    read,
    markers=(_BEGIN,),
    in_templates=((_BEGIN, _KEY),),
    inner=(_END, _KEY, _KEY_END, _VALUE, _VALUE_END),
)
