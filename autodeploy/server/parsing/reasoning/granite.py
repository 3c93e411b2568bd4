"""Sentences instead of tags: "Here is my thought process:" and "Here is my response:".

Source: IBM's chat template of version 3.2.
"""

from __future__ import annotations

from ..reasoning_tags import tagged

FORMAT = tagged(
    ("Here is my thought process:", "Here's my thought process:"),
    ("Here is my response:", "Here's my response:"),
    in_templates=(("Here is my thought process:",),),
)
