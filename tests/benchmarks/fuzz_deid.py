"""Feed mutated real files to the de-identification: every one must be accepted or held with a reason.

    python tests/benchmarks/fuzz_deid.py [DATA] [--cases 5000] [--seed 1] [--first 0]

Each case is one mutated file in a folder of its own, run through the whole pipeline. A case fails when
the program crashes, hangs, raises or says anything (libraries quote values), writes outside its output
folder, changes its source, leaves the file out of the report, or lets through what the verifier or a search
for planted tokens objects to.
The same seed and number give the same case: ``--first N --cases 1`` repeats it.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import logging
import os
import random
import re
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deid_tools.answers import AnswerKey, plant_series
from deid_tools.corners import Planter
from deid_tools.keys import SiteKeys
from deid_tools.pipeline import deidentify
from deid_tools.score import leaks_in
from deid_tools.verify import verify_folder

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
KEYS = SiteKeys.derive(bytes(range(32)), "fuzz")
CASE_SECONDS = 30  # of processor time
HANG_SECONDS = 600  # of silence, on a machine that may be busy
MEMORY = 6 * 1024**3
SIDE = 12
_VRS = b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OW PN SH SL SQ SS ST TM UC UI UL UN UR US UT ZZ".split()
_ELEMENT = re.compile(rb"[\x02-\x54]\x00..(AE|AS|CS|DA|DS|DT|IS|LO|LT|PN|SH|SQ|ST|TM|UI|UL|US|UN|OB|OW|UT)", re.DOTALL)


@dataclass(frozen=True)
class Seed:
    """Hold one small real file, with tokens planted in it where it is an image."""

    suffix: str
    content: bytes
    tokens: tuple[str, ...] = ()


def seeds(data: Path, folder: Path) -> list[Seed]:
    """Shrink one file of every kind at hand to a few kilobytes: real headers, few pixels."""
    import pydicom

    found: dict[str, Seed] = {}
    for path in sorted(p for p in data.rglob("*") if p.is_file()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ds = pydicom.dcmread(path)
                kind = f"{ds.get('SOPClassUID', '')}/{ds.get('Manufacturer', '')}/{ds.file_meta.TransferSyntaxUID}"
                if kind in found:
                    continue
                found[kind] = Seed(".dcm", _small(ds, path))
            except Exception:  # not DICOM: not a seed
                continue
    return [*found.values(), *_planted(data, folder), *_compressed(data), _nifti()]


def _small(ds, path: Path) -> bytes:
    if "PixelData" not in ds or path.stat().st_size < 40_000 or ds.file_meta.TransferSyntaxUID.is_compressed:
        return path.read_bytes()
    if ds.get("NumberOfFrames") or ds.get("SamplesPerPixel") != 1:
        return path.read_bytes()
    _crop(ds)
    stream = io.BytesIO()
    ds.save_as(stream)
    return stream.getvalue()


def _crop(ds) -> None:
    ds.PixelData = np.ascontiguousarray(ds.pixel_array[:SIDE, :SIDE]).tobytes()
    ds.Rows = ds.Columns = SIDE


def _planted(data: Path, folder: Path) -> list[Seed]:
    """Plant tokens into cropped images of three series, one for each character set."""
    import pydicom

    planted = []
    for script, name in (
        ("latin", "ct-philips-phantom"),
        ("japanese", "mr-siemens-brain"),
        ("utf-8", "ct-ge-gantry-tilt"),
    ):
        path = min(p for p in (data / name).rglob("*") if p.is_file() and p.stat().st_size > 50_000)
        small = folder / name
        ds = pydicom.dcmread(path)
        _crop(ds)
        ds.save_as(small)
        key = AnswerKey()
        plant_series([small], folder / f"{name}-planted", key, patient=name, study="1", series="1", script=script)
        content = next((folder / f"{name}-planted").rglob("*.dcm")).read_bytes()
        tokens = tuple(p.token for p in key.plants if "name" not in p.place or "Name" in p.place)
        planted.append(Seed(".dcm", content, tokens))
    return planted


def _compressed(data: Path) -> list[Seed]:
    """Compress a small real image in each way that is admitted: decoders meet mutated streams too."""
    import pydicom
    from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

    path = min(p for p in (data / "ct-philips-phantom").rglob("I*") if p.is_file())
    made = []
    for syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        ds = pydicom.dcmread(path)
        ds.PixelData = np.ascontiguousarray(ds.pixel_array[200:232, 200:232]).tobytes()
        ds.Rows = ds.Columns = 32
        ds.compress(syntax, generate_instance_uid=False)
        stream = io.BytesIO()
        ds.save_as(stream)
        made.append(Seed(".dcm", stream.getvalue()))
    return made


def _nifti() -> Seed:
    import nibabel as nib

    image = nib.Nifti1Image(np.arange(60, dtype=np.uint8).reshape(3, 4, 5) // 20, np.eye(4))
    image.header["descrip"] = Planter("fuzz").word("nifti", "descrip").encode()
    return Seed(".nii.gz", gzip.compress(image.to_bytes(), mtime=0), tuple(Planter("fuzz").plants))


_KEYWORDS = (
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel", "PixelRepresentation"),
    *("NumberOfFrames", "ImagePositionPatient", "PixelSpacing", "SpecificCharacterSet", "TransferSyntaxUID"),
)
Mutation = Callable[[random.Random, bytes], bytes]


def flip(draw: random.Random, content: bytes) -> bytes:
    """Change a few bytes, most of them in the header."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16, 200))):
        reach = len(changed) if draw.random() < 0.3 else min(len(changed), 3000)
        changed[draw.randrange(reach)] = draw.randrange(256)
    return bytes(changed)


def truncate(draw: random.Random, content: bytes) -> bytes:
    """Cut the end off."""
    return content[: draw.randrange(len(content))]


def extend(draw: random.Random, content: bytes) -> bytes:
    """Add bytes at the end."""
    return content + draw.randbytes(draw.choice((1, 2, 100, 5000)))


def move(draw: random.Random, content: bytes) -> bytes:
    """Copy or drop a stretch."""
    start = draw.randrange(len(content))
    stretch = content[start : start + draw.randrange(1, 400)]
    if draw.random() < 0.5:
        return content[:start] + content[start + len(stretch) :]
    place = draw.randrange(len(content))
    return content[:place] + stretch + content[place:]


def _an_element(draw: random.Random, content: bytes) -> int | None:
    places = [m.start() for m in _ELEMENT.finditer(content, 132)]
    return draw.choice(places) if places else None


def length(draw: random.Random, content: bytes) -> bytes:
    """Declare a length that is not so: billions of characters, odd, undefined."""
    place = _an_element(draw, content)
    if place is None:
        return flip(draw, content)
    changed = bytearray(content)
    value = draw.choice((0xFFFFFFFF, 0x7FFFFFFE, 1_000_000_000, 0xFFFE, 0xFFFF, 0, 1, 3, draw.randrange(1 << 32)))
    if bytes(content[place + 4 : place + 6]) in (b"SQ", b"UN", b"OB", b"OW", b"UT"):
        changed[place + 8 : place + 12] = struct.pack("<L", value)
    else:
        changed[place + 6 : place + 8] = struct.pack("<H", value & 0xFFFF)
    return bytes(changed)


def kind(draw: random.Random, content: bytes) -> bytes:
    """Give an element another type."""
    place = _an_element(draw, content)
    if place is None:
        return flip(draw, content)
    return content[: place + 4] + draw.choice(_VRS) + content[place + 6 :]


def nest(draw: random.Random, content: bytes) -> bytes:
    """Put sequences into each other, up to five thousand deep, before some element."""
    depth = draw.choice((3, 9, 50, 900, 5000))
    place = _an_element(draw, content)
    if place is None:
        return flip(draw, content)
    head = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    tail = struct.pack("<HHL", 0xFFFE, 0xE00D, 0) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    if draw.random() < 0.5:
        return content[:place] + head * depth + tail * depth + content[place:]
    inner = b""
    for _ in range(min(depth, 900)):
        item = struct.pack("<HHL", 0xFFFE, 0xE000, len(inner)) + inner
        inner = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, len(item)) + item
    return content[:place] + inner + content[place:]


def bomb(draw: random.Random, content: bytes) -> bytes:
    """Pack gigabytes of nothing into little: deflated DICOM, gzip."""
    if content[:2] == b"\x1f\x8b":
        try:
            raw = bytearray(gzip.decompress(content))
        except (OSError, EOFError, zlib.error):  # cut or changed before: no longer gzip
            return flip(draw, content)
        raw = raw.ljust(352, b"\0")
        struct.pack_into(
            "<8h", raw, 40, 3, *draw.choice(((32767, 32767, 32767), (2000, 2000, 500), (1, 1, 1))), 1, 1, 1, 1
        )
        return gzip.compress(bytes(raw) + bytes(draw.choice((0, 10**6, 5 * 10**7))), 1, mtime=0)
    syntax = content.find(b"1.2.840.10008.1.2.1\0")
    if syntax < 0:
        return flip(draw, content)
    meta = bytearray(content[:syntax] + b"1.2.840.10008.1.2.1.99" + content[syntax + 20 :][:0])
    struct.pack_into("<H", meta, syntax - 2, 22)
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    body = packer.compress(content[syntax + 20 :])
    body += b"".join(packer.compress(bytes(10**7)) for _ in range(draw.choice((1, 8)))) + packer.flush()
    return bytes(meta) + body


def numbers(draw: random.Random, content: bytes) -> bytes:
    """Change what describes the pixels, the character set or the transfer syntax."""
    import pydicom

    if b"1.2.840.10008.1.2.1.99" in content[:1000]:
        return flip(draw, content)  # a bomb: the library would inflate it whole
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ds = pydicom.dcmread(io.BytesIO(content))
            for _ in range(draw.randrange(1, 3)):
                _change_number(draw, ds)
            stream = io.BytesIO()
            ds.save_as(stream)
            return stream.getvalue()
        except Exception:
            return flip(draw, content)


def _change_number(draw: random.Random, ds) -> None:
    keyword = draw.choice(_KEYWORDS)
    if keyword == "NumberOfFrames":
        ds.NumberOfFrames = draw.choice((0, 2, 10**6, 2**31 - 1))
    elif keyword in ("ImagePositionPatient", "PixelSpacing"):
        setattr(ds, keyword, draw.choice(("", "1e308\\1\\1", "0\\0", "1\\2\\3\\4", "-1\\-1")))
    elif keyword == "SpecificCharacterSet":
        ds.SpecificCharacterSet = draw.choice(("ISO_IR 13", "GB18030", "nonsense", "\\ISO 2022 IR 149", "ISO_IR 192"))
    elif keyword == "TransferSyntaxUID":
        syntaxes = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.70")
        ds.file_meta.TransferSyntaxUID = draw.choice((*syntaxes, "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.2"))
    else:
        setattr(ds, keyword, draw.choice((0, 1, 7, 8, 12, 16, 32, 64, 65535)))


MUTATIONS: tuple[Mutation, ...] = (
    flip,
    flip,
    truncate,
    extend,
    move,
    length,
    length,
    kind,
    kind,
    nest,
    bomb,
    numbers,
    numbers,
)
NAMES = (
    *(b"a\nb", b"-rf", b"..dcm", b"%s%n", b"$(touch x)", b"\xff\xfe\x80", b"x" * 200, "Müller\u202e".encode()),
    *(b" ", b"~", b"con", b"report.json", b".working-1", b"a\\b", b"\x1b[31mred"),
)


def case(number: int, seed: int, pool: list[Seed]) -> tuple[str, bytes, bytes, tuple[str, ...]]:
    """Return one case: what was done, the file's name, its bytes, and the tokens that must not come through."""
    draw = random.Random(f"{seed}/{number}")
    source = draw.choice(pool)
    content, done = source.content, []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        mutation = draw.choice(MUTATIONS)
        content = mutation(draw, content) or b"\0"
        done.append(mutation.__name__)
    name = draw.choice(NAMES) if draw.random() < 0.15 else f"file{number}".encode()
    return "+".join(done), name + source.suffix.encode(), content, source.tokens


class _Listener(logging.Handler):
    """Collect what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _listening() -> Iterator[list[logging.LogRecord]]:
    listener = _Listener()
    logging.getLogger().addHandler(listener)
    try:
        yield listener.records
    finally:
        logging.getLogger().removeHandler(listener)


def run_case(number: int, seed: int, pool: list[Seed], folder: Path) -> tuple[str, str]:
    """Run one case; return how it ended (accepted or the reason), and what is wrong, if anything."""
    what, name, content, tokens = case(number, seed, pool)
    root = folder / f"case{number}"
    source, out = root / "in" / "below", root / "out"
    source.mkdir(parents=True)
    path = os.path.join(os.fsencode(source), name)
    with open(path, "wb") as stream:
        stream.write(content)
    used = time.process_time()
    try:
        with warnings.catch_warnings(record=True) as said, _listening() as logged:
            warnings.simplefilter("always")
            report = deidentify(root / "in", out, KEYS)
    except Exception as error:
        shutil.rmtree(root)
        return "raised", f"{what}: {type(error).__name__}"
    wrong = ["a library warned or logged"] if said or logged else []
    if time.process_time() - used > CASE_SECONDS:
        wrong.append("took too long")
    if sorted(os.listdir(root)) != ["in", "out"] or os.listdir(os.fsencode(source)) != [name]:
        wrong.append("a file outside the output folder")
    with open(path, "rb") as stream:
        if stream.read() != content:
            wrong.append("the source was changed")
    taken = sum(s.images + s.labels for s in report.series)
    if taken + len(report.held) != 1 or report.files_seen != 1 or any(not h.reason for h in report.held):
        wrong.append("the file is not accounted for")
    wrong += [f.line() for f in verify_folder(out)]
    written = [p for p in out.rglob("*") if p.is_file()]
    if taken == 0 and written != [out / "report.json"]:
        wrong.append("files of a held series are left")
    for one in written:
        if leaks_in(str(one.relative_to(out)).encode() + one.read_bytes(), list(tokens)):
            wrong.append("a planted token came through")
    shutil.rmtree(root)
    ended = "accepted" if taken else report.held[0].reason if report.held else "nothing"
    return ended, f"{what}: {'; '.join(wrong)}" if wrong else ""


def work(first: int, cases: int, seed: int, data: Path) -> None:
    """Run a range of cases and print one line of JSON for each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from deid_tools import pixels

    pixels.shutil.which = lambda name: None  # text search apart
    with tempfile.TemporaryDirectory() as name:
        pool = seeds(data, Path(name))
        for number in range(first, first + cases):
            print(json.dumps([number, *run_case(number, seed, pool, Path(name))]), flush=True)


def supervise(first: int, cases: int, seed: int, data: Path) -> tuple[Counter[str], list[str]]:
    """Run the cases in a process that may die; start it anew behind each case that kills or stops it."""
    ends: Counter[str] = Counter()
    failures: list[str] = []
    number, last = first, first + cases
    while number < last:
        command = [sys.executable, __file__, "--work", str(number), str(last - number), str(seed), str(data)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as worker:
            assert worker.stdout is not None
            while select.select([worker.stdout], [], [], HANG_SECONDS)[0]:
                line = worker.stdout.readline()
                if not line:
                    break
                done, ended, wrong = json.loads(line)
                ends[ended] += 1
                failures += [f"case {done}: {wrong}"] if wrong else []
                number = done + 1
            else:
                worker.kill()
        if number < last:
            failures.append(f"case {number}: the process died or stopped")
            number += 1
    return ends, failures


def main() -> int:
    """Run the fuzzer; exit status 1 when a case fails."""
    if sys.argv[1:2] == ["--work"]:
        work(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=DATA)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    ends, failures = supervise(options.first, options.cases, options.seed, options.data)
    for ended, count in ends.most_common():
        print(f"{count:>6}  {ended}")
    print(f"{sum(ends.values())} cases in {time.perf_counter() - start:.0f} s, {len(failures)} failures")
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
