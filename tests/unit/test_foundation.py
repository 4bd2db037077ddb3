"""Types, errors, checks, volumes, hash chain and terminal: what everything else stands on."""

import gzip
import inspect
import itertools
import json
import multiprocessing
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlsdm import checks, errors
from medlsdm.chain import GENESIS, HashChain
from medlsdm.checks import existing_folder, file_digest, write_atomic
from medlsdm.errors import DataError, GeometryError, IntegrityError, MedlsdmError, ResourceError, SchemaError
from medlsdm.types import Geometry, LabelClass, LabelSchema, Modality, Scan, SemanticMap
from medlsdm.volumes import from_ras, list_nifti, nifti_stem, read_nifti, resample, to_ras, write_nifti

SCHEMA = LabelSchema("s", (LabelClass(0, "background"), LabelClass(1, "one"), LabelClass(300, "far")))
TURNS = [
    np.eye(3)[list(order)] * signs
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def rotation(x: float, y: float, z: float) -> np.ndarray:
    out = np.eye(3)
    for axis, angle in enumerate((x, y, z)):
        turn, (i, j) = np.eye(3), [a for a in range(3) if a != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = out @ turn
    return out


@st.composite
def geometries(draw, tilt: float = 0.5) -> Geometry:
    angle = st.floats(-tilt, tilt)
    linear = rotation(draw(angle), draw(angle), draw(angle)) @ TURNS[draw(st.integers(0, 47))]
    linear = linear * [draw(st.floats(0.2, 6.0)) for _ in range(3)]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, [draw(st.floats(-500, 500)) for _ in range(3)]
    return Geometry(affine, (draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 6))))


@given(geometries())
def test_orientation_letters_are_nibabels(geometry: Geometry):
    assert tuple(geometry.orientation) == nib.aff2axcodes(geometry.affine)


@given(geometries(tilt=3.2))
def test_orientation_names_each_world_axis_once(geometry: Geometry):
    letters = geometry.orientation
    assert sorted(next(i for i, pair in enumerate(("RL", "AP", "SI")) if c in pair) for c in letters) == [0, 1, 2]


@given(geometries(tilt=3.2))
def test_spacing_is_the_step_between_neighbouring_voxels(geometry: Geometry):
    for axis, spacing in enumerate(geometry.spacing):
        step = geometry.affine @ [*np.eye(3)[axis], 0]
        assert spacing == pytest.approx(np.sqrt((step**2).sum()))


@given(geometries(tilt=3.2), st.integers(0, 1000))
def test_to_ras_keeps_every_voxel_in_its_place_and_from_ras_undoes_it(geometry: Geometry, seed: int):
    array = np.random.default_rng(seed).permutation(int(np.prod(geometry.shape))).reshape(geometry.shape)
    turned, grid = to_ras(array, geometry)
    assert np.array_equal(from_ras(turned, geometry), array)
    for index in np.ndindex(*turned.shape):
        before = np.argwhere(array == turned[index])[0]
        np.testing.assert_allclose(grid.affine @ [*index, 1], geometry.affine @ [*before, 1], atol=1e-6)


@given(geometries(tilt=0.3))
def test_to_ras_gives_ras(geometry: Geometry):
    assert to_ras(np.zeros(geometry.shape), geometry)[1].orientation == "RAS"


@pytest.mark.parametrize(
    ("affine", "shape"),
    [
        (np.eye(3), (2, 2, 2)),
        (np.full((4, 4), np.nan), (2, 2, 2)),
        (np.diag([1.0, 0, 1, 1]), (2, 2, 2)),
        (np.eye(4), (2, 2)),
        (np.eye(4), (2, 0, 2)),
    ],
)
def test_geometry_refuses_what_is_no_grid(affine: np.ndarray, shape: tuple):
    with pytest.raises(GeometryError):
        Geometry(affine, shape)


def test_geometry_cannot_be_changed_afterwards():
    affine = np.eye(4)
    geometry = Geometry(affine, (2, 2, 2))
    affine[0, 0] = 9
    assert geometry.spacing == (1, 1, 1)
    with pytest.raises(ValueError, match="read-only"):
        geometry.affine[0, 0] = 2


def test_matches_looks_at_the_far_corner():
    one = Geometry(np.eye(4), (100, 100, 100))
    tilted = np.eye(4)
    tilted[0, 0] = 1.0002
    assert not one.matches(Geometry(tilted, (100, 100, 100)))
    assert one.matches(Geometry(tilted, (100, 100, 100)), tolerance_mm=0.05)
    assert not one.matches(Geometry(np.eye(4), (100, 100, 99)))


def test_private_values_show_and_pickle_nothing():
    geometry = Geometry(np.eye(4), (2, 2, 2))
    scan = Scan(np.full((2, 2, 2), 1234.5), geometry, Modality.MR, "secret")
    labels = SemanticMap(np.ones((2, 2, 2)), geometry, SCHEMA)
    for value in (scan, labels):
        assert "1234" not in repr(value)
        assert "secret" not in repr(value)
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(value)
    with pytest.raises(DataError):
        Scan(np.full((2, 2, 2), np.inf), geometry, Modality.MR, "p")
    with pytest.raises(GeometryError):
        Scan(np.zeros((2, 2, 3)), geometry, Modality.MR, "p")


@pytest.mark.parametrize("bad", [[2], [1.5], [-1], [70_000]])
def test_a_label_outside_the_schema_is_refused(bad: list):
    array = np.zeros((2, 2, 2), dtype=np.float64)
    array[0, 0, 0] = bad[0]
    with pytest.raises(SchemaError):
        SemanticMap(array, Geometry(np.eye(4), (2, 2, 2)), SCHEMA)


def test_a_map_digest_tells_values_grid_and_schema_apart_but_not_dtype():
    geometry, array = Geometry(np.eye(4), (2, 2, 2)), np.zeros((2, 2, 2), np.uint8)
    base = SemanticMap(array, geometry, SCHEMA).digest
    assert SemanticMap(array.astype(np.float32), geometry, SCHEMA).digest == base
    one = array.copy()
    one[1, 1, 1] = 1
    other = LabelSchema("s", (*SCHEMA.classes[:2], LabelClass(300, "near")))
    moved = np.eye(4)
    moved[0, 3] = 1
    assert base not in {
        SemanticMap(one, geometry, SCHEMA).digest,
        SemanticMap(array, geometry, other).digest,
        SemanticMap(array, Geometry(moved, (2, 2, 2)), SCHEMA).digest,
    }


@pytest.mark.parametrize(
    "classes",
    [(LabelClass(1, "one"),), (LabelClass(0, "a"), LabelClass(0, "b")), (LabelClass(0, "a"), LabelClass(1, "A")),
     (LabelClass(0, "a"), LabelClass(65_536, "b")), (LabelClass(0, "a"), LabelClass(-1, "b"))],
)  # fmt: skip
def test_a_schema_refuses_doubles_and_a_missing_background(classes: tuple):
    with pytest.raises(SchemaError):
        LabelSchema("bad", classes)


def test_a_schema_survives_json_and_refuses_nonsense():
    again = LabelSchema.from_json(json.loads(json.dumps(SCHEMA.to_json())))
    assert again == SCHEMA
    assert again.digest == SCHEMA.digest
    for bad in ({}, {"name": "x"}, {"name": "x", "classes": [{"id": "a", "name": "b"}]}, {"name": "x", "classes": 5}):
        with pytest.raises(SchemaError):
            LabelSchema.from_json(bad)


@settings(max_examples=25, deadline=None)
@given(geometries(), st.sampled_from(["uint8", "uint16", "int16", "float32"]), st.sampled_from([".nii", ".nii.gz"]))
def test_nifti_round_trip(tmp_path_factory, geometry: Geometry, dtype: str, suffix: str):
    path = tmp_path_factory.mktemp("nifti") / f"volume{suffix}"
    array = (np.random.default_rng(0).random(geometry.shape) * 250).astype(dtype)
    write_nifti(path, array, geometry)
    back, grid = read_nifti(path)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)
    assert grid.matches(geometry, tolerance_mm=1e-2)


def test_nifti_headers_carry_nothing_and_equal_volumes_are_equal_bytes(tmp_path: Path):
    geometry = Geometry(np.diag([-1.0, 2, 3, 1]), (5, 6, 7))
    array = np.arange(210, dtype=np.float32).reshape(5, 6, 7)
    write_nifti(tmp_path / "one.nii.gz", array, geometry)
    os.utime(tmp_path / "one.nii.gz", (0, 0))
    write_nifti(tmp_path / "another-name.nii.gz", array, geometry)
    content = (tmp_path / "one.nii.gz").read_bytes()
    assert content == (tmp_path / "another-name.nii.gz").read_bytes()
    flags, mtime = content[3], struct.unpack("<I", content[4:8])[0]
    assert (flags, mtime) == (0, 0)
    header = nib.load(tmp_path / "one.nii.gz").header
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        assert header[field].tobytes().strip(b"\0") == b"", field
    assert len(header.extensions) == 0
    assert header["sform_code"] == header["qform_code"] == 1


def test_a_scaled_integer_file_is_read_in_its_units(tmp_path: Path):
    image = nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    image.header.set_slope_inter(2.0, -1000.0)
    nib.save(image, tmp_path / "ct.nii")
    raw = np.asarray(nib.load(tmp_path / "ct.nii").dataobj)
    array, _ = read_nifti(tmp_path / "ct.nii")
    np.testing.assert_allclose(array, raw)
    assert array.dtype == np.float32


def test_damaged_and_foreign_files_are_data_errors(tmp_path: Path):
    write_nifti(tmp_path / "good.nii.gz", np.ones((8, 8, 8), np.float32), Geometry(np.eye(4), (8, 8, 8)))
    content = (tmp_path / "good.nii.gz").read_bytes()
    raw = gzip.decompress(content)
    for name, damaged in {
        "cut.nii.gz": content[: len(content) // 2], "text.nii": b"hello", "empty.nii.gz": b"", "short.nii": raw[:900],
        "garbled.nii.gz": content[:40] + bytes(255 - b for b in content[40:]), "null.nii": bytes(348),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(name)):
            read_nifti(tmp_path / name)
    with pytest.raises(DataError):
        read_nifti(tmp_path / "missing.nii")


@pytest.mark.parametrize(("shape", "fine"), [((3, 4, 5, 1), True), ((3, 4, 5, 2), False), ((3, 4), False)])
def test_a_fourth_axis_of_one_is_dropped_and_any_other_refused(tmp_path: Path, shape: tuple, fine: bool):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), tmp_path / "v.nii")
    if fine:
        assert read_nifti(tmp_path / "v.nii")[0].shape == shape[:3]
    else:
        with pytest.raises(GeometryError):
            read_nifti(tmp_path / "v.nii")


def test_names_of_nifti_files(tmp_path: Path):
    for name in ("b.nii", "a.nii.gz", ".hidden.nii", "c.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in list_nifti(tmp_path)] == ["a.nii.gz", "b.nii"]
    assert [nifti_stem(Path(n)) for n in ("x.y.nii.gz", "x.nii", "x.txt")] == ["x.y", "x", "x"]


def test_two_files_of_one_name_are_refused(tmp_path: Path):
    for name in ("m.nii", "m.nii.gz", "n.nii.gz", ".m.nii"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"m\.nii and m\.nii\.gz have one name"):
        list_nifti(tmp_path)
    (tmp_path / "m.nii").unlink()
    assert len(list_nifti(tmp_path)) == 2


def header_with(path: Path, *, sform: int, qform: int, pixdim: float) -> None:
    """Write a volume of 2 mm whose header has another voxel size along z."""
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([2.0, 2, 2, 1]))
    image.set_sform(image.affine, code=sform)
    image.set_qform(image.affine, code=qform)
    content = bytearray(image.to_bytes())
    content[88:92] = struct.pack("<f", pixdim)
    path.write_bytes(gzip.compress(bytes(content)))


@pytest.mark.parametrize("pixdim", [0.0, -2.0, float("nan")])
@pytest.mark.parametrize("qform", [0, 1])
def test_a_voxel_size_is_not_made_up(tmp_path: Path, capfd, qform: int, pixdim: float):
    path = tmp_path / "v.nii.gz"
    header_with(path, sform=0, qform=qform, pixdim=pixdim)
    with pytest.raises(GeometryError, match=r"v\.nii\.gz: The voxel size"):
        read_nifti(path)
    header_with(path, sform=1, qform=qform, pixdim=pixdim)
    assert read_nifti(path)[1].spacing == (2, 2, 2)
    header_with(path, sform=0, qform=qform, pixdim=3.0)
    assert read_nifti(path)[1].spacing == (2, 2, 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_colours_and_complex_numbers_are_refused(tmp_path: Path, dtype):
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), dtype), np.eye(4)), tmp_path / "v.nii")
    with pytest.raises(DataError, match=r"v\.nii holds colours or complex"):
        read_nifti(tmp_path / "v.nii")


def naive_nearest(array: np.ndarray, source: Geometry, target: Geometry, fill: int) -> np.ndarray:
    out = np.full(target.shape, fill, dtype=array.dtype)
    for index in np.ndindex(*target.shape):
        where = np.linalg.solve(source.affine, target.affine @ [*index, 1.0])[:3]
        nearest = np.floor(where + 0.5).astype(int)
        if all(0 <= n < s for n, s in zip(nearest, source.shape, strict=True)):
            out[index] = array[tuple(nearest)]
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_nearest_resampling_agrees_with_a_naive_oracle(seed: int):
    rng = np.random.default_rng(seed)
    affines = []
    for _ in range(2):
        affine = np.eye(4)
        affine[:3, :3] = rotation(*rng.uniform(-0.4, 0.4, 3)) @ np.diag(rng.uniform(0.6, 2.0, 3))
        affine[:3, 3] = rng.uniform(-2, 2, 3)
        affines.append(affine)
    source, target = Geometry(affines[0], (7, 6, 5)), Geometry(affines[1], (5, 6, 7))
    array = rng.integers(1, 9, source.shape).astype(np.uint8)
    out = resample(array, source, target, order=0, fill=0)
    assert out.shape == target.shape
    inner = naive_nearest(array, source, target, 0)
    both = (out > 0) & (inner > 0)
    assert np.array_equal(out[both], inner[both])
    # scipy calls a point outside from the outermost voxel centres on, the oracle from the voxels' edges on
    assert not ((out > 0) & (inner == 0)).any()


def test_resampling_onto_its_own_grid_changes_nothing():
    geometry = Geometry(np.diag([1.0, 2, 3, 1]), (5, 6, 7))
    array = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    np.testing.assert_allclose(resample(array, geometry, geometry, order=1, fill=0), array, atol=1e-6)


@pytest.fixture
def chain(tmp_path: Path) -> HashChain:
    chain = HashChain(tmp_path / "log" / "audit.jsonl")
    for number in range(4):
        chain.append("event", number=number, name="Zoë")
    return chain


def test_a_chain_reads_back_what_was_written(chain: HashChain):
    records = chain.records()
    assert [r["fields"]["number"] for r in records] == [0, 1, 2, 3]
    assert [r["n"] for r in records] == [0, 1, 2, 3]
    assert records[0]["previous"] == GENESIS
    assert chain.head == records[-1]["hash"]
    assert chain.path.stat().st_mode & 0o777 == 0o600


def test_an_absent_chain_is_empty(tmp_path: Path):
    chain = HashChain(tmp_path / "none.jsonl")
    assert (chain.records(), chain.head) == ([], GENESIS)
    assert not chain.path.exists()


def test_any_changed_byte_is_found(chain: HashChain):
    content = chain.path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        chain.path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            chain.records()
        if position % 50 == 0:
            with pytest.raises(IntegrityError):
                chain.append("more")
            assert chain.path.read_bytes() == changed


def test_any_removed_doubled_or_swapped_line_is_found(chain: HashChain):
    lines = chain.path.read_bytes().splitlines(keepends=True)
    for order in ([1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 1, 2, 3], [0, 2, 1, 3], [3]):
        chain.path.write_bytes(b"".join(lines[i] for i in order))
        with pytest.raises(IntegrityError):
            chain.records()


def test_a_tail_cut_within_a_line_is_found(chain: HashChain):
    content = chain.path.read_bytes()
    ends = {i + 1 for i, byte in enumerate(content) if byte == ord("\n")} | {0}
    for length in range(len(content)):
        chain.path.write_bytes(content[:length])
        if length in ends:  # a whole number of lines is a valid, older chain: only a head kept elsewhere shows it
            assert len(chain.records()) == content[:length].count(b"\n")
            continue
        with pytest.raises(IntegrityError):
            chain.records()


@pytest.mark.parametrize("line", [b"[]\n", b"null\n", b"5\n", b"{}\n", b"\xff\xfe\n", b"\n", b'{"hash": 1, "n": 4}\n'])
def test_a_foreign_line_is_found(chain: HashChain, line: bytes):
    with chain.path.open("ab") as stream:
        stream.write(line)
    with pytest.raises(IntegrityError):
        chain.records()


def _append_many(path: Path) -> None:
    for number in range(25):
        HashChain(path).append("event", process=os.getpid(), number=number)


def test_two_processes_appending_leave_one_whole_chain(tmp_path: Path):
    path = tmp_path / "chain.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    records = HashChain(path).records()
    assert len(records) == 50
    assert len({r["fields"]["process"] for r in records}) == 2


def test_write_atomic_replaces_whole_and_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch):
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"old", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checks.os, "replace", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_write_atomic_leaves_no_draft_behind_whatever_stops_it(tmp_path: Path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checks.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == []


def test_write_atomic_says_when_the_folder_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError):
        write_atomic(tmp_path / "file" / "below", b"x")


def test_digests_and_folders_are_checked(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "a") == digest
    assert existing_folder(tmp_path, "The folder") == tmp_path
    (tmp_path / "empty").mkdir()
    for bad in ("empty", "missing", "a"):
        with pytest.raises(DataError):
            existing_folder(tmp_path / bad, "The folder")


def every_error() -> list[type[MedlsdmError]]:
    return [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, MedlsdmError)]


def test_every_error_is_drawn_in_the_tree_with_its_exit_status():
    drawn = dict(re.findall(r"(\w+Error)\s+exit (\d+)", errors.__doc__ or ""))
    assert drawn == {c.__name__: str(c.exit_status) for c in every_error()}


def test_every_error_has_its_own_code_and_public_text():
    classes = every_error()
    assert len({c.code for c in classes}) == len(classes)
    assert len({c.public_text for c in classes}) == len(classes)
    statuses = [c.exit_status for c in classes if c.__bases__ == (MedlsdmError,) or c is MedlsdmError]
    assert len(set(statuses)) == len(statuses)
    assert all(c.public_text == c("secret", "hint").public_text for c in classes)
    assert str(DataError("What happened.", "What to do.")) == "What happened. What to do."


def program(body: str, *arguments: str, debug: bool = False) -> subprocess.CompletedProcess[str]:
    code = f"""
import typer
from medlsdm import errors
from medlsdm.terminal import print_json, run
app = typer.Typer()
@app.callback()
def main() -> None:
    "Test."
@app.command()
def go(json: bool = False, number: int = 0) -> None:
    {body}
run(app, "prog")
"""
    environment = {k: v for k, v in os.environ.items() if k != "MEDLSDM_DEBUG"} | (
        {"MEDLSDM_DEBUG": "1"} if debug else {}
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.parametrize(
    ("body", "arguments", "status", "words"),
    [
        ("raise errors.GateError('Refused.', 'Look.')", ["go"], 11, "prog: Refused. Look."),
        ("raise ValueError('private text')", ["go"], 1, "prog: Unexpected ValueError."),
        ("raise MemoryError", ["go"], 12, "prog: Memory ran out."),
        ("raise PermissionError(13, 'Permission denied')", ["go"], 12, "prog: The system refused: Permission denied."),
        ("raise KeyboardInterrupt", ["go"], 130, "prog: stopped"),
        ("pass", ["go", "--number", "x"], 2, "prog: Invalid value"),
        ("pass", ["nonsense"], 2, "prog: No such command"),
    ],
)
def test_each_mistake_is_one_line_and_its_exit_status(body: str, arguments: list[str], status: int, words: str):
    done = program(body, *arguments)
    assert done.returncode == status
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "private text" not in done.stderr
    assert done.stdout == ""


def test_json_errors_are_one_document_on_stdout():
    done = program("raise errors.GateError('Refused.', 'Look.')", "go", "--json")
    assert json.loads(done.stdout) == {"error": {"code": "gate", "message": "Refused.", "hint": "Look."}}
    assert done.returncode == 11


def test_the_trace_is_shown_only_when_asked_for():
    assert "Traceback" in program("raise ValueError('x')", "go", debug=True).stderr


def test_success_is_silent_and_json_is_valid():
    done = program("print_json({'a': 'Zoë', 'path': __import__('pathlib').Path('x')})", "go")
    assert (done.returncode, done.stderr, json.loads(done.stdout)) == (0, "", {"a": "Zoë", "path": "x"})
