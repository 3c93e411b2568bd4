"""Recipe: the ordered steps a model goes through, as YAML a person reads top to bottom.

    extends: default            # start from another recipe
    imports: [my_transforms.py] # modules or files that register transforms and ops
    steps: [...]                # or the steps themselves; a step may repeat under another id
    override: {cache: {...}}    # options of steps by id
    drop: [compile]             # steps to leave out
    insert:
      - {after: canonicalize, step: {transform: my_transform}}

An unknown key anywhere is an error that suggests the nearest one, and an order in which a step
misses a fact it needs is an error before any weight is read.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import RecipeError
from . import library as _library  # noqa: F401 - registers the shipped transforms
from .program import Fact
from .transform import TRANSFORMS, Transform

RECIPE_FOLDER = Path(__file__).resolve().parent.parent / "recipes"

_KEYS = ("description", "extends", "imports", "steps", "override", "drop", "insert")
_STEP_KEYS = ("id", "transform", "expect", "options")
CAPTURED_FACTS = frozenset({Fact.FUNCTIONAL, Fact.LAZY_WEIGHTS})


@dataclass(frozen=True)
class Step:
    """One transform with its options. `expect`: how many sites there must be, 0 for any."""

    id: str
    transform: Transform
    expect: int = 0


@dataclass(frozen=True)
class Recipe:
    """Resolved and validated steps."""

    name: str
    description: str
    steps: tuple[Step, ...]
    imports: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe, every option spelled out; loading it gives this recipe again."""
        steps = []
        for step in self.steps:
            entry: dict[str, Any] = {"id": step.id, "transform": step.transform.name}
            if step.expect:
                entry["expect"] = step.expect
            options = dataclasses.asdict(step.transform)
            if options:
                entry["options"] = options
            steps.append(entry)
        return {"description": self.description, "imports": list(self.imports), "steps": steps}

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))

    @property
    def digest(self) -> str:
        """Hex digest of the resolved recipe: part of the artifact cache's key."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()[:16]


def available_recipes() -> dict[str, str]:
    """Names and descriptions of the recipes that ship with autodeploy."""
    return {
        path.stem: str(_read(path).get("description", "")).strip()
        for path in sorted(RECIPE_FOLDER.glob("*.yaml"))
    }


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe = "default",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Recipe:
    """Reads, resolves and validates a recipe.

    source: a shipped recipe's name, a YAML file's path, or the same as a dict.
    overrides: options by step id, applied last.
    Raises:
        RecipeError: an unknown key, transform, step or option, or an impossible order.
    """
    if isinstance(source, Recipe):
        if not overrides:
            return source
        source = source.to_dict()
    name, raw, folder = _locate(source)
    raw = _resolve(name, raw, folder, seen=())
    if overrides:
        _override(name, raw["steps"], overrides)
    for module in raw["imports"]:
        _import(module)
    steps = tuple(_step(name, index, entry) for index, entry in enumerate(raw["steps"], 1))
    _check_ids(name, steps)
    check_order(name, steps)
    return Recipe(name, str(raw.get("description", "")).strip(), steps, tuple(raw["imports"]))


def check_order(name: str, steps: Iterable[Step]) -> None:
    """Raises RecipeError if a step needs a fact that does not hold where it stands."""
    facts = set(CAPTURED_FACTS)
    broken_by: dict[Fact, tuple[int, str]] = {}
    for index, step in enumerate(steps, 1):
        kind = type(step.transform)
        for fact in sorted(kind.needs, key=lambda f: f.name):
            if fact in facts:
                continue
            here = f"step '{step.id}' ({name}, step {index}) needs {fact.name}"
            if fact in broken_by:
                at, other = broken_by[fact]
                raise RecipeError(
                    f"{here}, which step '{other}' (step {at}) breaks; "
                    f"put '{step.id}' before '{other}'"
                )
            givers = sorted(n for n, t in TRANSFORMS.items() if fact in t.gives)
            raise RecipeError(f"{here}; put a step that gives it before: {', '.join(givers)}")
        facts |= kind.gives
        facts -= kind.breaks
        broken_by.update(dict.fromkeys(kind.breaks, (index, step.id)))


def suggest(key: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest known key, else the list of them."""
    known = list(known)
    near = difflib.get_close_matches(key, known, 1, 0.5)
    return (
        f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(sorted(known)) or 'none'}"
    )


def _locate(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any], Path]:
    if isinstance(source, Mapping):
        return "recipe", _plain(OmegaConf.create(dict(source)), "recipe"), Path.cwd()
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"recipe file '{path}' does not exist; give a name or a path")
        return path.name, _read(path), path.resolve().parent
    shipped = RECIPE_FOLDER / f"{source}.yaml"
    if not shipped.is_file():
        names = [p.stem for p in RECIPE_FOLDER.glob("*.yaml")]
        raise RecipeError(f"no recipe '{source}'{suggest(str(source), names)}")
    return shipped.name, _read(shipped), RECIPE_FOLDER


def _read(path: Path) -> dict[str, Any]:
    try:
        return _plain(OmegaConf.load(path), str(path))
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise RecipeError(f"recipe '{path}' cannot be read: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise RecipeError(f"recipe '{path}' is not YAML: {error}") from error
        raise


def _plain(config: Any, name: str) -> dict[str, Any]:
    value = OmegaConf.to_container(config, resolve=True)
    if not isinstance(value, dict):
        raise RecipeError(f"recipe '{name}' must be a mapping with the keys {', '.join(_KEYS)}")
    for key in value:
        if key not in _KEYS:
            raise RecipeError(
                f"recipe '{name}' has an unknown key '{key}'{suggest(str(key), _KEYS)}"
            )
    return {str(k): v for k, v in value.items()}


def _resolve(name: str, raw: dict[str, Any], folder: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    if name in seen:
        raise RecipeError(f"recipe '{name}' extends itself: {' -> '.join((*seen, name))}")
    base: dict[str, Any] = {"steps": [], "imports": []}
    if raw.get("extends"):
        parent = str(raw["extends"])
        if parent.endswith((".yaml", ".yml")):
            parent = str(folder / parent)
        parent_name, parent_raw, parent_folder = _locate(parent)
        base = _resolve(parent_name, parent_raw, parent_folder, (*seen, name))
    elif not raw.get("steps"):
        raise RecipeError(f"recipe '{name}' has neither 'steps' nor 'extends'")
    imports = [_absolute(str(module), folder) for module in raw.get("imports") or ()]
    steps = [_entry(name, e) for e in raw["steps"]] if raw.get("steps") else base["steps"]
    for change in raw.get("insert") or ():
        _insert(name, steps, change)
    for dropped in raw.get("drop") or ():
        steps.pop(_index(name, steps, str(dropped)))
    _override(name, steps, raw.get("override") or {})
    return {
        "description": raw.get("description", base.get("description", "")),
        "imports": [*base["imports"], *(m for m in imports if m not in base["imports"])],
        "steps": steps,
    }


def _entry(name: str, entry: Any) -> dict[str, Any]:
    """A step is a transform's name or a mapping; both become a full mapping."""
    if isinstance(entry, str):
        entry = {"transform": entry}
    if not isinstance(entry, Mapping) or "transform" not in entry:
        raise RecipeError(
            f"recipe '{name}': a step is a transform's name or has a 'transform' key, not {entry!r}"
        )
    for key in entry:
        if key not in _STEP_KEYS:
            raise RecipeError(
                f"recipe '{name}': step '{entry['transform']}' has an unknown key '{key}'"
                f"{suggest(str(key), _STEP_KEYS)}"
            )
    return {
        "id": str(entry.get("id", entry["transform"])),
        "transform": str(entry["transform"]),
        "expect": entry.get("expect", 0),
        "options": dict(entry.get("options") or {}),
    }


def _insert(name: str, steps: list[dict[str, Any]], change: Any) -> None:
    if not isinstance(change, Mapping) or "step" not in change or len(set(change) - {"step"}) != 1:
        raise RecipeError(f"recipe '{name}': 'insert' takes {{after: ID or before: ID, step: ...}}")
    (side,) = set(change) - {"step"}
    if side not in ("after", "before"):
        raise RecipeError(
            f"recipe '{name}': 'insert' has an unknown key '{side}'"
            f"{suggest(side, ('after', 'before'))}"
        )
    at = _index(name, steps, str(change[side])) + (side == "after")
    steps.insert(at, _entry(name, change["step"]))


def _override(name: str, steps: list[dict[str, Any]], changes: Mapping[str, Any]) -> None:
    for step_id, options in changes.items():
        if not isinstance(options, Mapping):
            raise RecipeError(
                f"recipe '{name}': override of '{step_id}' must be a mapping of options"
            )
        entry = steps[_index(name, steps, str(step_id))]
        entry["options"] = {**entry["options"], **options}


def _index(name: str, steps: list[dict[str, Any]], step_id: str) -> int:
    ids = [entry["id"] for entry in steps]
    if step_id not in ids:
        raise RecipeError(f"recipe '{name}' has no step '{step_id}'{suggest(step_id, ids)}")
    return ids.index(step_id)


def _step(name: str, index: int, entry: dict[str, Any]) -> Step:
    where = f"recipe '{name}', step {index} ('{entry['id']}')"
    kind = TRANSFORMS.get(entry["transform"])
    if kind is None:
        raise RecipeError(
            f"{where}: no transform '{entry['transform']}'{suggest(entry['transform'], TRANSFORMS)}"
        )
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for option, value in entry["options"].items():
        if option not in fields:
            raise RecipeError(f"{where}: unknown option '{option}'{suggest(str(option), fields)}")
        _check_type(where, option, value, fields[option])
    expect = entry["expect"]
    if type(expect) is not int or expect < 0:
        raise RecipeError(f"{where}: 'expect' must be a count of sites, not {expect!r}")
    return Step(entry["id"], kind(**{k: _frozen(v) for k, v in entry["options"].items()}), expect)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_type(where: str, option: str, value: Any, field: dataclasses.Field[Any]) -> None:
    default = field.default
    if default is dataclasses.MISSING or default is None:
        return
    expected: tuple[type, ...] = (list, tuple) if isinstance(default, tuple) else (type(default),)
    if isinstance(default, float):
        expected = (int, float)
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        raise RecipeError(
            f"{where}: option '{option}' must be {expected[0].__name__}, not {value!r}"
        )


def _check_ids(name: str, steps: tuple[Step, ...]) -> None:
    ids = [step.id for step in steps]
    for step_id in ids:
        if ids.count(step_id) > 1:
            raise RecipeError(f"recipe '{name}' has two steps '{step_id}'; give one another 'id'")


def _absolute(module: str, folder: Path) -> str:
    return str((folder / module).resolve()) if module.endswith(".py") else module


def _import(module: str) -> None:
    """Imports a module by name, or a file once under a name made from its path."""
    try:
        if not module.endswith(".py"):
            importlib.import_module(module)
            return
        name = "autodeploy_import_" + hashlib.sha256(module.encode()).hexdigest()[:12]
        if name in sys.modules:
            return
        spec = importlib.util.spec_from_file_location(name, module)
        if spec is None or spec.loader is None:
            raise RecipeError(f"recipe import '{module}' is not a Python file")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[name]
            raise
    except (ImportError, OSError) as error:
        raise RecipeError(f"recipe import '{module}' failed: {error}") from error
