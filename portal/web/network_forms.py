"""How the forms of the network are read, where something is typed otherwise than a service wants it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask_babel import gettext

from portal.errors import Error, Invalid, NotFound
from portal.models import Lease, Machine
from portal.services import leases, machines, network_openings
from portal.services.network_openings import Wish
from portal.web.forms import Form
from portal.web.frame import told

WISH_FIELDS = ("protocol", "first_port", "last_port", "source", "reason", "ends_at")
NUMBERS_OF_VALUES: Mapping[str, tuple[str, ...]] = {
    "MX": ("priority",),
    "SRV": ("priority", "weight", "port"),
    "CAA": ("flags",),
}
FORMS_OF_VALUES = {
    "MX": "10 mail.example.org",
    "SRV": "10 5 8443 gpu-01.example.org",
    "CAA": "0 issue letsencrypt.org",
}


CALLED = {"machine_id": "machine", "lease_id": "lease"}  # what a service calls a field → what the forms do


def optional_number(form: Form, name: str) -> int | None:
    return form.number(name) if form.text(name) else None


def wish(form: Form) -> Wish:
    """The opening that was typed. Raises Invalid that names every faulty field."""
    return network_openings.wish(
        protocol=form.text("protocol"),
        first_port=form.number("first_port"),
        last_port=optional_number(form, "last_port"),
        source=form.needed("source"),
        reason=form.optional("reason"),
        ends_at=form.moment("ends_at") if form.text("ends_at") else None,
    )


def whose(form: Form) -> tuple[Machine | None, Lease | None]:
    """The machine and the lease that were typed. Raises Invalid where there is none."""
    machine = machines.named(form.text("machine")) if form.text("machine") else None
    number = optional_number(form, "lease")
    try:
        return machine, None if number is None else leases.get(number)
    except NotFound as error:
        raise Invalid({"lease": [error.message]}) from None


def values(form: Form, kind: str) -> list[Any]:
    """One value a line, as a service wants those of this type. Raises Invalid that names the line."""
    found = []
    for number, line in enumerate(_lines(form), 1):
        try:
            found.append(_value(kind, line))
        except ValueError:
            example = FORMS_OF_VALUES[kind]
            fault = gettext("Line %(number)s: write it as in “%(example)s”.", number=number, example=example)
            raise Invalid({"values": [fault]}) from None
    return found


def _lines(form: Form) -> list[str]:
    return [line.strip() for line in form.raw("values").splitlines() if line.strip()]


def _value(kind: str, line: str) -> Any:
    if kind not in NUMBERS_OF_VALUES:
        return line
    names = NUMBERS_OF_VALUES[kind]
    *numbers, rest = line.split(maxsplit=len(names))
    if len(numbers) != len(names):
        raise ValueError(line)
    found: dict[str, Any] = {name: int(text) for name, text in zip(names, numbers, strict=True)}
    if kind != "CAA":
        return found | {"target": rest}
    tag, content = rest.split(maxsplit=1)
    return found | {"tag": tag, "value": content.removeprefix('"').removesuffix('"')}


def refused(form: Form, error: Error) -> Form:
    """The form with the reason, each at its field."""
    if not isinstance(error, Invalid):
        return form.refused(error)
    fields: dict[str, list[str]] = {}
    for name, texts in error.fields.items():
        head, _, place = name.partition(".")
        field = CALLED.get(head, head)
        said = [told(text) for text in texts]
        if place.isdigit():
            said = [gettext("Line %(number)s: %(fault)s", number=int(place) + 1, fault=text) for text in said]
        fields.setdefault(field, []).extend(said)
    return form.refused(Invalid(fields))
