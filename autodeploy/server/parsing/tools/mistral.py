"""[TOOL_CALLS][{"name": "f", "arguments": {}}], and since version 11 [TOOL_CALLS]f[ARGS]{}.

The later form repeats for each call, and may say [CALL_ID]id between name and arguments. Ids have
nine letters or digits, which the chat templates insist on. Source: the instruct tokenizers of
mistral-common.
"""

from __future__ import annotations

import re
import secrets
import string

from .. import call_object
from ..json_text import object_
from ..reader import Malformed, Wait
from ..stream import Format, Stream

_NAME = re.compile(r"[\w.:/-]*")
_ID_CHARACTERS = string.ascii_letters + string.digits


def new_id() -> str:
    """Nine letters or digits."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))


def read(stream: Stream, marker: str) -> Wait[None]:
    """A list of objects, or one name with its arguments."""
    text = stream.text
    yield from text.space()
    if (yield from text.peek()) in ("[", "{"):
        yield from call_object.calls(stream, marked=True, new_id=new_id)
        return
    name = yield from text.run(_NAME, 256)
    call_id = new_id()
    if (yield from text.accept("[CALL_ID]")):
        call_id = (yield from text.run(_NAME, 64)) or call_id
    yield from text.accept("[ARGS]")
    yield from text.space()
    if (yield from text.peek()) != "{":
        raise Malformed
    stream.begin(name, call_id)
    yield from object_(text, stream.arguments)
    stream.finish()


FORMAT = Format(
    read,
    markers=("[TOOL_CALLS]",),
    in_templates=(("[TOOL_CALLS]",),),
    inner=("[CALL_ID]", "[ARGS]"),
)
