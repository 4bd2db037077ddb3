"""The evidence of one study as a page for a privacy officer: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.resources import files
from string import Template
from typing import Any

from deid_tools.tally import Fate

Row = Mapping[str, Any]
_GROUPS = {
    0x0002: "The file itself",
    0x0008: "Study, institution, people",
    0x0010: "Patient",
    0x0018: "Acquisition and device",
    0x0020: "Order and position",
    0x0028: "Image",
    0x0032: "Requests",
    0x0038: "Visit",
    0x0040: "Procedures",
}
_REST = "Other"
_FATES = {
    Fate.REMOVED: ("Removed", "What stood there is gone, and so is the attribute."),
    Fate.EMPTIED: ("Removed, put back empty", "The standard asks for the attribute; it holds nothing now."),
    Fate.PSEUDONYM: ("Replaced by the pseudonym", "The same for a patient in every study of this project."),
    Fate.UID: ("Replaced by new identifiers", "Computed under the site's key: equal in, equal out, not to be undone."),
    Fate.DATE: ("Dates moved", "By one number of whole days for each patient."),
    Fate.AGE: ("Ages changed", "From 90 years on, or to bands of five years."),
    Fate.WORDS: ("Descriptions cleaned", "Only words of a list and short measures stay."),
    Fate.OVERWRITTEN: ("Replaced by a fixed value", "The same in every file that this program writes."),
    Fate.KEPT: ("Kept as it is", "What the recipe lets stay: numbers, positions, terms, and what its options add."),
    Fate.CHANGED: ("Kept with changes", "Renumbered, recomputed, or terms left out that are not the standard's."),
    Fate.REBUILT: ("Sequences built anew", "Item by item, of numbers, known terms, codes and new identifiers only."),
    Fate.ADDED: ("Added by this program", "Stamps and fixed values."),
    Fate.ADDED_EMPTY: ("Added, empty", "The standard asks for the attribute; it holds nothing."),
}
_FACES = {
    "removed": "removed",
    "no head": "no head in it",
    "no face in view": "no face in view",
    "left as it is": "left as it is",
}
INSIDE = "This page shows originals. It stays inside the hospital."


def render(document: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the page.

    Args:
        document: The evidence of one study.
        pictures: PNG by ``TOKEN before``, ``TOKEN after`` and ``TOKEN face``; empty for none.
    """
    sections = [
        _note("bad", INSIDE, ["The pictures below were taken before and after de-identification."]) if pictures else "",
        _verdict(document),
        _overview(document),
        *(_series(row, pictures) for row in document["series"]),
        _held(document["held"]),
        _node(document.get("node")),
        _checks(document),
        _rules(document),
    ]
    template = Template(files("deid_tools").joinpath("evidence_template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title="What was done to one study",
        subtitle=f"Patient <code>{_e(document['patient'])}</code>, study <code>{_e(document['study'])}</code>, "
        f"{_e(document['made'].replace('T', ' ').replace('+00:00', ' UTC'))}. This report names attributes and counts "
        "files; it holds no value of an original.",
        sections="\n".join(filter(None, sections)),
    )


def _e(value: object) -> str:
    return html.escape(str(value))


def _short(row: Row) -> str:
    return row["token"].split("/")[1]


def _note(kind: str, title: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li>{_e(line)}</li>" for line in lines)
    return f'<div class="note {kind}"><p><b>{_e(title)}</b></p>{f"<ul>{items}</ul>" if items else ""}</div>'


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{_e(title)}</h2>\n{body}\n</section>"


def _verdict(document: Mapping[str, Any]) -> str:
    passed, held = len(document["series"]), document["held"]["files"]
    head = f"{_number(passed, 'series', 'series')} passed, {_number(held, 'file')} held."
    notes = [_note("good" if passed else "warn", head, [])]
    search = document["pixels"]["text_search"]
    concerns = [f"Weaker than the default: {line}." for line in document["weaker"]]
    if "not installed" in search:
        concerns.append(f"{search[0].upper()}{search[1:]}.")
    for row in document["series"]:
        if row["label_maps_held"]:
            concerns.append(f"Series {_short(row)}: {_number(row['label_maps_held'], 'label map')} held.")
        if row["already_there"] and not row.get("done"):
            concerns.append(f"Series {_short(row)}: done by an earlier run, whose counts are not here.")
    notes.append(
        _note("warn", "To be looked at", concerns)
        if concerns
        else _note("good", "Nothing is weaker than the default.", [])
    )
    return "\n".join(notes)


def _overview(document: Mapping[str, Any]) -> str:
    head = ("Series", "Kind", "Images", "Label maps", "Removed", "Replaced", "Kept", "Text boxes", "Face", "Checked")
    rows = []
    for row in document["series"]:
        counts = [_distinct(row, fates) for fates in (_GONE, _NEW, (Fate.KEPT, Fate.CHANGED, Fate.REBUILT))]
        cells = [row["images"], row["label_maps"], *counts, row["text_boxes_blanked"]]
        rows.append(
            f"<tr><td><code>{_e(_short(row))}</code></td><td>{_e(row['modality'])}</td>"
            + "".join(f'<td class="n">{_e(cell)}</td>' for cell in cells)
            + f"<td>{_e(_FACES.get(row['face'], row['face'] or 'not looked for'))}</td>"
            f'<td class="n">{_number(row["checked"], "file")}</td></tr>'
        )
    if not rows:
        return ""
    titles = "".join(f"<th{' class=n' if 1 < k < 8 or k == 9 else ''}>{name}</th>" for k, name in enumerate(head))
    table = f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return _section("Series", table + '<p class="soft">Removed, replaced and kept count different attributes.</p>')


_GONE = (Fate.REMOVED, Fate.EMPTIED)
_NEW = (Fate.PSEUDONYM, Fate.UID, Fate.DATE, Fate.AGE, Fate.WORDS, Fate.OVERWRITTEN)


def _distinct(row: Row, fates: Iterable[Fate]) -> int:
    return len({keyword for fate in fates for keyword in row["attributes"].get(fate, {})})


def _series(row: Row, pictures: Mapping[str, bytes]) -> str:
    said = [
        f"Transfer syntax before: {name} ({_number(count, 'file')})."
        for name, count in row["transfer_syntaxes"].items()
    ]
    if row["face"]:
        guard = f", guarded by {row['face_guard']}" if row["face_guard"] else ""
        said.append(f"Face: {_FACES.get(row['face'], row['face'])}{guard}.")
    said += [f"Burned-in text: {_number(row['text_boxes_blanked'], 'box', 'boxes')} blanked."]
    said += [f"{what[0].upper()}{what[1:]}: {count}." for what, count in row["unreadable"].items()]
    said += [f"Geometry: {note}." for note in row["notes"]]
    said += [f"Done on {row['done']} by an earlier run."] if row.get("done") else []
    body = [_pictures(row["token"], pictures), f"<ul>{''.join(f'<li>{_e(line)}</li>' for line in said)}</ul>"]
    if row["others"]:
        items = "".join(f"<li>{count:,} {_e(what)}</li>" for what, count in row["others"].items())
        body.append(
            "<h3>Without a name in the standard</h3><p class='soft'>Counted over all files. Private elements, their "
            f"makers and unknown elements are not named.</p><ul>{items}</ul>"
        )
    body += [_fate(fate, row) for fate in _FATES if row["attributes"].get(fate)]
    return _section(f"Series {_short(row)} ({row['modality']}, {_number(row['images'], 'image')})",
                    "\n".join(body))  # fmt: skip


def _pictures(token: str, pictures: Mapping[str, bytes]) -> str:
    shown = []
    for what, css, caption in (
        ("before", "slice", "Before: the original, middle slice"),
        ("after", "slice", "After: the same slice as it was stored"),
        ("face", "face", "The face, before (above) and after (below): front, side, middle slice"),
    ):
        content = pictures.get(f"{token} {what}")
        if content:
            data = base64.b64encode(content).decode()
            image = f'<img alt="{_e(caption)}" src="data:image/png;base64,{data}">'
            shown.append(f'<figure class="{css}">{image}<figcaption>{_e(caption)}</figcaption></figure>')
    return f'<div class="pictures">{"".join(shown)}</div>' if shown else ""


def _fate(fate: Fate, row: Row) -> str:
    """List the attributes of one fate by what they speak of; a number where not every header had it."""
    from pydicom.datadict import dictionary_description, tag_for_keyword

    groups: dict[str, list[str]] = defaultdict(list)
    listed = row["attributes"][fate]
    for keyword, count in listed.items():
        tag = tag_for_keyword(keyword)
        name = dictionary_description(tag) if tag is not None else keyword
        few = f" <small>({_number(count, 'file')})</small>" if count != row["headers"] else ""
        groups[_GROUPS.get((tag or 0) >> 16, _REST)].append(f"{_e(name)}{few}")
    title, meaning = _FATES[fate]
    cells = "".join(
        f"<tr><th>{_e(group)}</th><td>{', '.join(sorted(groups[group]))}</td></tr>"
        for group in (*_GROUPS.values(), _REST)
        if group in groups
    )
    return (
        f"<h3>{_e(title)}: {_number(len(listed), 'attribute')}</h3><p class='soft'>{_e(meaning)}</p>"
        f"<table><tbody>{cells}</tbody></table>"
    )


def _held(held: Mapping[str, Any]) -> str:
    if not held["files"]:
        return ""
    cells = "".join(
        f'<tr><td>{_e(reason)}</td><td class="n">{count}</td></tr>' for reason, count in held["reasons"].items()
    )
    return _section(
        "Held: not taken",
        f'<table><thead><tr><th>Reason</th><th class="n">Files</th></tr></thead><tbody>{cells}</tbody></table>',
    )


def _node(node: Mapping[str, Any] | None) -> str:
    if not node:
        return ""
    lines = [f"{_number(node['pairs'], 'volume')} with label map in the vault of {node['site']}."]
    lines += [f"Not stored: series {token.split('/')[1]}: {reason}" for token, reason in node["series_held"].items()]
    lines += [f"Settings (deid.yaml) {node['settings'][:16]}, came in as: {node['origin']}."]
    return _section("In the node", f"<ul>{''.join(f'<li>{_e(line)}</li>' for line in lines)}</ul>")


def _checks(document: Mapping[str, Any]) -> str:
    second = document["second_pass"]
    if not second["files"]:
        return ""
    items = "".join(f"<li>{_e(check[0].upper() + check[1:])}.</li>" for check in second["checks"])
    text = (
        f"{_number(second['files'], 'file')} checked after writing, by code of its own; {second['problems']} problems."
    )
    return _section("The second pass", f"<p>{text}</p><ul>{items}</ul>")


def _rules(document: Mapping[str, Any]) -> str:
    recipe, pixels = document["recipe"], document["pixels"]
    rows = {
        "Recipe": " + ".join([recipe["name"], *recipe["options"]]),
        "Digest of the recipe": recipe["sha256"],
        "Codes (PS3.16 CID 7050)": ", ".join(recipe["codes"]),
        "Name of the key": document["key_id"],
        "Burned-in text": f"{pixels['burned_in_text']}; {pixels['text_search']}",
        "Faces": pixels["faces"],
        "Device rules": pixels["device_rules"],
        "Programs": ", ".join(f"{name} {version}" for name, version in document["tools"].items()),
        "Files of this run without a study": document["files_of_no_study"],
    }
    cells = "".join(f"<tr><th>{_e(name)}</th><td>{_e(value)}</td></tr>" for name, value in rows.items())
    return _section("Rules and programs", f"<table><tbody>{cells}</tbody></table>")


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
