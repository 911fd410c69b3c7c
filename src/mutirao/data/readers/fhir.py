"""HL7 FHIR bundles (JSON, releases 4 and 5): the text of each resource as a record.

Of a resource are taken: its narrative, as visible text; notes, conclusions, descriptions and
summaries; attachments of plain text or HTML, as in DocumentReference. The patient that a resource
refers to is its unit, kept as a hash. Coded values without text are left out.

References:
    HL7 FHIR R5, https://hl7.org/fhir/R5/: Bundle, Narrative, Annotation, Attachment.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from typing import Any

from mutirao.data.readers.documents import visible_text
from mutirao.data.readers.opening import Source, read_whole
from mutirao.data.readers.rows import hash_unit
from mutirao.data.records import Record

_TEXT_KEYS = ("conclusion", "description", "summary", "clinicalNotes", "patientInstruction")
_SUBJECT_KEYS = ("subject", "patient", "beneficiary")


def read_bundle(source: Source) -> Iterator[Record]:
    """Yield a record for each resource of a bundle that has text."""
    data = read_whole(source)
    if data is None:
        return
    try:
        bundle = json.loads(data)
    except (ValueError, RecursionError):
        source.tell("broken JSON file", "is not JSON (expected a FHIR bundle)")
        return
    if not isinstance(bundle, dict) or "resourceType" not in bundle:
        source.tell(
            "JSON of another kind", "is no FHIR bundle or resource (it has no resourceType)"
        )
        return
    for number, resource in enumerate(_resources(bundle), start=1):
        text = "\n\n".join(_texts(source, resource, number))
        if text:
            yield Record(
                id=f"{source.name}#{number}",
                source=source.name,
                text=text,
                unit=hash_unit(_subject(resource)),
            )


def _resources(bundle: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if bundle["resourceType"] != "Bundle":
        yield bundle
        return
    for entry in _list(bundle.get("entry")):
        resource = entry.get("resource") if isinstance(entry, dict) else None
        if isinstance(resource, dict):
            yield resource


def _texts(source: Source, resource: dict[str, Any], number: int) -> Iterator[str]:
    narrative = resource.get("text")
    if isinstance(narrative, dict) and isinstance(narrative.get("div"), str):
        yield from _kept(visible_text(narrative["div"]))
    for key in _TEXT_KEYS:
        yield from _kept(resource.get(key))
    for note in _list(resource.get("note")):
        if isinstance(note, dict):
            yield from _kept(note.get("text"))
    for content in (*_list(resource.get("content")), *_list(resource.get("presentedForm"))):
        attachment = content.get("attachment", content) if isinstance(content, dict) else None
        if isinstance(attachment, dict):
            yield from _attached(source, attachment, number)


def _attached(source: Source, attachment: dict[str, Any], number: int) -> Iterator[str]:
    kind, data = str(attachment.get("contentType", "")), attachment.get("data")
    if not isinstance(data, str) or not kind.startswith(("text/plain", "text/html")):
        return
    try:
        text = base64.b64decode(data, validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        reason = "has an attachment that is no text in base64 and UTF-8"
        source.tell("damaged attachment", reason, f"#{number}")
        return
    yield from _kept(visible_text(text) if kind.startswith("text/html") else text)


def _kept(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.strip():
        yield value.strip()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _subject(resource: dict[str, Any]) -> str | None:
    if resource.get("resourceType") == "Patient" and isinstance(resource.get("id"), str):
        return f"Patient/{resource['id']}"
    for key in _SUBJECT_KEYS:
        value = resource.get(key)
        if isinstance(value, dict) and isinstance(value.get("reference"), str):
            reference: str = value["reference"]
            return reference
    return None
