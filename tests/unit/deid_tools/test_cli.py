from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from deid_tools.config_files import schema_file
from deid_tools.keys import SiteKeys
from medlsdm.config import load_schema
from medlsdm.errors import ConfigError
from medlsdm.types import LabelSchema


def call(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from deid_tools.cli import main; main()"
    environment = {**os.environ, "XDG_DATA_HOME": str(home), "PATH": "/nonexistent"}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


def test_run_and_verify(study, tmp_path):
    done = call("run", str(study.source), str(tmp_path / "out"), "--json", home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["series"]) == 1
    assert report["quarantined"] == []
    assert not any(token in done.stdout + done.stderr for token in study.tokens)
    key = tmp_path / "home" / "medlsdm" / "deid.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(bytes.fromhex(key.read_text())) == 32
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    checked = call("verify", str(tmp_path / "out"), "--json", home=tmp_path / "home")
    files = sum(path.is_file() for path in (tmp_path / "out").rglob("*"))
    expected = {"clean": True, "files": files, "findings": [], "notes": []}
    assert (checked.returncode, json.loads(checked.stdout)) == (0, expected)
    assert files > 3
    assert call("verify", str(tmp_path / "out"), home=tmp_path).stdout == f"clean: {files} files checked\n"
    (tmp_path / "out" / "note.txt").write_text("x")
    assert call("verify", str(tmp_path / "out"), home=tmp_path / "home").returncode == 10


def test_the_output_of_a_stopped_run_is_not_clean_until_it_went_on(study, tmp_path):
    out = tmp_path / "out"
    assert call("run", str(study.source), str(out), home=tmp_path / "home").returncode == 0
    report = json.loads((out / "report.json").read_text())
    mark = {part: report[part] for part in ("program", "recipe_sha256", "key_id", "pixel_policy")}
    (out / "report.json").write_text(json.dumps({**mark, "finished": False}))  # as a run writes when it starts
    done = call("verify", str(out), home=tmp_path)
    assert done.returncode == 10
    assert "report.json: the run that writes this folder is not finished; run it again" in done.stdout
    assert "1 finding: " in done.stdout
    assert done.stderr.startswith("medlsdm-deid: The run is not finished. Run it again into this folder")
    asked = call("verify", str(out), "--json", home=tmp_path)
    assert (asked.returncode, json.loads(asked.stdout)["clean"]) == (10, False)
    assert call("run", str(study.source), str(out), home=tmp_path / "home").returncode == 0
    assert call("verify", str(out), home=tmp_path).returncode == 0


def test_a_folder_without_a_report_is_checked_all_the_same(study, tmp_path):
    out = tmp_path / "out"
    assert call("run", str(study.source), str(out), home=tmp_path / "home").returncode == 0
    (out / "report.json").unlink()
    assert call("verify", str(out), home=tmp_path).returncode == 0


def test_nothing_passed_is_exit_10_with_the_reasons(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "note.txt").write_text("hello")
    done = call("run", str(source), str(tmp_path / "out"), home=tmp_path / "home")
    assert done.returncode == 10
    assert "1 x the file is not DICOM" in done.stderr
    assert call("run", str(tmp_path / "absent"), str(tmp_path / "out"), home=tmp_path / "home").returncode == 3


def test_a_key_that_others_may_read_is_refused(study, tmp_path):
    key = tmp_path / "key"
    key.write_text("00" * 32)
    key.chmod(0o644)
    done = call("run", str(study.source), str(tmp_path / "out"), "--key", str(key), home=tmp_path)
    assert done.returncode == 4
    assert "00" * 32 not in done.stderr


def test_a_new_key_is_said_once_with_its_place(study, tmp_path):
    arguments = ("run", str(study.source), str(tmp_path / "out"), "--json")
    first, second = call(*arguments, home=tmp_path / "home"), call(*arguments, home=tmp_path / "home")
    key = tmp_path / "home" / "medlsdm" / "deid.key"
    (line,) = [row for row in first.stderr.splitlines() if "key" in row]
    assert f"a new site key was made at {key}. Back it up" in line
    assert key.read_text().strip() not in first.stdout + first.stderr
    assert (second.returncode, "key was made" in second.stderr) == (0, False)
    assert json.loads(first.stdout)["key_id"] == json.loads(second.stdout)["key_id"]


@pytest.mark.parametrize("place", ["mistyped", "no/such/folder/mistyped"])
def test_a_named_key_that_is_not_there_is_refused_and_not_made(place, study, tmp_path):
    key = tmp_path / place
    done = call("run", str(study.source), str(tmp_path / "out"), "--key", str(key), home=tmp_path / "home")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"medlsdm-deid: There is no key file '{key}'.")
    assert len(done.stderr.splitlines()) == 1
    assert [p for p in (key, tmp_path / "no", tmp_path / "home", tmp_path / "out") if p.exists()] == []


def test_a_named_key_is_used(study, tmp_path):
    key = tmp_path / "key"
    key.write_text("5a" * 32)
    key.chmod(0o600)
    done = call("run", str(study.source), str(tmp_path / "out"), "--key", str(key), "--json", home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["key_id"] == SiteKeys.derive(b"\x5a" * 32, "default").id
    assert not (tmp_path / "home").exists()


def test_help_is_quick(tmp_path):
    start = time.perf_counter()
    assert call("--help", home=tmp_path).returncode == 0
    assert time.perf_counter() - start < 3


def test_keys_show_nothing_and_differ_by_project():
    keys = SiteKeys.derive(b"m" * 32, "a")
    assert repr(keys) == "SiteKeys(secret)"
    assert keys.uid != keys.pseudonym
    assert SiteKeys.derive(b"m" * 32, "b").uid != keys.uid
    with pytest.raises(ConfigError):
        SiteKeys.derive(b"short", "a")


def test_names_lists_what_segments_are_called_and_become(study, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(study.schema.to_json()))
    done = call("names", str(study.source), "--schema", str(schema), "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["becomes"] for row in rows} == {"liver", "Geschwür"}
    plain = call("names", str(study.source), home=tmp_path)
    assert plain.stdout.endswith("2 names, 2 unknown\n")


def test_a_schema_is_found_by_its_built_in_name(study, tmp_path):
    done = call("names", str(study.source), "--schema", "tissues", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {row["becomes"] for row in json.loads(done.stdout)} == {""}
    ran = call("run", str(study.source), str(tmp_path / "out"), "--schema", "tissues", "--json", home=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert LabelSchema.from_json(yaml.safe_load(schema_file("tissues").read_text())) == load_schema("tissues")


@pytest.mark.parametrize("name", ["tisues", "no/such.yaml"])
@pytest.mark.parametrize("command", ["names", "run"])
def test_a_schema_that_is_not_there_is_told_as_missing(command, name, study, tmp_path):
    out = [str(tmp_path / "out")] if command == "run" else []
    done = call(command, str(study.source), *out, "--schema", name, home=tmp_path / "home")
    assert done.returncode == 3
    assert done.stderr == (
        f"medlsdm-deid: There is no label schema {name!r}. "
        "Known: hippocampus, procedural, tissues; or give a YAML or JSON file.\n"
    )
    assert not (tmp_path / "home").exists()


def test_a_schema_that_cannot_be_read_is_told_as_that(study, tmp_path):
    (tmp_path / "schema.yaml").write_bytes(b"\xff\xfe\xff")
    done = call("names", str(study.source), "--schema", str(tmp_path / "schema.yaml"), home=tmp_path)
    assert done.returncode == 3
    assert "The label schema 'schema.yaml' cannot be read." in done.stderr
