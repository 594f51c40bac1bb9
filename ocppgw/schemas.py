"""What is wrong with a payload, by the JSON schemas of OCPP: by version, action and direction.

The schemas are those of the Open Charge Alliance, as the package ``ocpp`` carries them, or the operator's own in a
directory. Each is compiled once, at start, for a validator in Rust: it takes 1 us for MeterValues where the quickest
one in Python takes 9, and it tells of all that is wrong at once. Pure: no I/O once they are loaded.

The schemas of 1.6 in that package have the errata in them (OCPP-J 1.6 errata 2.2 to 2.5 and 3.1: SendLocalList,
integers in BootNotification and UpdateFirmware, StopTransaction's optional reason, no extra fields); a test sees to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, Protocol


class SchemaError(Exception):
    """Schemas that cannot be used; the text is the one line that the operator sees."""


@dataclass(frozen=True, slots=True)
class Violation:
    """What is wrong. kind: "unknown_action", "format", "occurrence", "type" or "property".

    detail: where and what, without the value itself, which may be a password.
    """

    kind: str
    detail: str


class _Validator(Protocol):
    def is_valid(self, instance: Any) -> bool: ...

    def iter_errors(self, instance: Any) -> Iterator[Any]: ...


# Of several keywords that fail the first kind decides; a keyword that is not here is about a property.
_KINDS = {
    "additionalProperties": "format",
    "required": "occurrence",
    "minItems": "occurrence",
    "maxItems": "occurrence",
    "type": "type",
}
_ORDER = ("format", "occurrence", "type", "property")
_FOLDERS = {"ocpp1.6": "v16", "ocpp2.0.1": "v201", "ocpp2.1": "v21"}
MAX_DETAIL = 255
"""Characters of a detail: it becomes the description of a CALLERROR (Part 4 of 2.x, 4.2.3)."""
MAX_ERRORS = 100
"""Faults of one payload that are looked at, since there may be as many as it has elements."""
SIGNED = "-Signed"
"""The end of an action whose payload is a JSON Web Signature of any payload (Part 4 of 2.x, 7.1)."""


class Schemas:
    """The compiled schemas of all versions."""

    def __init__(self, validators: dict[tuple[str, str, bool], _Validator]) -> None:
        self._validators = validators

    @classmethod
    def load(cls, directory: Path | None = None) -> Schemas:
        """Compile all schemas. directory: with a folder for each version (``ocpp1.6`` and so on), or files of 1.6.

        A file is named ``<Action>.json`` or ``<Action>Request.json``, and ``<Action>Response.json``.
        Raises SchemaError.
        """
        try:
            import jsonschema_rs
        except ImportError:
            raise SchemaError("message_format_checking needs jsonschema-rs: pip install 'ocppgw[schemas]'") from None
        validators: dict[tuple[str, str, bool], _Validator] = {}
        for version, name, text in _files(directory):
            try:
                schema = json.loads(text.decode("utf-8-sig"))
                validator = jsonschema_rs.validator_for(schema, validate_formats=True, mask="it")
            except Exception as error:
                raise SchemaError(f"schema {name} of {version} cannot be used: {str(error).splitlines()[0]}") from None
            is_response = name.endswith("Response")
            action = name.removesuffix("Response").removesuffix("Request")
            validators[version, action, is_response] = validator
        if not validators:
            raise SchemaError(f"{directory}: has no schemas")
        return cls(validators)

    def check(self, version: str, action: str, is_response: bool, payload: Any) -> Violation | None:
        """Look at the payload of a CALL or SEND, or of the answer to one. None: nothing is wrong."""
        validator = self._validators.get((version, action, is_response))
        if validator is None:
            return None if is_response or _is_signed(version, action) else Violation("unknown_action", "unknown action")
        if type(payload) is not dict:
            return Violation("format", "the payload is not an object")
        try:
            if validator.is_valid(payload):
                return None
            return _worst(validator, payload)
        except UnicodeEncodeError:
            # Lone surrogates, which the validator cannot be given: it gets question marks in their place.
            text = json.dumps(payload, ensure_ascii=False, default=float).encode("utf-8", "replace")
            return _worst(validator, json.loads(text))


def _worst(validator: _Validator, payload: Any) -> Violation | None:
    violations = map(_violation, islice(validator.iter_errors(payload), MAX_ERRORS))
    return min(violations, key=lambda violation: _ORDER.index(violation.kind), default=None)


def _is_signed(version: str, action: str) -> bool:
    return version != "ocpp1.6" and action.endswith(SIGNED)


def _violation(error: Any) -> Violation:
    keyword = str(error.schema_path[-1]) if error.schema_path else ""
    where = ".".join(str(step) for step in error.instance_path)
    detail = (f"{where}: {error.message}" if where else str(error.message))[:MAX_DETAIL]
    # The names in it are the peer's.
    detail = "".join(character if character.isprintable() else "?" for character in detail)
    return Violation(_KINDS.get(keyword, "property"), detail)


def _files(directory: Path | None) -> Iterator[tuple[str, str, bytes]]:
    if directory is None:
        try:
            package = resources.files("ocpp")
        except ModuleNotFoundError:
            raise SchemaError(
                "message_format_checking needs the schemas of the package ocpp: pip install 'ocppgw[schemas]', or "
                "json_schema_dir"
            ) from None
        places = [(version, package / folder / "schemas") for version, folder in _FOLDERS.items()]
    else:
        folders = [(version, directory / version) for version in _FOLDERS]
        present = [(version, folder) for version, folder in folders if folder.is_dir()]
        places = list(present or [("ocpp1.6", directory)])
    for version, place in places:
        try:
            for entry in place.iterdir():
                if entry.name.endswith(".json"):
                    yield version, entry.name.removesuffix(".json"), entry.read_bytes()
        except OSError as error:
            raise SchemaError(f"{place}: cannot be read: {error.strerror}") from None
