"""The walls of the design, checked on the source itself: who imports whom, and what must appear nowhere."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medlsdm.errors import NotSyntheticError
from medlsdm.sharing.gate import audit, check_synthetic
from medlsdm.types import Geometry, LabelClass, LabelSchema, Modality, Provenance, Scan, SemanticMap, SyntheticVolume

REPO = Path(__file__).parents[2]
PACKAGES = {
    "medlsdm": REPO / "medlsdm",
    "deid_tools": REPO / "deid_tools",
    "medlsdm_node": REPO / "node" / "medlsdm_node",
    "medlsdm_server": REPO / "server" / "medlsdm_server",
}
OPEN_TO_DEID = {"medlsdm.types", "medlsdm.errors", "medlsdm.checks", "medlsdm.volumes", "medlsdm.terminal"}
FORBIDDEN = {
    "medlsdm": {"deid_tools", "pydicom", "highdicom", "deid", "flwr", "medlsdm_node", "medlsdm_server"},
    "deid_tools": {"torch", "flwr", "opacus", "medlsdm_node", "medlsdm_server", "deid"},
    "medlsdm_node": {"medlsdm_server", "opacus", "deid"},
    "medlsdm_server": {"medlsdm_node", "deid_tools", "pydicom", "highdicom", "opacus", "deid"},
}
EVERYWHERE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            yield package, path, ast.parse(path.read_text(encoding="utf-8"), str(path))


SOURCES = list(sources())


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield every imported name in full, whether at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def inside(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def test_there_is_source_to_check():
    assert {package for package, _, _ in SOURCES} == set(PACKAGES)
    assert len(SOURCES) > 20


def test_packages_import_only_whom_the_design_allows():
    wrong = []
    for package, path, tree in SOURCES:
        for line, name in imports(tree):
            banned = FORBIDDEN[package] | EVERYWHERE
            if package == "medlsdm" and path.is_relative_to(PACKAGES["medlsdm"] / "federation" / "flower_app"):
                banned = banned - {"flwr", "medlsdm_node", "medlsdm_server"}
            if package == "deid_tools" and path.stem == "engine":
                banned = banned - {"deid"}
            closed = package == "deid_tools" and inside(name, {"medlsdm"}) and not inside(name, OPEN_TO_DEID)
            if inside(name, banned) or (closed and name not in ("medlsdm", "medlsdm.__version__")):
                wrong.append(f"{path.relative_to(REPO)}:{line} imports {name}")
    assert wrong == []


def test_opacus_is_imported_only_in_privacy():
    users = {p for _, p, tree in SOURCES for _, name in imports(tree) if inside(name, {"opacus"})}
    assert all(p.is_relative_to(REPO / "medlsdm" / "privacy") for p in users)


def test_privacy_and_sharing_stay_light():
    for _, path, tree in SOURCES:
        if any(path.is_relative_to(REPO / "medlsdm" / part) for part in ("privacy", "sharing")):
            assert not [name for _, name in imports(tree) if inside(name, {"torch"})], path


def names_in(tree: ast.Module) -> set[str]:
    """Return every identifier: names, attributes, imported names and text that could be given to getattr."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return found


def test_the_synthesis_seal_is_used_only_where_volumes_are_made():
    users = {path.relative_to(REPO).as_posix() for _, path, tree in SOURCES if "SYNTHESIS_SEAL" in names_in(tree)}
    assert users == {"medlsdm/types.py", "medlsdm/synthesis.py"}


def test_only_the_vault_restores_synthetic_volumes():
    def restores(tree: ast.Module) -> bool:
        aliased = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom | ast.Import)
                   for a in n.names if a.name in ("synthesis", "medlsdm.synthesis")}  # fmt: skip
        through = any(
            isinstance(n, ast.Attribute) and n.attr == "restore" and (ast.unparse(n.value) in aliased)
            for n in ast.walk(tree)
        )
        return through or any(name in ("medlsdm.synthesis.restore", "medlsdm.synthesis.*") for _, name in imports(tree))

    users = {path.relative_to(REPO).as_posix() for _, path, tree in SOURCES if restores(tree)}
    assert users <= {"node/medlsdm_node/vault.py"}


def test_only_sharing_replaces_fields_of_a_sealed_volume():
    """``dataclasses.replace`` keeps the seal: in the packages that handle volumes it belongs to the bundle."""
    users = {
        path.relative_to(REPO).as_posix()
        for _, path, tree in SOURCES
        if "SyntheticVolume" in names_in(tree) and any(n == "dataclasses.replace" for _, n in imports(tree))
    }
    assert users == {"medlsdm/sharing/bundle.py"}


def test_nothing_unpickles_and_torch_load_is_never_called():
    wrong = []
    for _, path, tree in SOURCES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save", "numpy.load"):
                wrong.append(f"{path.relative_to(REPO)}:{node.lineno} {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                wrong.append(f"{path.relative_to(REPO)}:{node.value.lineno} allow_pickle")
    assert wrong == []


def test_no_error_is_swallowed_in_silence():
    wrong = []
    for _, path, tree in SOURCES:
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                silent = all(isinstance(s, ast.Pass) or ast.unparse(s) == "..." for s in node.body)
                if node.type is None or silent:
                    wrong.append(f"{path.relative_to(REPO)}:{node.lineno}")
    assert wrong == []


def test_the_library_prints_nothing():
    allowed = {"terminal.py", "cli.py"}
    wrong = [
        f"{path.relative_to(REPO)}:{node.lineno}"
        for package, path, tree in SOURCES
        if package == "medlsdm" and path.name not in allowed
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module",
    ["deid_tools", "deid_tools.cli", "medlsdm.cli", "medlsdm.sharing.bundle", "medlsdm_node.cli", "medlsdm_server.cli"],
)
def test_starting_a_program_does_not_load_torch(module: str):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there yet")
    code = f"import sys, {module}; print(sorted({{'torch', 'flwr'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "torch" not in done.stdout


def test_ruff_catches_a_forbidden_import(tmp_path: Path):
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    for folder, banned in (("deid_tools", "torch"), ("medlsdm", "pydicom"), ("server", "deid_tools"),
                           ("node", "medlsdm_server")):  # fmt: skip
        (tmp_path / folder).mkdir()
        shutil.copy(REPO / folder / "ruff.toml", tmp_path / folder)
        (tmp_path / folder / "forbidden.py").write_text(f'"""Test."""\n\nimport {banned}\n\nprint({banned})\n')
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=json", "."],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    found = {(Path(row["filename"]).parent.name, row["code"]) for row in json.loads(done.stdout)}
    assert {(folder, "TID251") for folder in ("deid_tools", "medlsdm", "server", "node")} <= found


SNIPPET = """\
from medlsdm.sharing.gate import AuditReport, audit
from medlsdm.types import Scan, SemanticMap, SyntheticVolume
def leave(scan: Scan, volume: SyntheticVolume, labels: SemanticMap) -> AuditReport:
    audit([volume], [labels], lambda: iter([(scan, labels)]))
    return audit([scan], [labels], lambda: iter([(scan, labels)]))
"""


def test_exporting_a_scan_is_a_type_error(tmp_path: Path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    project = tmp_path / "pyrightconfig.json"
    settings = {"include": ["snippet.py"], "extraPaths": [str(REPO), str(REPO / "node")], "typeCheckingMode": "basic"}
    project.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(project)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert [(d["rule"], d["range"]["start"]["line"]) for d in found] == [("reportArgumentType", 4)]


def test_exporting_a_scan_fails_at_run_time():
    geometry, schema = Geometry(np.eye(4), (4, 4, 4)), LabelSchema("s", (LabelClass(0, "background"),))
    scan = Scan(np.zeros((4, 4, 4)), geometry, Modality.MR, "p")
    labels = SemanticMap(np.zeros((4, 4, 4), np.uint8), geometry, schema)
    for call in (lambda: check_synthetic([scan], [labels]), lambda: audit([scan], [labels], lambda: iter([]))):  # type: ignore[list-item]
        with pytest.raises(NotSyntheticError):
            call()
    with pytest.raises(NotSyntheticError):
        SyntheticVolume(scan.array, geometry, Modality.MR, Provenance("a", "b", "c", 1))
