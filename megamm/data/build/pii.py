"""Masks personal data in texts: e-mail addresses, phone numbers, IP addresses and payment cards.

In: a text. Out: the text with <EMAIL>, <PHONE>, <IP> and <CARD> in their place, and the count of each. Phone numbers
are recognised in international form (+49 30 1234567) and in North American form (555-123-4567); cards have 13 to 19
digits and a valid check digit (Luhn, ISO/IEC 7812-1). Names and postal addresses are not detected.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable


def mask(text: str) -> tuple[str, Counter[str]]:
    """The masked text and the count of each kind. Masking twice changes nothing."""
    counts: Counter[str] = Counter()
    for kind, pattern, is_meant in _KINDS:

        def replace(match: re.Match[str], kind: str = kind, is_meant: Callable[[str], bool] = is_meant) -> str:
            if not is_meant(match[0]):
                return match[0]
            counts[kind] += 1
            return f"<{kind}>"

        text = pattern.sub(replace, text)
    return text, counts


def is_card(text: str) -> bool:
    """Whether 13 to 19 digits, optionally with spaces or hyphens, are not all equal and pass the Luhn check."""
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def is_address(text: str) -> bool:
    """Whether this is an IP address. Version 6 needs at least three groups: `a::b` is more often code."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.version == 4 or sum(1 for group in text.split(":") if group) >= 3


_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("EMAIL", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}"), bool),
    ("IP", re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\w|\.[0-9])"), is_address),
    ("IP", re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])"), is_address),
    ("CARD", re.compile(r"(?<![\w-])[0-9](?:[ -]?[0-9]){12,18}(?![\w-])"), is_card),
    (
        "PHONE",
        re.compile(r"(?<![\w+])\+[0-9]{1,3}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9](?:[ .-]?[0-9]){5,12}(?!\w)"),
        bool,
    ),
    ("PHONE", re.compile(r"(?<![\w.-])(?:\([0-9]{3}\) ?|[0-9]{3}[-. ])[0-9]{3}[-. ][0-9]{4}(?![\w-])"), bool),
)
"""Kind, pattern (of bounded length, so that no text takes long), and the check of a match."""
