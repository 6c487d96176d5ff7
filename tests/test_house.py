"""The rules that the house keeps: who imports whom, what starts fast, how large a file may be."""

import ast
import contextlib
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from edgeprune import errors
from edgeprune.engine import remote as device_remote

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "edgeprune").rglob("*.py"))
# A package imports from further right only; those in one tuple never import each other.
ORDER = (
    ("cli",),
    ("commands",),
    ("bundle",),
    ("report",),
    ("pipeline",),
    ("search",),
    ("generate", "evaluate", "pruning", "engine"),
    ("model", "ondevice"),
    ("errors", "files", "cache", "chats", "dialects", "precision", "progress", "log", "profiles"),
)
GROUND = ORDER[-1]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
ON_DEVICE = {name.removesuffix(".py") for name in device_remote.GROUND}  # all that ondevice/ finds beside itself
ELLIPTIC = ("What ", "Where ", "How ", "Whether ", "Of ", "The same ")
NEWER_THAN_3_10 = ("file_digest", "UTC", "tomllib", "ExceptionGroup", "Self", "StrEnum", "TaskGroup", "chdir")


def module_of(path: Path) -> str:
    """edgeprune/model/load.py -> model.load, relative to the package."""
    return ".".join(path.relative_to(ROOT / "edgeprune").with_suffix("").parts)


MODULES = {module_of(path): path for path in FILES}


def imports(tree: ast.AST) -> list[tuple[str, str]]:
    """Modules of edgeprune that a file imports from, relative to the package, each with the imported name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "edgeprune":
            below = node.module.removeprefix("edgeprune").removeprefix(".")
            found += [(below, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("edgeprune.")]
            found += [(name.removeprefix("edgeprune."), "") for name in names]
    return found


def imported_modules(tree: ast.AST) -> set[str]:
    """The same as modules: of `from package import module` the module."""
    return {
        submodule if (submodule := f"{below}.{name}".strip(".")) in MODULES else below for below, name in imports(tree)
    } - {"", "__version__"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_flow_one_way(module):
    package = module.split(".")[0]
    if package == "__init__":
        return
    assert package in RANK, f"{package} stands at the top of the house, and the order does not know it"
    for imported in imported_modules(ast.parse(MODULES[module].read_text())):
        target = imported.split(".")[0]
        if target != package:
            both_ground = package in GROUND and target in GROUND
            assert RANK[target] > RANK[package] or both_ground, f"{package} imports {imported}"
            assert package != "ondevice" or target in ON_DEVICE, f"{imported} does not travel to the device"


def test_no_module_imports_itself_in_a_circle():
    graph = {module: imported_modules(ast.parse(path.read_text())) - {module} for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def texts_of_code():
    """Every file of ours that names our modules, and the strings in them that are programs."""
    for folder in ("edgeprune", "tools", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            yield path, tree
            for node in ast.walk(tree):
                text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
                if "import edgeprune" in text or "from edgeprune" in text:
                    with contextlib.suppress(SyntaxError):
                        yield path, ast.parse(text)


@cache
def names_of(module: str) -> set[str]:
    """What can be imported from a module: its own names, and the modules of a package."""
    is_package = module == "" or (ROOT / "edgeprune" / module.replace(".", "/")).is_dir()
    path = ROOT / "edgeprune" / module.replace(".", "/") / "__init__.py" if is_package else MODULES[module]
    found = {other.rsplit(".", 1)[-1] for other in MODULES if is_package and other.rpartition(".")[0] == module}
    found |= {p.name for p in path.parent.iterdir() if is_package and (p / "__init__.py").is_file()}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    exported = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return found.union(*(ast.literal_eval(node.value) for node in exported))


def test_every_imported_name_exists():
    packages = {module.rpartition(".")[0] for module in MODULES} | {""}
    for path, tree in texts_of_code():
        for module, name in imports(tree):
            assert module in MODULES or module in packages, f"{path}: no module {module}"
            if name:
                assert name in names_of(module), f"{path}: {module} has no {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_small_and_keep_the_manners(path):
    text = path.read_text()
    assert text.count("\n") <= 520
    tree = ast.parse(text)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: an assert stands for an error"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "eval", "exec"), f"line {node.lineno}: {node.func.id}"
        if isinstance(node, ast.keyword) and node.arg == "shell":
            pytest.fail(f"line {node.value.lineno}: shell")
    if path.stem != "__init__" or text:
        assert ast.get_docstring(tree), "a module says what it does"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (doc := ast.get_docstring(node)):
            assert not doc.startswith(ELLIPTIC), (
                f"{doc.splitlines()[0]!r}: a docstring begins with its verb or its noun"
            )
    assert "fmt: " + "skip" not in text, "the formatter formats"


@pytest.mark.parametrize(
    "command",
    [
        "import edgeprune, edgeprune.commands.fit",
        "from edgeprune.cli.app import main; sys.argv = ['edgeprune', '--help']; main()",
        "from edgeprune.cli.app import main; sys.argv = ['edgeprune', 'devices']; main()",
        "import edgeprune.ondevice.tensorrt, edgeprune.ondevice.onnxruntime, edgeprune.ondevice.timing",
    ],
)
def test_it_starts_without_torch(command):
    code = (
        f"import sys\ntry:\n    exec({command!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'tensorrt_rtx'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


@pytest.mark.parametrize("name", device_remote.device_files())
def test_the_device_side_is_python_3_10_and_little_else(name):
    tree = ast.parse((ROOT / "edgeprune" / name).read_text(), feature_version=(3, 10))
    for node in ast.walk(tree):
        used = {getattr(node, field, None) for field in ("id", "attr", "name")}
        assert not used & set(NEWER_THAN_3_10), f"line {node.lineno}: Python 3.10 has no {used}"
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots = {node.module.split(".")[0]}
        else:
            continue
        known = {*sys.stdlib_module_names, "edgeprune", "numpy", "onnxruntime", "platformdirs", "xllamacpp"}
        known |= {"tokenizers", "jinja2"}  # of serve.pyz
        assert roots <= known, f"line {node.lineno}: the device has no {roots - known}"


def test_every_error_kind_has_an_exit_code_and_a_remedy():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not errors.EdgepruneError]
    assert {kind.__name__: kind.exit_code for kind in kinds} == {
        "InputError": 2,
        "NumericalError": 2,
        "BusyError": 2,
        "BudgetError": 3,
        "EngineError": 4,
        "WrongEngine": 4,
        "Unreachable": 4,
        "BadAnswer": 4,
    }
    for kind in kinds:
        with pytest.raises(TypeError):
            kind("no remedy")


def test_every_raised_error_has_a_remedy():
    names = {kind for kind, value in vars(errors).items() if isinstance(value, type)}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                assert len(node.args) == 2, f"{path.name}, line {node.lineno}"


def test_the_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    for word in ("make demo", "make test"):
        assert word in text
        assert word.split()[1] in targets
    from edgeprune.cli.app import app

    commands = {command.callback.__name__ for command in app.registered_commands}
    used = {line.split()[1] for line in text.splitlines() if line.startswith("edgeprune ")}
    assert used
    assert used <= commands
