from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from medlsdm.errors import BusyError, ConfigError, IntegrityError
from medlsdm_node.home import NodeHome
from medlsdm_node.vault import Vault

from .conftest import new_home


def test_keys_and_settings_are_for_the_owner_only(tmp_path):
    before = os.umask(0)
    try:
        home = new_home(tmp_path / "node")
    finally:
        os.umask(before)
    private = [*home.keys.iterdir(), home.policy_file, home.settings_file, home.root / "audit.jsonl"]
    assert len(private) == 7
    assert {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in private} == {p.name: "0o600" for p in private}
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700


def test_every_site_has_keys_of_its_own(home, tmp_path):
    other = new_home(tmp_path / "other")
    for name in ("master.key", "identity.key", "node.key"):
        assert (home.keys / name).read_bytes() != (other.keys / name).read_bytes()
    assert home.derive("a") != home.derive("b")
    assert home.derive("a") != other.derive("a")


def test_a_second_init_is_refused_and_changes_nothing(home):
    before = {p: p.read_bytes() for p in home.root.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="already"):
        new_home(home.root)
    assert {p: p.read_bytes() for p in home.root.rglob("*") if p.is_file()} == before


def test_an_init_that_broke_off_keeps_its_keys(home):
    key = home.master_key
    home.settings_file.unlink()
    assert new_home(home.root).master_key == key


def test_a_folder_that_holds_something_else_is_refused_and_stays_as_it_was(tmp_path):
    for name in ("notes.txt", "models/weights.bin", "keys/id_ed25519", ".hidden"):
        root = tmp_path / name.replace("/", "-")
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("mine")
        root.chmod(0o755)
        before = sorted(root.rglob("*"))
        with pytest.raises(ConfigError, match="is no node") as caught:
            new_home(root)
        assert "empty folder" in str(caught.value.hint)
        assert "\n" not in str(caught.value)
        assert stat.S_IMODE(root.stat().st_mode) == 0o755
        assert sorted(root.rglob("*")) == before
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="is no node"):
        new_home(file)


def test_an_empty_folder_or_one_with_the_rules_laid_ready_becomes_a_node(tmp_path):
    empty, ready = tmp_path / "empty", tmp_path / "ready"
    for root in (empty, ready):
        root.mkdir(mode=0o755)
    (ready / "policy.yaml").write_text("# ours\n")
    assert stat.S_IMODE(new_home(empty).root.stat().st_mode) == 0o700
    assert new_home(ready).policy_file.read_text() == "# ours\n"


def test_an_init_that_was_killed_before_its_keys_were_whole_goes_on(tmp_path):
    root = tmp_path / "node"
    for name in ("keys", "vault", "models", "run"):
        (root / name).mkdir(parents=True)
    (root / "keys/node.key").write_bytes(b"half")
    (root / "keys/.writing-abc").write_bytes(b"")
    assert new_home(root).node_public_key().startswith("ecdsa-sha2-nistp384 ")


@pytest.mark.parametrize("how", ["missing", "short", "other"])
@pytest.mark.parametrize("name", ["master.key", "identity.key", "node.key"])
def test_a_key_that_is_not_whole_is_named(home, name, how):
    path = home.keys / name
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(content[:20] if how == "short" else bytes(100))
    use = {"master.key": lambda: home.derive("x"), "identity.key": lambda: home.identity}
    with pytest.raises(IntegrityError, match=name) as caught:
        use.get(name, home.node_public_key)()
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_the_vault_of_a_changed_master_key_stays_shut(home):
    Vault(home).put("pair", "one", b"content")
    (home.keys / "master.key").write_bytes(bytes(32))
    with pytest.raises(IntegrityError):
        Vault(home).get("pair", "one")


def test_the_public_key_is_the_half_of_the_private_one(home):
    private = load_ssh_private_key(home.node_key.read_bytes(), None)
    assert private.curve.name == "secp384r1"
    assert home.node_public_key() == home.node_public.read_text()


def test_no_node_and_a_damaged_one_are_told_apart(tmp_path, home):
    with pytest.raises(ConfigError, match="init"):
        NodeHome(tmp_path / "nothing").settings  # noqa: B018
    home.settings_file.write_text('{"site": "Site A"}')
    with pytest.raises(IntegrityError):
        NodeHome(home.root).settings  # noqa: B018


def test_what_is_locked_by_another_process_is_busy(home):
    code = (
        "import sys; from pathlib import Path; from medlsdm_node.home import NodeHome\n"
        "with NodeHome(Path(sys.argv[1])).locked('join'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(home.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match="'join'"), home.locked("join"):
            pass
        with home.locked("ingest"):
            other.stdin.close()
        other.wait(10)
    with home.locked("join"):
        pass
