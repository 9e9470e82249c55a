"""The portal's machines as an Ansible inventory.

Read from the portal (`url`, with an API token), or from a file of the same shape (`document`) that the worker writes
for one run. Host keys are pinned here: a known_hosts file is written beside the source, and every host is told to use
it and to accept nothing else.

Everything in the document was typed by somebody or sent by some host. Inventory plugins are the one way into Ansible on
which strings stay strings: a variable `{{ lookup('pipe', 'id') }}` set here is text. So this stays a plugin, never a
script, and `trusted_by_default` stays off. What a host may be told is a closed list; the document cannot set
`ansible_connection` or an interpreter.

Next door: roles/*/defaults say which `remotegpu_` variables they take. Never here: a decision about a machine.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import json
import os
import re
import shlex
import ssl
import struct
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleParserError
from ansible.inventory.data import InventoryData
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable

DOCUMENTATION = r"""
name: portal
short_description: The portal's machines
description:
  - Reads machines from a RemoteGPU portal, or from a document of the same shape.
  - Writes a known_hosts file and pins every host to it. A host without a pinned key is left out.
extends_documentation_fragment: [constructed, inventory_cache]
options:
  plugin:
    description: Names this plugin.
    required: true
    choices: [portal]
  url:
    description: Where the portal is, for example https://portal.example.org. Ignored when O(document) is given.
    type: str
    env: [{name: REMOTEGPU_URL}]
  token:
    description: An API token of the portal. Never in the file - the environment gives it.
    type: str
    env: [{name: REMOTEGPU_TOKEN}]
  ca_file:
    description: Certificates that the portal's must lead to. Without it the system's own.
    type: str
    env: [{name: REMOTEGPU_CA_FILE}]
  document:
    description: A JSON file to read instead of asking the portal. Relative to the inventory file.
    type: str
    env: [{name: REMOTEGPU_INVENTORY_DOCUMENT}]
  known_hosts:
    description:
      - Where to write the pinned host keys. Relative to the inventory file.
      - By default beside O(document), or below C(~/.ansible/remotegpu).
    type: str
  timeout:
    description: Seconds to wait for the portal.
    type: int
    default: 20
"""

SCHEMA = 1
PATH = "/api/v1/admin/inventory"
GROUPS = ("gpu_hosts", "gateways")  # there, even if nobody is in it: a playbook may name both
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")
GROUP = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
# Ansible gives these names a meaning of their own: tasks delegated to localhost would go to whoever is called so.
RESERVED = frozenset({"all", "ungrouped", "localhost", "127.0.0.1"})
USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\Z")
VARIABLE = re.compile(r"remotegpu_[a-z0-9_]{1,64}\Z")
KEY_TYPES = (
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
)


class DocumentError(Exception):
    """The document, or one host of it, cannot be used; the text names the field, the reason and the way out."""


@dataclass(frozen=True)
class Machine:
    """One host of the document, checked."""

    name: str
    address: str
    port: int
    user: str
    host_keys: tuple[str, ...]
    groups: tuple[str, ...]
    variables: Mapping[str, Any]
    password: str | None
    become_password: str | None
    private_key_file: str | None
    fallback_key_file: str | None = None

    @property
    def known_hosts_lines(self) -> list[str]:
        """The lines that pin this host."""
        where = self.address if self.port == 22 else f"[{self.address}]:{self.port}"
        return [f"{where} {key}" for key in self.host_keys]


def hosts_of(document: Any) -> list[Any]:
    """The document's hosts, unchecked. Raises DocumentError when it is no document of ours."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise DocumentError(
            f"schema is {found!r}, and this plugin reads {SCHEMA}: update portal and playbooks together"
        )
    hosts = document.get("hosts")
    if not isinstance(hosts, list):
        raise DocumentError("hosts is missing or no list")
    return hosts


def machine(entry: Any) -> Machine:
    """One host, checked. Raises DocumentError."""
    if not isinstance(entry, dict):
        raise DocumentError("a host is no object")
    name = entry.get("name")
    if not isinstance(name, str) or not NAME.match(name):
        raise DocumentError(f"name {name!r} is not made of letters, digits, '.' and '-'")
    if name.lower() in RESERVED:
        raise DocumentError(f"name {name!r} has a meaning of its own in Ansible: rename the machine")
    address = _address(entry.get("address"))
    port = entry.get("port", 22)
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
        raise DocumentError(f"port {port!r} is not a number from 1 to 65535")
    user = entry.get("user")
    if not isinstance(user, str) or not USER.match(user):
        raise DocumentError(f"user {user!r} is not a login name")
    keys = entry.get("host_keys")
    if not isinstance(keys, list) or not keys:
        raise DocumentError("no host key is pinned: confirm its fingerprint in the portal")
    groups = entry.get("groups", [])
    if not isinstance(groups, list) or not all(isinstance(g, str) and GROUP.match(g) for g in groups):
        raise DocumentError(f"groups {groups!r} are not names of letters, digits and '_'")
    variables = entry.get("vars", {})
    if not isinstance(variables, dict):
        raise DocumentError("vars is no object")
    odd = sorted(str(key) for key in variables if not isinstance(key, str) or not VARIABLE.match(key))
    if odd:
        raise DocumentError(f"vars may set remotegpu_… only, not {', '.join(odd)}")
    return Machine(
        name=name,
        address=address,
        port=port,
        user=user,
        host_keys=tuple(_host_key(key) for key in keys),
        groups=tuple(sorted(set(groups))),
        variables=variables,
        password=_text_or_none(entry, "password"),
        become_password=_text_or_none(entry, "become_password"),
        private_key_file=_text_or_none(entry, "private_key_file"),
        fallback_key_file=_text_or_none(entry, "fallback_key_file"),
    )


def _address(value: Any) -> str:
    """A host name or an IP address, nothing that ssh could take for an option or a command."""
    if isinstance(value, str):
        if NAME.match(value):
            return value
        with contextlib.suppress(ValueError):
            ip = ipaddress.ip_address(value)
            if not isinstance(ip, ipaddress.IPv6Address) or ip.scope_id is None:
                return str(ip)
    raise DocumentError(f"address {value!r} is neither an IP address nor a host name")


def _host_key(value: Any) -> str:
    """`type base64` in canonical form; a comment is dropped. A second line would pin a second key."""
    parts = value.split(" ") if isinstance(value, str) else []
    if len(parts) < 2 or parts[0] not in KEY_TYPES or "\n" in value or "\r" in value:
        raise DocumentError(f"host key {value!r} is not like 'ssh-ed25519 AAAA…'")
    try:
        blob = base64.b64decode(parts[1], validate=True)
        (length,) = struct.unpack(">I", blob[:4])
    except (ValueError, struct.error) as error:
        raise DocumentError(f"host key {value!r} is no base64") from error
    if blob[4 : 4 + length].decode("ascii", "replace") != parts[0]:
        raise DocumentError(f"host key {value!r} is of another type than it says")
    return f"{parts[0]} {base64.b64encode(blob).decode()}"


def _text_or_none(entry: Mapping[str, Any], field: str) -> str | None:
    value = entry.get(field)
    if value is not None and (not isinstance(value, str) or "\0" in value):
        raise DocumentError(f"{field} is no text")
    return value


def write_private(path: Path, content: str) -> None:
    """Write by rename, for the owner only: a reader sees the old or the new content, never half."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to wherever it points."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


def ask(url: str, token: str, ca_file: str | None, timeout_s: float) -> Any:
    """The portal's document. Raises OSError (the portal is not there) or DocumentError (it said no, or nonsense)."""
    if not re.match(r"https://|http://(127\.0\.0\.1|localhost|\[::1\])([:/]|\Z)", url):
        raise DocumentError(f"url {url!r} must be https://…: the token would travel in clear")
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked above
        url.rstrip("/") + PATH, headers={"Authorization": f"Bearer {token}", "Accept": "application/json"}
    )
    context = ssl.create_default_context(cafile=ca_file)
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _NoRedirect())
    try:
        with opener.open(request, timeout=timeout_s) as response:
            body = response.read()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise OSError(f"{url}{PATH} answered {error.code}") from error
        raise DocumentError(
            f"{url}{PATH} answered {error.code}: is REMOTEGPU_TOKEN an operator's, and still valid?"
        ) from error
    try:
        return json.loads(body)
    except ValueError as error:
        raise DocumentError(f"{url}{PATH} answered no JSON") from error


class InventoryModule(BaseInventoryPlugin, Constructable, Cacheable):  # type: ignore[misc] # Ansible has no types
    """What Ansible calls."""

    NAME = "portal"

    def verify_file(self, path: str) -> bool:
        return bool(super().verify_file(path)) and path.endswith((".remotegpu.yml", ".remotegpu.yaml"))

    def parse(self, inventory: InventoryData, loader: DataLoader, path: str, cache: bool = True) -> None:
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        try:
            known_hosts = self._known_hosts_path(Path(path))
            entries = hosts_of(self._document(Path(path), use_cache=cache))
        except DocumentError as error:
            raise AnsibleParserError(f"{path}: {error}") from error
        machines = self._checked(entries)
        write_private(known_hosts, "".join(f"{line}\n" for each in machines for line in each.known_hosts_lines))
        for group in GROUPS:
            self.inventory.add_group(group)
        for each in machines:
            self._add(each, known_hosts)
        if any(each.password for each in machines):
            share_resource_tracker()

    def _document(self, path: Path, *, use_cache: bool) -> Any:
        if self.get_option("document"):
            file = path.parent / self.get_option("document")
            try:
                return json.loads(file.read_text(encoding="utf-8"))
            except OSError as error:
                raise DocumentError(f"document {file} cannot be read: {error.strerror}") from error
            except ValueError as error:
                raise DocumentError(f"document {file} is no JSON: {error}") from error
        return self._from_portal(path, use_cache=use_cache)

    def _from_portal(self, path: Path, *, use_cache: bool) -> Any:
        """The portal's word while it answers: a machine that has just been leased must not look free from a cache."""
        url, token = self.get_option("url"), self.get_option("token")
        if not url:
            raise DocumentError("url is missing: set REMOTEGPU_URL=https://portal.example.org")
        if not token:
            raise DocumentError("token is missing: set REMOTEGPU_TOKEN to an API token of the portal")
        key = self.get_cache_key(f"{path}|{url}|{hashlib.sha256(token.encode()).hexdigest()}")
        may_cache = bool(self.get_option("cache"))
        try:
            document = ask(url, token, self.get_option("ca_file"), self.get_option("timeout"))
        except OSError as error:
            if may_cache and use_cache and key in self._cache:
                last_good = self._cache[key]
                when = last_good.get("generated_at", "an unknown time")
                self.display.warning(
                    f"{url} cannot be reached ({error}); hosts are those of {when}. Leases may have changed since."
                )
                return last_good
            raise DocumentError(f"{url} cannot be reached ({error}), and there is no earlier copy") from error
        if may_cache:
            self._cache[key] = _without_secrets(document)
        return document

    def _checked(self, entries: list[Any]) -> list[Machine]:
        """The hosts that can be used, by name. One odd host is left out with a warning; it does not stop the others."""
        machines: dict[str, Machine] = {}
        for entry in entries:
            try:
                each = machine(entry)
                if each.name in machines:
                    raise DocumentError("the name is there twice")
            except DocumentError as error:
                name = entry.get("name") if isinstance(entry, dict) else None
                self.display.warning(f"host {name!r} is left out: {error}")
                continue
            machines[each.name] = each
        return [machines[name] for name in sorted(machines)]

    def _known_hosts_path(self, path: Path) -> Path:
        if self.get_option("known_hosts"):
            chosen = path.parent / self.get_option("known_hosts")
        elif self.get_option("document"):
            chosen = (path.parent / self.get_option("document")).parent / "known_hosts"
        else:
            source = hashlib.sha256(f"{path.resolve()}|{self.get_option('url')}".encode()).hexdigest()[:12]
            chosen = Path("~/.ansible/remotegpu").expanduser() / f"known_hosts-{source}"
        absolute: Path = chosen.absolute()
        if re.search(r"[\s\"'%\\$]", str(absolute)):  # ssh splits the option at blanks and expands % and $
            raise DocumentError(
                f"known_hosts {str(absolute)!r} has a blank, a quote or one of % \\ $ in its path: choose another place"
            )
        return absolute

    def _add(self, each: Machine, known_hosts: Path) -> None:
        host = self.inventory.add_host(each.name)
        for group in each.groups:
            self.inventory.add_child(self.inventory.add_group(group), host)
        pinned = {
            "UserKnownHostsFile": known_hosts,
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "UpdateHostKeys": "no",
        }
        # Tried after private_key_file: while a key is being replaced the host knows this one alone.
        fallback = {"IdentityFile": shlex.quote(each.fallback_key_file)} if each.fallback_key_file else {}
        options = {**pinned, **fallback}
        values = {
            **each.variables,
            "remotegpu_known_hosts": str(known_hosts),
            "ansible_host": each.address,
            "ansible_port": each.port,
            "ansible_user": each.user,
            "ansible_ssh_common_args": " ".join(f"-o {name}={value}" for name, value in options.items()),
            # ansible-runner switches the check off by environment, which comes before our arguments; this before both.
            "ansible_host_key_checking": True,
            "ansible_password": each.password,
            "ansible_become_password": each.become_password,
            "ansible_ssh_private_key_file": each.private_key_file,
        }
        for name, value in sorted(values.items()):
            if value is not None:
                self.inventory.set_variable(host, name, value)
        variables = self.inventory.get_host(host).get_vars()
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), variables, host, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), variables, host, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, host, strict=strict)


def share_resource_tracker() -> None:
    """Ansible hands a password to ssh in shared memory. Before Python 3.13 each block of it wants a process that tracks
    it: one that is there before the tasks are forked serves them all, and no task starts its own.
    """
    if sys.version_info < (3, 13):
        resource_tracker.ensure_running()


def _without_secrets(document: Any) -> Any:
    """What may lie in a cache: everything but passwords and tokens, which are of use once or never again."""
    if not isinstance(document, dict) or not isinstance(document.get("hosts"), list):
        return document
    hosts = []
    for entry in document["hosts"]:
        if isinstance(entry, dict):
            variables = entry.get("vars")
            if isinstance(variables, dict):
                variables = {name: value for name, value in variables.items() if "token" not in name}
            hosts.append({**entry, "password": None, "become_password": None, "vars": variables})
    return {**document, "hosts": hosts}
