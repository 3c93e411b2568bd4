"""What holds for the source as a whole: public names, import directions, no model by name."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import autodeploy
from autodeploy import errors

PACKAGE = Path(autodeploy.__file__).resolve().parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_the_public_names_are_these():
    assert sorted(autodeploy.__all__) == [
        "AsyncLLM", "BeamSearchParams", "CompletionOutput", "DeployConfig",
        "EmbeddingRequestOutput", "LLM", "RequestOutput", "SamplingParams",
        "StructuredOutputsParams", "deploy",
    ]  # fmt: skip
    for name in autodeploy.__all__:
        assert getattr(autodeploy, name).__name__ == name


def test_importing_autodeploy_imports_nothing_heavy():
    code = "import sys, autodeploy; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert out.stdout.split() == ["False", "False"]


def test_every_error_is_in_the_tree_that_its_module_draws():
    drawn = set(re.findall(r"\b(\w+Error)\b", errors.__doc__))
    defined = {n for n, v in vars(errors).items() if isinstance(v, type)}
    assert drawn - {"ValueError"} == defined
    assert all(issubclass(getattr(errors, n), errors.AutodeployError) for n in defined)


def imported_parts(path):
    """Absolute names of the modules of this package that a file imports."""
    tree = ast.parse(path.read_text())
    home = ["autodeploy", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level] if node.level else []
            if path.name == "__init__.py" and node.level:
                base = home[: len(home) - node.level]
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield prefix
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


PARTS = ("custom_ops", "transforms", "runtime")
ALLOWED = {
    "custom_ops": {"custom_ops", "errors"},
    "transforms": {"custom_ops", "transforms", "errors"},
    "runtime": {"custom_ops", "runtime", "errors"},
}


@pytest.mark.parametrize("part", PARTS)
def test_imports_point_one_way(part):
    for path in sorted((PACKAGE / part).rglob("*.py")):
        for name in imported_parts(path):
            pieces = name.split(".")
            if pieces[0] == "autodeploy" and len(pieces) > 1:
                assert pieces[1] in ALLOWED[part], f"{path.relative_to(PACKAGE)} imports {name}"


def test_nothing_outside_the_zoo_knows_a_model_by_name():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    kinds = {k for k in NAMES if len(k) > 3} | set(NAMES.values())
    # Words that are an architecture's name and something else besides.
    kinds -= {"whisper", "prophetnet", "reformer"}
    for path in SOURCES:
        if path.is_relative_to(PACKAGE / "zoo") or path.is_relative_to(PACKAGE / "bench"):
            continue
        tree = ast.parse(path.read_text())
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
            and isinstance(node.body[0], ast.Expr)
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in documentation:
                assert node.value not in kinds, f"{path}:{node.lineno} names {node.value!r}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("model_type", "architectures"), f"{path}:{node.lineno}"


def test_no_file_is_much_too_long():
    for path in SOURCES:
        lines = len(path.read_text().splitlines())
        assert lines <= 520, f"{path.relative_to(PACKAGE)} has {lines} lines"


def test_the_top_level_shows_the_three_parts():
    for part in PARTS:
        link = PACKAGE.parent / part
        assert link.is_symlink()
        assert link.resolve() == PACKAGE / part
