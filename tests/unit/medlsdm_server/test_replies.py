"""Replies as hostile input: what is read, what is refused before it takes memory, what a restart finds again."""

from __future__ import annotations

import io
import json
import math
import stat
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body, get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors import SafetensorError

from medlsdm.errors import UNTOLD, IntegrityError, MedlsdmError, PolicyError, ResourceError
from medlsdm.federation.arrays import PACKED, pack, unpack
from medlsdm_server import replies
from medlsdm_server.replies import kept_replies, note_reply, read_reply, refusal, told, within

from .conducting import answer, as_sent

SENT = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4), "scale": np.array(1.5, np.float32),
    "steps": np.array(7, np.int64), "mask": np.array([True, False]), "half": np.ones(3, np.float16),
}  # fmt: skip


def message(records) -> Message:
    return Message(RecordDict(records), dst_node_id=1, message_type="train")


def read(tmp_path, records, expected=SENT):
    return read_reply(message(records), "site-a", expected, tmp_path / "site-a.safetensors")


def npy(value, version=None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, value, version=version, allow_pickle=False)
    return stream.getvalue()


def with_bytes(data: bytes, name="w", like=SENT["w"]):
    records = answer(SENT)
    record = {k: v for k, v in records["arrays"].items() if k != name}
    array = Array(str(like.dtype), tuple(like.shape), "numpy.ndarray", data)
    return records | {"arrays": ArrayRecord(record | {name: array})}


shapes = npst.array_shapes(min_dims=0, max_dims=3, max_side=3)
arrays = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.one_of(
        *(npst.arrays(kind, shapes) for kind in (np.int64, np.uint8, np.bool_)),
        npst.arrays(np.float32, shapes, elements=st.floats(-9, 9, width=32)),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(arrays, st.integers(0, 16), st.booleans())
def test_a_good_reply_comes_back_bit_by_bit_with_the_length_of_its_update(tmp_path_factory, sent, power, columns):
    folder = tmp_path_factory.mktemp("spool")
    made = {
        k: np.asarray(v + 1 if v.dtype == np.float32 else v, v.dtype, order="F" if columns else "C")
        for k, v in sent.items()
    }
    reply = read(folder, answer(made, 2.0**power), sent)
    assert reply.weight == 2.0**power
    back = dict(reply.arrays())
    assert {k: (v.dtype, v.shape, v.tobytes()) for k, v in back.items()} == {
        k: (v.dtype, v.shape, v.tobytes("C")) for k, v in made.items()
    }
    naive = math.sqrt(
        sum(((made[k].astype(float) - v.astype(float)) ** 2).sum() for k, v in sent.items() if v.dtype.kind == "f")
    )
    assert reply.norm == pytest.approx(naive)


def test_what_is_kept_is_for_the_service_user_alone(tmp_path):
    reply = read(tmp_path, answer(SENT))
    note_reply(reply)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o600}


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x93NUMPY\x02\x00", npy(SENT["w"])[:128]]),
)
def test_bytes_that_are_no_array_are_refused_and_nothing_else_happens(tmp_path_factory, tail, head):
    folder = tmp_path_factory.mktemp("spool")
    with pytest.raises(IntegrityError):
        read(folder, with_bytes(head + tail))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [
        npy(np.zeros((3, 4), ">f4")), npy(np.zeros((4, 3), np.float32)), npy(np.zeros(12, np.float32)),
        npy(np.zeros((3, 4), np.float64)), npy(np.zeros((3, 4), np.float32)) + b"\0",
        npy(np.zeros((3, 4), np.float32))[:-1], npy(np.zeros((3, 4), "V4")), npy(np.zeros((3, 4), np.int32)),
        npy(np.full((3, 4), np.nan, np.float32)), npy(np.full((3, 4), -np.inf, np.float32)),
    ],
)  # fmt: skip
def test_an_array_that_lies_about_its_form_is_refused(tmp_path, data):
    with pytest.raises(IntegrityError, match="The reply was not used"):
        read(tmp_path, with_bytes(data))


def test_a_header_that_states_a_huge_size_takes_no_memory(tmp_path):
    header = npy(SENT["w"])[:128].replace(b"(3, 4), }", b"(3, 40000000), }"[:16])
    tracemalloc.start()
    with pytest.raises(IntegrityError):
        read(tmp_path, with_bytes(header + bytes(48)))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_columns_first_is_read_as_well(tmp_path):
    turned = np.asfortranarray(SENT["w"] + 1)
    reply = read(tmp_path, answer(SENT | {"w": turned}))
    assert np.array_equal(reply.array("w"), turned)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), st.lists(st.floats(allow_nan=False), max_size=2)))
def test_only_a_power_of_two_within_bounds_is_a_weight(tmp_path_factory, value):
    good = isinstance(value, int | float) and value in {2.0**n for n in range(17)}
    records = answer(SENT, float(value) if good else 4.0) | {"metrics": MetricRecord({"weight": value})}
    folder = tmp_path_factory.mktemp("spool")
    if good:
        assert read(folder, records).weight == value
    else:
        with pytest.raises(IntegrityError, match="weight"):
            read(folder, records)


@pytest.mark.parametrize("power", [0, 1, 16])
def test_powers_of_two_are_weights(tmp_path, power):
    assert read(tmp_path, answer(SENT, 2.0**power)).weight == 2**power


@pytest.mark.parametrize(
    "changed",
    [
        {"loss": math.nan}, {"loss": math.inf}, {"loss": "much"}, {"training_seconds": -1},
        {"training_seconds": math.inf}, {"training_seconds": math.nan}, {"training_seconds": 1e300},
        {"weight": 0}, {"weight": -4}, {"weight": 8.0}, {"version": 2}, {"more": 1},
    ],
)  # fmt: skip
def test_words_of_another_form_are_refused(tmp_path, changed):
    records = answer(SENT)
    words = json.loads(str(records["reply"]["reply"])) | changed
    with pytest.raises(MedlsdmError):
        read(tmp_path, records | {"reply": ConfigRecord({"reply": json.dumps(words)})})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_of_ours_is_not_the_sites_fault(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(replies, "save_file", full)
    with pytest.raises(ResourceError):
        read(tmp_path, answer(SENT))
    assert list(tmp_path.iterdir()) == []


def test_a_restart_finds_whole_replies_alone(tmp_path):
    for site in ("site-a", "site-b", "site-c", "site-d"):
        note_reply(read_reply(message(answer(SENT)), site, SENT, tmp_path / f"{site}.safetensors"))
    (tmp_path / "site-a.safetensors").unlink()
    (tmp_path / "site-b.json").write_text('{"site": "site-b", "wei')
    (tmp_path / "site-c.safetensors").write_bytes((tmp_path / "site-c.safetensors").read_bytes()[:40])
    (tmp_path / "site-e.safetensors").write_bytes(b"")
    assert [r.site for r in kept_replies(tmp_path, SENT)] == ["site-d"]
    assert kept_replies(tmp_path, {"other": SENT["w"]}) == []
    kept_replies(tmp_path, SENT)[0].forget()
    assert kept_replies(tmp_path, SENT) == []


@pytest.mark.parametrize(
    "reason", ["", "[/bold]", "\x1b[2J", "<class 'OSError'>:<'/srv/anna'>", None, 5, PolicyError.public_text + " "]
)
def test_words_that_our_nodes_do_not_say_are_not_told(reason):
    assert told(reason) == UNTOLD
    assert told(PolicyError.public_text) == PolicyError.public_text


@given(st.text())
def test_what_a_row_says_is_one_printable_line(text):
    said = refusal(IntegrityError(text))
    assert len(said) <= 200
    assert said.isprintable()
    assert "anna" not in refusal(ValueError("/srv/anna"))


def deflated(array: Array, pieces: list[int]) -> tuple[str, dict[str, bytes]]:
    """Return an array as it travels, but with other numbers of pieces."""
    body = json.dumps({"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "arraychunk_ids": pieces})
    content = add_header_to_object_body(body.encode(), array)
    contents = {name: piece.deflate() for name, piece in array.children.items()}
    return get_object_id(content), contents | {get_object_id(content): content}


def test_a_piece_that_is_listed_a_million_times_is_refused_before_it_takes_memory():
    name, contents = deflated(Array(np.zeros(100_000, np.float32)), [0] * 1_000_000)
    tracemalloc.start()
    with pytest.raises(IntegrityError, match="larger"), within({"w": np.zeros(100_000, np.float32)}):
        inflate_object_from_contents(name, contents)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_many_arrays_that_are_larger_in_sum_are_refused():
    like = np.zeros(100_000, np.float32)
    with within({"w": like}):
        inflate_object_from_contents(*deflated(Array(like), [0]))
        with pytest.raises(IntegrityError, match="larger"):
            inflate_object_from_contents(*deflated(Array(like), [0]))


def test_an_honest_array_goes_through_and_flower_is_left_as_it_was():
    before = Array.__dict__["inflate"]
    value = np.random.default_rng(0).normal(size=2_000_000).astype(np.float32)  # several pieces
    with within({"w": value}):
        whole = Array(value)
        got = inflate_object_from_contents(*deflated(whole, list(range(len(whole.children)))))
    assert np.array_equal(got.numpy(), value)
    assert Array.__dict__["inflate"] is before


@settings(max_examples=60, deadline=None)
@given(arrays)
def test_a_packed_reply_reads_as_the_named_one(tmp_path_factory, sent):
    folder = tmp_path_factory.mktemp("spool")
    named, packed = read(folder, answer(sent), sent), read(folder / "packed", as_sent(answer(sent)), sent)
    assert packed.norm == named.norm == 0
    assert {k: v.tobytes() for k, v in packed.arrays()} == {k: v.tobytes() for k, v in named.arrays()}
    back = unpack(pack(sent))
    assert {k: (v.dtype, v.shape, v.tobytes()) for k, v in back.items()} == {
        k: (v.dtype, v.shape, v.tobytes()) for k, v in sent.items()
    }


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_packed_reply_with_changed_bytes_is_refused_or_holds_other_values(tmp_path_factory, data):
    folder, blob = tmp_path_factory.mktemp("spool"), bytearray(pack(SENT).tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        blob = blob[: data.draw(st.integers(0, len(blob)))]
    records = answer(SENT) | {"arrays": ArrayRecord({PACKED: Array(np.frombuffer(bytes(blob), np.uint8))})}
    try:
        reply = read(folder, records)
    except IntegrityError:
        assert list(folder.iterdir()) == []
        return
    kept = dict(reply.arrays())
    assert {k: (v.dtype, v.shape) for k, v in kept.items()} == {k: (v.dtype, v.shape) for k, v in SENT.items()}
    assert all(np.isfinite(v).all() for v in kept.values() if v.dtype.kind == "f")


@pytest.mark.parametrize("array", [np.zeros(9, np.float32), np.zeros((3, 3), np.uint8), np.zeros(10**7, np.uint8)])
def test_a_packed_reply_that_is_no_row_of_bytes_is_refused(tmp_path, array):
    with pytest.raises(IntegrityError):
        read(tmp_path, answer(SENT) | {"arrays": ArrayRecord({PACKED: Array(array)})})
    assert list(tmp_path.iterdir()) == []
