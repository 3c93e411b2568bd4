"""What the source of a dataclass says below its fields: the help of flags, and of the schema."""

from __future__ import annotations

import ast
import inspect


def field_texts(owner: type) -> dict[str, str]:
    """Texts by the names of the fields that have one."""
    statements = ast.parse(inspect.getsource(owner)).body
    (definition,) = (s for s in statements if isinstance(s, ast.ClassDef))
    texts = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        ):  # fmt: skip
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts
