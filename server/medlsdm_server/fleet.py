"""What a site may say in Flower's fleet calls: only in its own name.

Flower signs the time of a call, not its body, and does not compare the sender that a message names with the node
that pushes it. Both are bound here, to the site that was authenticated at the door.
"""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.fab_pb2 import GetFabRequest
from google.protobuf.message import DecodeError

from medlsdm.errors import EnrolmentError

MIB = 1024 * 1024
_MESSAGES: dict[str, tuple[Any, int]] = {  # the form of each call and its largest body
    "activate-node": (fleet_pb2.ActivateNodeRequest, 4096),
    "deactivate-node": (fleet_pb2.DeactivateNodeRequest, 4096),
    "send-node-heartbeat": (heartbeat_pb2.SendNodeHeartbeatRequest, 4096),
    "pull-messages": (fleet_pb2.PullMessagesRequest, 64 * 1024),
    "push-messages": (fleet_pb2.PushMessagesRequest, 8 * MIB),
    "get-run": (run_pb2.GetRunRequest, 4096),
    "get-fab": (GetFabRequest, 4096),
    "pull-object": (message_pb2.PullObjectRequest, 4096),
    "push-object": (message_pb2.PushObjectRequest, 8 * MIB),
    "confirm-message-received": (message_pb2.ConfirmMessageReceivedRequest, 4096),
}
FLEET_CALLS = frozenset(f"/v1/fleet/{call}" for call in _MESSAGES)


def most_bytes(call: str) -> int:
    """Return the largest body of a call; Flower cuts arrays into pieces that are smaller."""
    return _MESSAGES[call][1]


def check_sender(call: str, body: bytes, node_id: str, node_key: str) -> None:
    """Raise EnrolmentError unless the call speaks of the authenticated site's own node alone.

    Args:
        call: Name of the fleet call, as in its path.
        body: The request, protobuf.
        node_id: Under which number Flower knows the site.
        node_key: The site's P-384 key, OpenSSH form.
    """
    form = _MESSAGES[call][0]
    try:
        request = form.FromString(body)
    except DecodeError as error:
        raise EnrolmentError("The request is not one of Flower's.", "Install the same release.") from error
    if call == "activate-node":
        same = request.public_key == public_pem(node_key)
    elif call == "deactivate-node":
        same = str(request.node_id) == node_id
    else:
        senders = [message.metadata.src_node_id for message in getattr(request, "messages_list", ())]
        same = {str(n) for n in [request.node.node_id, *senders]} == {node_id}
    if not same:
        raise EnrolmentError("The request speaks for another node.", "Start the node again.")


def public_pem(node_key: str) -> bytes:
    """Return a key of OpenSSH form as Flower sends it."""
    return load_ssh_public_key(node_key.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def has_work(answer: bytes) -> bool:
    """Tell whether an answer to ``pull-messages`` carries a message."""
    try:
        return bool(fleet_pb2.PullMessagesResponse.FromString(answer).messages_list)
    except DecodeError:
        return False


def sign_off(node_id: str) -> bytes:
    """Return the body of the call that signs a node off."""
    return fleet_pb2.DeactivateNodeRequest(node_id=int(node_id)).SerializeToString()


def stored_object(body: bytes) -> tuple[str, str]:
    """Return session and id of the object in a ``push-object``."""
    request = message_pb2.PushObjectRequest.FromString(body)
    return request.session_id, request.object_id


def stored_now() -> bytes:
    """Return the answer to a ``push-object`` that was stored."""
    return message_pb2.PushObjectResponse(stored=True).SerializeToString()
