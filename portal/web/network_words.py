"""What the stacks' own code says of names and records, so that it can be translated: pulumi/remotegpu_network/.

The portal asks that code what is valid, and shows its words; they are recognised as the sentences of the services are
(refusals.py). A test holds that these are its sentences, no more and no fewer.
"""

from __future__ import annotations


def pgettext(_context: str, sentence: str) -> str:
    """Marks a sentence for the catalogue."""
    return sentence


SENTENCES = (
    pgettext("refusal", "a name is needed"),
    pgettext("refusal", "a wildcard needs a name below which it stands, as in *.example.org"),
    pgettext("refusal", "%(text)s has %(length)s characters as A-labels; at most %(most)s are allowed"),
    pgettext("refusal", "%(text)s is no DNS name: %(error)s"),
    pgettext("refusal", "%(whole)s has an empty label between two dots"),
    pgettext("refusal", "%(label)s in %(whole)s is no IDNA label: %(error)s"),
    pgettext("refusal", "%(label)s in %(whole)s has %(length)s characters; a label has at most %(most)s"),
    pgettext("refusal", "%(label)s in %(whole)s: letters, digits, hyphens inside and underscores only"),
    pgettext("refusal", "%(value)s is no value of %(type)s"),
    pgettext("refusal", "%(text)s is no IPv4 address"),
    pgettext("refusal", "%(text)s is no IPv6 address"),
    pgettext("refusal", "%(text)s names an interface of one machine; a record cannot"),
    pgettext("refusal", "%(text)s is an IPv4 address in disguise; use an A record with %(address)s"),
    pgettext("refusal", "%(address)s leads nobody to a machine"),
    pgettext("refusal", "%(address)s is reserved"),
    pgettext("refusal", "%(text)s: a wildcard is no target"),
    pgettext("refusal", "%(text)s is an address; a target is a name"),
    pgettext("refusal", "a text is one line of printable ASCII"),
    pgettext("refusal", "a text has at most %(most)s characters; this one has %(length)s"),
    pgettext("refusal", "%(target)s: a mail server's name has no underscores"),
    pgettext("refusal", "%(tag)s is no CAA tag"),
    pgettext("refusal", "iodef wants mailto:, http:// or https://, not %(content)s"),
    pgettext("refusal", "%(name)s: no underscores in a name with %(type)s records"),
    pgettext("refusal", "%(name)s: an SRV record stands at _service._tcp.NAME (or _udp, _tls, _sctp)"),
)
