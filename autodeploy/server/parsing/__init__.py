"""Tool calls and reasoning as text: what an answer says, and what a template wants to be told.

Pure functions over text and plain data; no server, no model. One file of `tools` or `reasoning`
is one format; `stream` reads them all in the same way.
"""

from __future__ import annotations

from .answer import AnswerParser, AnswerStream
from .detect import Detected, detect
from .pieces import Parsed, Piece, Reasoning, ToolCall, ToolDelta, join, merge
from .registry import reasoning_format, reasoning_formats, tool_format, tool_formats
from .stream import Format, Stream
from .template_messages import template_messages
from .tool_options import Tool, ToolOptions, tool_options
from .tool_schema import answer_parser, required_output

__all__ = [
    "AnswerParser", "AnswerStream", "Detected", "Format", "Parsed", "Piece", "Reasoning", "Stream",
    "ToolCall", "ToolDelta", "detect", "join", "merge", "reasoning_format", "reasoning_formats",
    "Tool", "ToolOptions", "answer_parser", "required_output", "template_messages", "tool_format",
    "tool_formats", "tool_options",
]  # fmt: skip
