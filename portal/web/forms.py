"""A form that came back: what was typed, and what is wrong with it, field by field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from flask import request
from flask_babel import gettext

from portal.errors import Error, Invalid
from portal.web.frame import told


@dataclass(frozen=True)
class Form:
    """`values` are shown again; secrets are never among them."""

    values: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, list[str]] = field(default_factory=dict)
    message: str | None = None
    _sent: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of_request(cls, *, keep: Sequence[str]) -> Form:
        """The form that was posted; only the fields in `keep` are shown again after a refusal."""
        sent = {name: value for name, value in request.form.items() if name != "csrf_token"}
        return cls({name: sent[name] for name in keep if name in sent}, {}, None, sent)

    @classmethod
    def of_address(cls, *, keep: Sequence[str]) -> Form:
        """The filters of a list, as its address has them: read like a form, and shown again like one."""
        sent = {name: request.args[name] for name in keep if request.args.get(name)}
        return cls(sent, {}, None, sent)

    def refused(self, error: Error) -> Form:
        """The same form with the reason; a fault of a field stands at the field."""
        if isinstance(error, Invalid):
            faults = {name: [told(text) for text in texts] for name, texts in error.fields.items()}
            elsewhere = [text for name, texts in faults.items() if name not in self._sent for text in texts]
            return replace(self, faults=faults, message=" ".join(elsewhere) or None)
        return replace(self, message=told(error.message))

    def raw(self, name: str) -> str:
        """As typed: for secrets, whose spaces count."""
        return self._sent.get(name, "")

    def text(self, name: str) -> str:
        return self.raw(name).strip()

    def needed(self, name: str) -> str:
        """Raises Invalid that names the field if nothing was typed; the browser asked for it already."""
        text = self.text(name)
        if not text:
            raise Invalid({name: [gettext("Fill this in.")]})
        return text

    def optional(self, name: str) -> str | None:
        return self.text(name) or None

    def number(self, name: str, *, default: int | None = None, least: int = 0, most: int = 2**31 - 1) -> int:
        """A whole number, from `least` to `most`; raises Invalid that names the field."""
        text = self.text(name)
        if not text and default is not None:
            return default
        if not re.fullmatch(r"-?[0-9]{1,12}", text):
            raise Invalid({name: [gettext("Write a whole number, not “%(text)s”.", text=text)]})
        if not least <= int(text) <= most:
            raise Invalid({name: [gettext("Write a number from %(least)s to %(most)s.", least=least, most=most)]})
        return int(text)

    def pairs(self, name: str) -> dict[str, str]:
        """`NAME=value` lines; raises Invalid that names the field and the line."""
        found = {}
        for number, line in enumerate(self.raw(name).splitlines(), 1):
            key, sign, value = line.partition("=")
            if line.strip() and not sign:
                raise Invalid({name: [gettext("Line %(number)s: write NAME=value.", number=number)]})
            if line.strip():
                found[key.strip()] = value
        return found

    def moment(self, name: str) -> datetime:
        """A time as `<input type="datetime-local">` sends it, taken as UTC; raises Invalid that names the field."""
        text = self.text(name)
        try:
            return datetime.fromisoformat(text).replace(tzinfo=UTC)
        except ValueError:
            raise Invalid({name: [gettext("Write a time such as 2026-12-31T18:00.")]}) from None

    def is_checked(self, name: str) -> bool:
        return name in self._sent
