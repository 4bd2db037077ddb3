from __future__ import annotations

import socket

import pytest

from medlsdm.errors import EnrolmentError, NetworkError, UsageError
from medlsdm.federation.identity import Invitation
from medlsdm_node.home import NodeHome
from medlsdm_node.joining import prepare, read_invitation

INVITATION = Invitation.new("site-a", "0" * 64, 1)


def test_an_invitation_comes_from_the_file_before_the_environment(tmp_path):
    path, other = tmp_path / "invitation", Invitation.new("site-b", "1" * 64, 1)
    path.write_text(INVITATION.encode() + "\n")
    assert read_invitation(path, other.encode()) == INVITATION
    assert read_invitation(None, other.encode()) == other
    assert read_invitation(None, None) is None
    assert read_invitation(None, "") is None


@pytest.mark.parametrize("content", [b"garbled", b"\xff\xfe\x00", b"\x00" * 1000, INVITATION.encode().encode()[:-9]])
def test_a_file_that_holds_none_is_refused(tmp_path, content):
    path = tmp_path / "invitation"
    path.write_bytes(content)
    with pytest.raises(EnrolmentError):
        read_invitation(path, None)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError):
            read_invitation(path, INVITATION.encode())


def test_an_invitation_for_another_site_is_refused_before_anything_is_sent(home):
    with pytest.raises(EnrolmentError, match="site-b"):
        prepare(home, "localhost:1", Invitation.new("site-b", "0" * 64, 1), None)


def test_nothing_is_kept_of_a_server_that_does_not_answer(home):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(NetworkError):
            prepare(home, f"127.0.0.1:{probe.getsockname()[1]}", INVITATION, None)
    assert not home.ca_cert.exists()
    assert not home.server_file.exists()


def test_an_address_that_is_none_makes_no_node(tmp_path, home):
    fresh = NodeHome(tmp_path / "fresh")
    with pytest.raises(UsageError):
        prepare(fresh, "https://host", INVITATION, home.settings)
    assert not fresh.root.exists()
