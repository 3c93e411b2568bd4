"""Triton's interpreter, mended where kernels compiled for a GPU are right, and made faster.

Of triton 3.6. Interpreting kernels is a third of what the suite takes.
"""

import dataclasses
from types import SimpleNamespace


def mend(interpreter):
    """Changes `triton.runtime.interpreter` for the rest of this process."""
    _mend_ranges(interpreter)
    _mend_dots(interpreter)
    _patch_once(interpreter)
    _trust_integers(interpreter)


def _mend_ranges(interpreter):
    """Loops over a range of loaded numbers: numpy 2.4 makes no int of an array of one element."""
    patch_tensor = interpreter._patch_lang_tensor

    class Scope:
        def __init__(self, scope):
            self.scope = scope

        def set_attr(self, owner, name, value):
            item = (lambda tensor: tensor.handle.data.item()) if name == "__index__" else value
            self.scope.set_attr(owner, name, item)

    interpreter._patch_lang_tensor = lambda tensor, scope: patch_tensor(tensor, Scope(scope))


def _mend_dots(interpreter):
    """Products of bfloat16: their bits, kept as integers, are multiplied as integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def float32(handle):
        if handle.dtype.scalar is not interpreter.tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *others: create_dot(
        self, float32(a), float32(b), *others
    )


def _patch_once(interpreter):
    """The language is searched for what to replace once, not by every call of every function.

    A launch replaces the members of the modules that a kernel sees; a function that it calls may
    see another one, and finds the others replaced. The end of the launch puts all back.
    """
    members = {}
    for module in (interpreter.tl, interpreter.tl.core):
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"language": module}))
        members[module] = [(owner, n, getattr(owner, n)) for owner, n, _ in scope._changes]
        scope.restore()
    launches = []

    class Launch(interpreter._LangPatchScope):
        def __init__(self):
            super().__init__()
            self.modules = set()
            launches.append(self)

        def restore(self):
            launches.remove(self)
            super().restore()

    def patch(fn):
        launch = launches[-1] if launches else Launch()
        for module, changes in members.items():
            if module not in launch.modules and any(v is module for v in fn.__globals__.values()):
                launch.modules.add(module)
                for change in changes:
                    launch.set_attr(*change)
        return launch

    interpreter._patch_lang = patch


def _trust_integers(interpreter):
    """No check of every sum of integers for overflow, which shapes this small cannot have."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
