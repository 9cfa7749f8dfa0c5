"""The layout of the package: who imports whom, and only through contracts. Files are parsed."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "blocktx"

# Each package or root module, after all that it may import.
IMPORTS: dict[str, str] = {
    "config": "",
    "files": "",
    "label_places": "",
    "plotting": "files label_places",
    "progress_bar": "",
    "chips": "",
    "cost": "config",
    "parallel": "config",
    "data": "config files",
    "ops": "config parallel",
    "model": "config parallel ops",
    "checkpoint": "config files data model",
    "decode": "config progress_bar parallel data model checkpoint",
    "evaluate": "config plotting progress_bar files parallel data model decode",
    "train": "config plotting progress_bar files chips cost parallel data ops model checkpoint "
    "decode evaluate",
    "benchmark": "config plotting progress_bar files chips cost parallel model decode train",
    "compile": "chips config cost parallel model decode train",
    "convert": "config model",
    "serve": "config model decode evaluate",
    "inspect_model": "config plotting progress_bar ops model",
    "lm_eval": "progress_bar parallel decode evaluate",
    "reproduce": "config plotting files chips cost parallel data ops model checkpoint decode "
    "evaluate train benchmark convert inspect_model",
    "command_line": "config files parallel",
}


def rooms() -> list[str]:
    """Names of the packages and root modules of blocktx."""
    found = [path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or is_package(path)]
    return sorted(set(found) - {"__init__"})


def is_package(path: pathlib.Path) -> bool:
    return (path / "__init__.py").exists()


def modules(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.rglob("*.py"))


def room_of(path: pathlib.Path) -> str:
    below = path.relative_to(PACKAGE)
    return below.parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, room and name of everything that a file imports from blocktx.

    The name is dotted, below the room, and empty for the room itself.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("blocktx."):
                    room, _, name = alias.name.removeprefix("blocktx.").partition(".")
                    yield node.lineno, room, name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            if module == "blocktx":
                for alias in node.names:
                    yield node.lineno, alias.name, ""
            elif module.startswith("blocktx."):
                room, _, rest = module.removeprefix("blocktx.").partition(".")
                for alias in node.names:
                    yield node.lineno, room, f"{rest}.{alias.name}" if rest else alias.name


def contract(room: str) -> set[str]:
    """Return the names in `__all__` of a package, or the public top-level names of a module."""
    if is_package(PACKAGE / room):
        for node in ast.parse((PACKAGE / room / "__init__.py").read_text()).body:
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
                return set(ast.literal_eval(node.value))
        return set()
    names = set()
    for node in ast.parse((PACKAGE / f"{room}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def where(path: pathlib.Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_the_table_names_every_room_in_an_order_without_circles():
    assert sorted(IMPORTS) == rooms()
    seen = set()
    for room, allowed in IMPORTS.items():
        assert set(allowed.split()) <= seen, room
        seen.add(room)


@pytest.mark.parametrize("room", IMPORTS)
def test_imports_follow_the_table(room):
    folder = PACKAGE / room
    files = modules(folder) if is_package(folder) else [PACKAGE / f"{room}.py"]
    allowed = {room, *IMPORTS[room].split()}
    wrong = [
        f"{where(path, line)}: {room} imports {other}"
        for path in files
        for line, other, _ in imports(path)
        if other not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def users() -> list[pathlib.Path]:
    """Files that are held to the contracts of the packages they use."""
    return [*modules(PACKAGE), *modules(ROOT / "launch"), *modules(ROOT / "configs")]


def test_other_packages_are_used_through_their_contracts():
    contracts = {room: contract(room) for room in IMPORTS}
    public = {"Engine", "generate", "load", "load_params"}
    wrong = []
    for path in users():
        own = room_of(path) if path.is_relative_to(PACKAGE) else ""
        for line, room, name in imports(path):
            if room == own or path == PACKAGE / "__init__.py" or not name:
                known = room in IMPORTS or (room in public and not name)
            else:
                known = name in contracts.get(room, ())
            if not known:
                wrong.append(f"{where(path, line)}: blocktx.{room} does not export {name!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", [room for room in IMPORTS if is_package(PACKAGE / room)])
def test_a_package_lists_its_files_and_exports_what_others_use(room):
    folder = PACKAGE / room
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert text.splitlines()[0].endswith("?"), f"{room}: the docstring opens with a question"
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.name}/" for path in folder.iterdir() if is_package(path)}
    missing = {name for name in files | folders if name not in text}
    assert not missing, f"{room}: __init__.py does not list {sorted(missing)}"


def test_modules_are_short():
    long = {
        str(path.relative_to(ROOT)): count
        for path in modules(PACKAGE)
        if (count := len(path.read_text().splitlines())) > 300
    }
    assert not long


def test_flax_linen_is_imported_in_models_alone():
    wrong = [
        where(path, node.lineno)
        for path in modules(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text()))
        if room_of(path) != "model"
        and isinstance(node, ast.Import)
        and any(alias.name == "flax.linen" for alias in node.names)
    ]
    assert not wrong


def test_importing_blocktx_loads_no_plots_and_no_kernels():
    code = (
        "import sys, blocktx; "
        "print([name for name in sys.modules if name.split('.')[0] == 'matplotlib' or "
        "name.startswith('jax.experimental.pallas') or name == 'grain'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_packages_are_attributes_after_import_blocktx_alone():
    code = (
        "import blocktx; blocktx.convert.load_official; blocktx.cost.count_params; "
        "blocktx.config.RunConfig; blocktx.checkpoint.load_params; blocktx.chips.CHIPS; "
        "blocktx.inspect_model; blocktx.model.build; blocktx.Engine"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
