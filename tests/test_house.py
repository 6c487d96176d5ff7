"""The rules that the house keeps: who imports whom, what starts fast, how large a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune import errors
from edgeprune.engine.remote import DEVICE_FILES

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "edgeprune").rglob("*.py"))
ROOMS = {
    # what a room may import from edgeprune, besides itself and the ground floor
    "cli": {
        "measuring",
        "loop",
        "shipping",
        "compare",
        "generation",
        "drawing",
        "pictures",
        "progress",
        "log",
        "report",
        "picking",
        "options",
        "looking",
        "request",
        "reading",
    },
    "looking": {"doctor", "model", "options", "plan", "profiles", "report"},
    "request": {"model"},
    "samples": {"imaging", "model", "pruning", "request"},
    "imaging": {"engine", "evaluate", "model", "pictures", "pruning", "request"},
    "drawing": {"bundle", "engine", "generation", "imaging", "model", "pictures", "progress"},
    "gallery": {"drawing", "engine", "evaluate", "imaging", "journal", "pictures", "prepare", "progress", "results"},
    "provenance": {"prepare", "request"},
    "options": set(),
    "loop": {
        "results",
        "prepare",
        "shipping",
        "journal",
        "progress",
        "search",
        "evaluation",
        "engine",
        "pruning",
        "budget",
        "picking",
        "planning",
        "request",
        "stations",
    },
    "stations": {
        "results",
        "prepare",
        "journal",
        "progress",
        "engine",
        "pruning",
        "model",
        "generation",
        "drawing",
        "overflow",
        "sensitivities",
        "vocabularies",
    },
    "planning": {"journal", "prepare", "progress", "search", "engine", "pruning"},
    "vocabularies": {"results", "progress", "evaluate", "model"},
    "results": {"budget", "engine", "model", "prepare", "search"},
    "deployment": {"budget", "engine", "results"},
    "finish": {"budget", "bundle", "engine"},
    "measuring": {"report", "engine", "finish", "prepare", "progress", "reading"},
    "shipping": {
        "results",
        "deployment",
        "drawing",
        "experience",
        "finish",
        "bundle",
        "report",
        "engine",
        "budget",
        "model",
        "profiles",
        "prepare",
        "provenance",
        "readme",
        "reading",
        "request",
        "exports",
    },
    "reading": {"bundle", "report"},
    "readme": {"finish", "report"},
    "picking": {
        "results",
        "deployment",
        "finish",
        "bundle",
        "report",
        "engine",
        "budget",
        "profiles",
        "progress",
        "provenance",
        "reading",
        "readme",
        "shipping",
    },
    "compare": {
        "prepare",
        "progress",
        "evaluate",
        "pruning",
        "model",
        "engine",
        "generation",
        "drawing",
        "imaging",
        "request",
        "samples",
        "sensitivities",
    },
    "overflow": {"model"},
    "exports": {"model"},
    "sensitivities": {"pruning", "model", "cache", "progress"},
    "prepare": {
        "engine",
        "pruning",
        "model",
        "profiles",
        "budget",
        "bundle",
        "search",
        "exports",
        "imaging",
        "request",
        "samples",
    },
    "generation": {"bundle", "engine", "model", "progress"},
    "doctor": {"engine"},
    "pictures": {"engine"},
    "search": {"pruning"},
    "plan": {"engine", "model", "profiles"},
    "report": {"budget", "engine", "compare", "doctor", "profiles", "plan"},
    "evaluate": {"model"},
    "experience": {"budget", "engine", "model", "profiles"},
    "evaluation": {"evaluate", "engine", "gallery", "generation", "journal", "model", "prepare", "progress", "results"},
    "engine": {"model", "profiles", "cache"},
    "pruning": {"model"},
    "model": {"cache"},
    "budget": {"engine"},
    "profiles": set(),
    "bundle": set(),
    "journal": set(),
    "progress": set(),
    "log": set(),
    "cache": set(),
    "errors": set(),
}
DEVICE_SIDE = {name.removesuffix(".py").replace("/", ".") for name in DEVICE_FILES}
NEWER_THAN_3_10 = ("file_digest", "UTC", "tomllib", "ExceptionGroup", "Self", "StrEnum", "TaskGroup", "chdir")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "edgeprune").parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    """Modules of edgeprune that a file imports, as dotted paths below the package."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("edgeprune"):
            below = node.module.removeprefix("edgeprune").removeprefix(".")
            package = (ROOT / "edgeprune" / below.replace(".", "/")).is_dir()
            names = [alias.name for alias in node.names]
            found += [f"{below}.{name}".removeprefix(".") for name in names] if package else [below]
        elif isinstance(node, ast.Import):
            found += [a.name.removeprefix("edgeprune.") for a in node.names if a.name.startswith("edgeprune.")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports(ast.parse(path.read_text())):
        target = name.split(".")[0]
        if target not in (room, "errors", "__version__"):
            assert target in ROOMS[room], f"{room} imports {target}"
        if str(path.relative_to(ROOT / "edgeprune")) in DEVICE_FILES:
            assert name in {*DEVICE_SIDE, "__version__"}, f"the device side imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_small_and_keep_the_manners(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    tree = ast.parse(text)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: an assert stands for an error"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "eval", "exec"), f"line {node.lineno}: {node.func.id}"
        if isinstance(node, ast.keyword) and node.arg == "shell":
            pytest.fail(f"line {node.value.lineno}: shell")
    if path.stem != "__init__" or text:
        assert ast.get_docstring(tree), "a module says what it does"


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


@pytest.mark.parametrize("name", DEVICE_FILES)
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
        known = {*sys.stdlib_module_names, "edgeprune", "numpy", "onnxruntime", "platformdirs"}
        assert roots <= known, f"line {node.lineno}: the device has no {roots - known}"


def test_every_error_kind_has_an_exit_code_and_a_remedy():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not errors.EdgepruneError]
    assert {kind.__name__: kind.exit_code for kind in kinds} == {
        "InputError": 2,
        "NumericalError": 2,
        "BudgetError": 3,
        "EngineError": 4,
        "WrongEngine": 4,
        "Unreachable": 4,
    }
    for kind in kinds:
        with pytest.raises(TypeError):
            kind("no remedy")


def test_every_raised_error_has_a_remedy():
    names = {"InputError", "NumericalError", "BudgetError", "EngineError", "WrongEngine", "Unreachable"}
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
