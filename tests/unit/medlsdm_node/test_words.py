"""What Flower says of an error stays here: in the message and in the object that carries it."""

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.supercore.inflatable.inflatable_object import get_object_id, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from medlsdm.errors import UNTOLD, PolicyError, public_texts
from medlsdm_node.words import Words

SECRET = "<class 'PermissionError'>:<[Errno 13] '/srv/hospital/anna/flower/apps'>"


@pytest.fixture(autouse=True)
def task(monkeypatch):
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


def reply(reason):
    asked = Message(RecordDict({}), dst_node_id=1, message_type="train")
    asked.metadata.__dict__["_message_id"] = "asked"
    message = Message(Error(2, reason), reply_to=asked)
    message.metadata.__dict__["_message_id"] = message.object_id
    pushed = fleet_pb2.PushMessagesRequest(
        messages_list=[message_to_proto(message)], message_object_trees=[get_object_tree(message)]
    )
    stored = message_pb2.PushObjectRequest(object_id=message.object_id, object_content=message.deflate())
    return message.object_id, pushed.SerializeToString(), stored.SerializeToString()


def test_a_foreign_reason_leaves_neither_in_the_message_nor_in_the_object():
    words = Words()
    old, pushed, stored = reply(SECRET)
    assert b"anna" in pushed
    sent = words.outgoing("push-messages", pushed)
    content = words.outgoing("push-object", stored)
    for leaving in (sent, content):
        assert b"anna" not in leaving
        assert b"Errno" not in leaving
        assert UNTOLD.encode() in leaving
    message = fleet_pb2.PushMessagesRequest.FromString(sent)
    new = message.messages_list[0].metadata.message_id
    assert new != old
    assert message.message_object_trees[0].object_id == new
    kept = message_pb2.PushObjectRequest.FromString(content)
    assert (kept.object_id, get_object_id(kept.object_content)) == (new, new)
    assert Message.inflate(kept.object_content).error.reason == UNTOLD


def test_the_supernode_is_asked_for_the_object_that_it_has():
    words = Words()
    old, pushed, _ = reply(SECRET)
    new = fleet_pb2.PushMessagesRequest.FromString(words.outgoing("push-messages", pushed)).messages_list[0]
    answer = fleet_pb2.PushMessagesResponse(objects_to_push=[new.metadata.message_id, "other"], session_id="s")
    told = fleet_pb2.PushMessagesResponse.FromString(words.incoming("push-messages", answer.SerializeToString()))
    assert list(told.objects_to_push) == [old, "other"]
    assert told.session_id == "s"


def test_our_own_words_and_all_else_pass_unchanged():
    words = Words()
    _, pushed, stored = reply(PolicyError.public_text)
    assert words.outgoing("push-messages", pushed) == pushed
    assert words.outgoing("push-object", stored) == stored
    assert words.outgoing("pull-messages", b"\x0a\x02") == b"\x0a\x02"
    assert words.incoming("pull-messages", b"anything") == b"anything"


def test_what_is_not_a_message_does_not_leave():
    assert Words().outgoing("push-messages", b"\xff\xff\xff" + SECRET.encode()) == b""


def test_the_sentences_that_may_leave_name_no_value():
    assert len(public_texts()) > 12
    assert not any(c in text for text in public_texts() for c in '{}%/\\"0123456789')
