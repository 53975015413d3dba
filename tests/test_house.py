"""The rules of the house: direction of imports, one identity per module, file lengths, versions, the wheel."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("dsl", "kernels", "passes", "kvcompile")  # each may import itself and what stands before it
LONGEST = 450


def sources(*folders: str) -> list[Path]:
    """The Python files under some folders of the root, links not followed."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if not _linked(path)]
    assert found
    return found


def _linked(path: Path) -> bool:
    return any(part.is_symlink() for part in path.parents if part != ROOT and ROOT in part.parents)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full module name of every import of a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the direction"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layer_of(module: str) -> int | None:
    """The rank of one of our modules; None for others."""
    head, _, rest = module.partition(".")
    if head != "kvcompile":
        return None
    second = rest.partition(".")[0]
    return LAYERS.index(second) if second in LAYERS[:-1] else len(LAYERS) - 1


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_go_one_way(folder: str) -> None:
    rank = LAYERS.index(folder)
    for path in sources(folder):
        for line, module in imports(path):
            layer = layer_of(module)
            # `from kvcompile import X` yields `kvcompile` too; inside a lower layer that is the lazy face.
            assert layer is None or layer <= rank, f"{path}:{line}: {folder} may not import {module}"


def test_modules_have_one_identity() -> None:
    for path in sources(*LAYERS, "examples", "tests", "benchmarks"):
        for line, module in imports(path):
            head = module.partition(".")[0]
            assert head not in LAYERS[:-1], f"{path}:{line}: write kvcompile.{module}"


def test_the_language_knows_neither_torch_nor_models() -> None:
    for path in sources("dsl"):
        for line, module in imports(path):
            assert module.partition(".")[0] not in {"torch", "transformers", "triton", "numpy"}, f"{path}:{line}"


def test_plans_are_read_without_torch() -> None:
    for path in (ROOT / "kernels" / "plan.py", ROOT / "kernels" / "errors.py", ROOT / "kernels" / "__init__.py"):
        assert not [module for _, module in imports(path) if module.partition(".")[0] == "torch"]


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources(*LAYERS, "examples", "tests", "benchmarks")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert not long


def test_modules_say_what_they_are() -> None:
    for path in sources(*LAYERS, "examples", "benchmarks"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    for path in sources(*LAYERS, "examples", "benchmarks"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not marks.search(line), f"{path}:{number}: {line.strip()}"


BACK_DOORS = {"pickle", "marshal", "socket", "urllib", "http", "requests", "httpx", "pytest", "tests"}


def test_no_back_doors() -> None:
    """The product runs no text that it was handed, opens no connection, and does not know that it is tested."""
    for path in sources(*LAYERS):
        text = path.read_text(encoding="utf-8")
        for line, module in imports(path):
            assert module.partition(".")[0] not in BACK_DOORS, f"{path}:{line}: imports {module}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "os.system", "torch.load"}, f"{path}:{node.lineno}: {called}"
                shell = [keyword for keyword in node.keywords if keyword.arg in {"shell", "trust_remote_code"}]
                assert not shell, f"{path}:{node.lineno}: {called} with {shell[0].arg}"
        assert "PYTEST" not in text, f"{path} looks for the tests"


def test_no_machine_is_named() -> None:
    for path in (*sources(*LAYERS, "examples", "tests", "benchmarks"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        assert f"{ROOT}/" not in path.read_text(encoding="utf-8"), f"{path} names a folder of this machine"


def test_named_pages_exist() -> None:
    named = re.compile(r"\b[\w/-]+\.md\b")
    depths = ("*.md", "*/*.md", "*/*/*.md")
    pages = {path.relative_to(ROOT).as_posix() for depth in depths for path in ROOT.glob(depth)}
    known = pages | {page.rpartition("/")[2] for page in pages}
    for path in (*sources(*LAYERS, "examples", "benchmarks"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        missing = set(named.findall(path.read_text(encoding="utf-8"))) - known - {"decode_cpu.md"}  # a result
        missing = {page for page in missing if not (path.parent / page).exists()}
        assert not missing, f"{path} names {missing}"


def test_links_lead_to_the_folders() -> None:
    for name in LAYERS[:-1]:
        link = ROOT / "kvcompile" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name


def test_public_names_are_not_modules() -> None:
    """A submodule of the same name would replace the function as soon as something imports it."""
    import kvcompile

    modules = {path.stem for path in (ROOT / "kvcompile").glob("*.py")}
    assert not modules & set(kvcompile.__all__)


def test_public_names_load() -> None:
    import kvcompile

    for name in kvcompile.__all__:
        assert getattr(kvcompile, name) is getattr(kvcompile, name)
    assert set(kvcompile.__all__) <= set(dir(kvcompile))
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        kvcompile.optimise  # noqa: B018


def test_versions_fit_together() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert sys.version_info >= (3, 11)
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    floors = {re.split(r"[<>=; ]", d)[0]: re.search(r">=([\d.]+)", d) for d in wanted}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert set(floors) <= set(pins), f"not pinned: {set(floors) - set(pins)}"
    for name, floor in floors.items():
        if floor:
            assert _number(pins[name]) >= _number(floor[1]), f"{name}: the pin is below the floor"
    makefile = (ROOT / "Makefile").read_text()
    assert f"torch=={pins['torch']}" in makefile


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


@pytest.mark.slow
def test_wheel_holds_every_file(tmp_path: Path) -> None:
    """Each Python file and data file of the four folders is in the wheel, as a real file, and nothing else is."""
    # A copy: a build in place leaves folders behind, and the next one would pack what they still hold.
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in (*LAYERS, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = set()
    for folder in LAYERS:
        for pattern in ("*.py", "*.kvp", "*.lark", "*.jinja", "*.json", "py.typed"):
            for path in (ROOT / folder).rglob(pattern):
                if not _linked(path):
                    place = path.relative_to(ROOT).as_posix()
                    wanted.add(place if folder == "kvcompile" else f"kvcompile/{place}")
    assert held == wanted
