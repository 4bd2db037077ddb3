"""Error texts that leave: ours from a closed list, and one sentence in place of any other.

Flower reports what went wrong in an app, or before it, in words of its own, which may hold a path of this hospital or
a value. They stand in the message that is pushed and once more in the object that is stored under the digest of its
content, so both are written anew.
"""

from __future__ import annotations

from flwr.app.message.message import Message  # the one that Flower's own programs use
from flwr.common.serde import message_from_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.supercore.inflatable.inflatable_object import get_object_id
from google.protobuf.message import DecodeError

from medlsdm.errors import UNTOLD, public_texts

KEPT = 64


class Words:
    """Rewrite the calls of one SuperNode; remembers which message became which."""

    def __init__(self) -> None:
        self._changed: dict[str, tuple[str, bytes]] = {}  # id of the message as the SuperNode knows it

    def outgoing(self, call: str, body: bytes) -> bytes:
        """Return the body to send in place of this one."""
        try:
            if call == "push-messages":
                return self._messages(body)
            if call == "push-object" and self._changed:
                return self._object(body)
        except DecodeError:
            return b""  # not Flower's: the coordinator refuses it
        return body

    def incoming(self, call: str, answer: bytes) -> bytes:
        """Return the answer in which a changed message has the name that the SuperNode gave it."""
        if call != "push-messages" or not self._changed:
            return answer
        response = fleet_pb2.PushMessagesResponse.FromString(answer)
        ours = {new: old for old, (new, _) in self._changed.items()}
        wanted = [ours.get(name, name) for name in response.objects_to_push]
        del response.objects_to_push[:]
        response.objects_to_push.extend(wanted)
        return response.SerializeToString(deterministic=True)

    def _messages(self, body: bytes) -> bytes:
        request = fleet_pb2.PushMessagesRequest.FromString(body)
        for number, sent in enumerate(request.messages_list):
            if not sent.HasField("error") or sent.error.reason in public_texts():
                continue
            old = sent.metadata.message_id
            sent.error.reason = UNTOLD
            message: Message = message_from_proto(sent)
            content = message.deflate()
            new = get_object_id(content)
            sent.metadata.message_id = new
            request.message_object_trees[number].CopyFrom(message_pb2.ObjectTree(object_id=new))
            while len(self._changed) >= KEPT:
                del self._changed[next(iter(self._changed))]
            self._changed[old] = (new, content)
        return request.SerializeToString(deterministic=True)

    def _object(self, body: bytes) -> bytes:
        request = message_pb2.PushObjectRequest.FromString(body)
        if request.object_id in self._changed:
            request.object_id, request.object_content = self._changed[request.object_id]
        return request.SerializeToString(deterministic=True)
