"""The public names of TensorRT's and CUDA's Python modules, as JSON: the lists under tests/data.

    python tools/list_tensorrt_names.py tensorrt_rtx                            # a module that is installed
    python tools/list_tensorrt_names.py tensorrt_cu12_bindings-10.3.0-...whl    # a wheel; so cuda_bindings-*.whl
    python tools/list_tensorrt_names.py pycuda-2024.1.tar.gz                    # pycuda's sources

A wheel must fit the running Python. TensorRT's own libraries are not needed: each is replaced by one that
defines every symbol the extension asks for, which is enough to import it (numpy, gcc, nm and readelf are
needed). pycuda is not built: the preprocessor expands its wrapper and the names are read from that.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

Names = dict[str, set[str]]

CUDA_CALLS = re.compile(
    r"cu(Init$|DriverGetVersion$|GetError(String|Name)$|DeviceGet|DevicePrimaryCtx|Ctx|Mem|Stream|Event|Graph)"
    r"|CU(device|deviceptr|context|stream|event|graph|graphExec)$"
)
CUDA_ENUMS = re.compile(r"CUresult$|CU\w+_flags$|CUstreamCapture(Mode|Status)$")
PYCUDA_FLAGS = ["-DCUDAPP_CUDA_VERSION=12080", "-DCUDAPP_POST_30_BETA", "-DPY_VERSION_HEX=0x030b0000"]


def output(*command: str | Path, text: str = "") -> str:
    """Returns what a command prints. text: its standard input."""
    return subprocess.run(command, input=text, check=True, stdout=subprocess.PIPE, text=True).stdout


def public(thing: object) -> set[str]:
    """Returns the names that dir() shows, without those that an enum inherits from int and without imported
    modules."""
    inherited = set(dir(int)) if isinstance(thing, type) and issubclass(thing, int) else set()
    names = {name for name in set(dir(thing)) - inherited if not name.startswith("_")}
    return {name for name in names if not isinstance(getattr(thing, name, None), ModuleType)}


def walk(thing: object, prefix: str, names: Names) -> None:
    """Adds the names of every type of TensorRT's or CUDA's below a module or type."""
    for name in public(thing):
        value = getattr(thing, name)
        if isinstance(value, type) and value.__module__.partition(".")[0].startswith(("tensorrt", "cuda")):
            names[prefix + name] = public(value)
            walk(value, f"{prefix}{name}.", names)


def imported(module: str, how: str) -> dict:
    """Returns the document of a module that can be imported. how: in words, for the document."""
    loaded = importlib.import_module(module)
    version = sys.modules[module.rpartition(".")[0] or module].__version__
    names: Names = {"": public(loaded)}
    walk(loaded, "", names)
    if module.startswith("cuda"):
        names = {key: members for key, members in names.items() if CUDA_ENUMS.match(key)} | {"": names[""]}
        names[""] = {name for name in names[""] if CUDA_CALLS.match(name) or CUDA_ENUMS.match(name)}
    return {"module": module.removesuffix("_bindings"), "version": version, "how": how, "names": names}


def stub(extension: Path) -> None:
    """Builds stand-ins for the TensorRT libraries beside an extension, the first place of its search path."""
    needed = re.findall(r"NEEDED.*\[(lib(?:nv|tensorrt).*)\]", output("readelf", "-d", extension))
    undefined = re.findall(r" U (\w+)$", output("nm", "-D", "--undefined-only", extension), re.MULTILINE)
    code = "".join(f"long {name}(void) {{ return 0; }}\n" for name in undefined if not hasattr(ctypes.CDLL(None), name))
    for library in needed:
        output("gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", extension.parent / library, text=code)


def wheel(path: Path, folder: Path) -> dict:
    """Returns the document of a wheel of bindings, which is unpacked into the folder."""
    zipfile.ZipFile(path).extractall(folder)
    sys.path.insert(0, str(folder))
    if path.name.startswith("cuda"):
        sys.modules["cuda.pathfinder"] = SimpleNamespace(load_nvidia_dynamic_lib=None)
        return imported("cuda.bindings.driver", "imported with a stand-in for cuda.pathfinder")
    extension = next(folder.glob("tensorrt*_bindings/*.so"))
    stub(extension)
    return imported(extension.parent.name, "imported against stub libraries")


def boost(text: str, names: Names) -> None:
    """Adds the names that a Boost.Python wrapper registers. text: its source after the preprocessor."""
    of_type: dict[str, str] = {}
    current, kind = "", ""
    pattern = (
        r"typedef (?P<kind>[^;]+) cl;"
        r"|py::(?:class_|enum_)<(?P<arguments>[^;{]*?)>\s*\w*\s*\(\s*\"(?P<type>\w+)\""
        r"|(?:py|python)::(?:def\(|scope\(\)\.attr\()\s*\"(?P<function>\w+)\""
        r"|\.(?:def|def_readwrite|def_readonly|add_property|value|attr)\(\s*\"(?P<member>\w+)\""
        r"|void expose_(?P<shared>\w+)\(|expose_(?P<use>\w+)\(wrapper\)"
    )
    for match in re.finditer(pattern, text):
        if match["kind"]:
            kind = match["kind"]
        elif match["type"]:
            current = of_type[kind] = match["type"]
            names[""].add(current)
            base = re.search(r"py::bases<(\w+)", match["arguments"])
            names[current] = set(names[of_type[base[1]]]) if base else set()
        elif match["function"]:
            names[""].add(match["function"])
        elif match["shared"]:  # methods that several classes get from one template: kept under a name of their own
            current = "expose_" + match["shared"]
            names[current] = set()
        elif match["use"]:
            names[current] |= names["expose_" + match["use"]]
        else:
            names[current].add(match["member"])


def pycuda(path: Path, folder: Path) -> dict:
    """Returns the document of pycuda's sources, which are unpacked into the folder."""
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    root = next(folder.iterdir())
    names: Names = {"": set()}
    macros = (root / "src/wrapper/wrap_helpers.hpp").read_text()
    for source in ("wrap_cudadrv.cpp", "mempool.cpp"):
        text = re.sub(r"(?m)^\s*#\s*include.*$", "", macros + (root / "src/wrapper" / source).read_text())
        boost(output("gcc", "-E", "-P", "-x", "c++", *PYCUDA_FLAGS, "-", text=text), names)
    driver = (root / "pycuda/driver.py").read_text()
    names[""] |= set(re.findall(r"(?m)^(?:def|class) (\w+)", driver))
    for owner, name in re.findall(r"(?m)^ +([A-Z]\w+)\.(\w+) = ", driver):  # methods added in Python
        names[owner].add(name)
    shown = {
        key: {name for name in members if name[0] != "_"}
        for key, members in names.items()
        if not key.startswith("expose_")
    }
    how = "read from the sources, preprocessed for CUDA 12.8 without GL and CURAND"
    return {"module": "pycuda.driver", "version": path.name[7:].removesuffix(".tar.gz"), "how": how, "names": shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a module's name, a wheel of bindings, or pycuda's .tar.gz")
    source = parser.parse_args().source
    with tempfile.TemporaryDirectory() as folder:
        read = {".whl": wheel, ".gz": pycuda}.get(Path(source).suffix)
        document = read(Path(source), Path(folder)) if read else imported(source, "imported")
    names = {key: json.dumps(sorted(value)) for key, value in sorted(document.pop("names").items())}
    head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in document.items())
    lines = ",\n".join(f"    {json.dumps(key)}: {value}" for key, value in names.items())
    print(f'{{\n{head}  "names": {{\n{lines}\n  }}\n}}')


if __name__ == "__main__":
    main()
