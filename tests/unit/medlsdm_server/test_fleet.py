"""A site speaks for itself alone: sender, key and node number of each fleet call."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node

from medlsdm.errors import EnrolmentError
from medlsdm_server import fleet


def key():
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


MINE, OTHER = key(), key()


def pushed(node=7, *senders):
    messages = [Message(metadata=Metadata(src_node_id=n)) for n in senders]
    return fleet_pb2.PushMessagesRequest(node=Node(node_id=node), messages_list=messages).SerializeToString()


GOOD = {
    "pull-messages": fleet_pb2.PullMessagesRequest(node=Node(node_id=7)).SerializeToString(),
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(node=Node(node_id=7)).SerializeToString(),
    "push-object": message_pb2.PushObjectRequest(node=Node(node_id=7), object_id="a").SerializeToString(),
    "deactivate-node": fleet_pb2.DeactivateNodeRequest(node_id=7).SerializeToString(),
    "activate-node": fleet_pb2.ActivateNodeRequest(public_key=fleet.public_pem(MINE)).SerializeToString(),
    "push-messages": pushed(7, 7),
}


@pytest.mark.parametrize("call", GOOD)
def test_a_call_in_the_site_s_own_name_passes(call):
    fleet.check_sender(call, GOOD[call], "7", MINE)


@pytest.mark.parametrize("call", sorted(set(GOOD) - {"activate-node"}))
def test_a_call_that_names_another_node_is_refused(call):
    with pytest.raises(EnrolmentError, match="another node"):
        fleet.check_sender(call, GOOD[call], "8", MINE)


@pytest.mark.parametrize("senders", [(8,), (7, 8), (0,)])
def test_a_message_that_another_node_is_said_to_have_sent_is_refused(senders):
    with pytest.raises(EnrolmentError, match="another node"):
        fleet.check_sender("push-messages", pushed(7, *senders), "7", MINE)


def test_signing_on_with_another_key_is_refused():
    with pytest.raises(EnrolmentError, match="another node"):
        fleet.check_sender("activate-node", GOOD["activate-node"], "7", OTHER)


@pytest.mark.parametrize("body", [b"", b"\xff" * 40, b"{}"])
def test_what_is_not_a_call_is_refused(body):
    for call in GOOD:
        with pytest.raises(EnrolmentError):
            fleet.check_sender(call, body, "7", MINE)


def test_every_call_that_passes_the_gateway_has_a_form_and_a_limit():
    assert len(fleet.FLEET_CALLS) == 10
    assert all(0 < fleet.most_bytes(path.rpartition("/")[2]) <= 8 << 20 for path in fleet.FLEET_CALLS)


def test_an_object_that_arrived_is_known_by_session_and_id():
    one = message_pb2.PushObjectRequest(object_id="a", session_id="s", object_content=b"x").SerializeToString()
    other = message_pb2.PushObjectRequest(object_id="b", session_id="s", object_content=b"x").SerializeToString()
    assert fleet.stored_object(one) == ("s", "a") != fleet.stored_object(other)
    assert message_pb2.PushObjectResponse.FromString(fleet.stored_now()).stored
