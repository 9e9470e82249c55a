"""What people type in one line: one rule for names, wherever they come from. Nothing here reads or writes a table."""

from __future__ import annotations

import re

MAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")  # whether it exists only a letter to it can tell


def faults_of_line(text: str, longest: int) -> list[str]:
    """What is wrong with it, in sentences; empty if nothing is."""
    is_line = bool(text.strip()) and text.isprintable() and len(text) <= longest
    return [] if is_line else [f"Use one line of at most {longest} characters."]


def faults_of_mail(text: str, longest: int) -> list[str]:
    """The same for an address of mail."""
    faults = faults_of_line(text, longest)
    return faults or ([] if MAIL.fullmatch(text) else ["Write a mail address such as li.wei@example.org."])
