"""The thin Flower app and the environment that Flower's programs get."""

import shutil
from pathlib import Path

from medlsdm.federation.app import build_archive, flower_environment


def test_flowers_own_programs_are_found_without_an_activated_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    environment = flower_environment(tmp_path)
    for name in ("flower-superexec", "flwr-clientapp", "flwr-serverapp"):
        assert shutil.which(name, path=environment["PATH"]), name
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_HOME"] == str(tmp_path)


def test_both_sides_build_the_same_archive_and_it_holds_no_code(tmp_path):
    import zipfile

    built = []
    for side in ("one", "two"):
        folder = tmp_path / side
        folder.mkdir()
        built.append(build_archive(folder, folder / "flwr"))
    assert built[0].name == built[1].name
    assert built[0].read_bytes() == built[1].read_bytes()
    with zipfile.ZipFile(built[0]) as archive:
        python = [n for n in archive.namelist() if n.endswith(".py")]
        assert [Path(n).name for n in python] == ["__init__.py"]
        assert b"import" not in archive.read(python[0])
