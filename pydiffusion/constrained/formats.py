"""Formats of strings as regular expressions: each matches valid values only, by far not all of them.

To JSON schema, formats are annotations. Those here are guaranteed nevertheless; of others the compiler says
that they are not enforced.
"""

from __future__ import annotations

_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = "[12][0-9]{3}-" + _DAY
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+\-](?:0[0-9]|1[0-2]):[03]0)"

_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_WORD = "[0-9a-f]{1,4}"
# All eight words; or ``::`` instead of at least two of them, with up to six beside it.
_IPV6 = (
    f"(?:{_WORD}(?::{_WORD}){{7}}|::(?:{_WORD}(?::{_WORD}){{0,5}})?|"
    + "|".join(f"(?:{_WORD}:){{{n}}}(?::{_WORD}){{1,{6 - n}}}" for n in range(1, 6))
    + f"|(?:{_WORD}:){{1,6}}:)"
)

# Labels of up to 31 characters (63 are permitted) in a name of up to 159 (253).
_LABEL = "[a-z0-9](?:-?[a-z0-9]){0,15}"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,4}}"
_DOMAIN = r"[a-z0-9]+(?:-[a-z0-9]+)*(?:\.[a-z0-9]+(?:-[a-z0-9]+)*)+"
_EMAIL = rf"[a-z0-9]+(?:[._\-][a-z0-9]+)*@{_DOMAIN}"

_PATH_CHARACTER = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@\-]|%[0-9A-F]{2})"
_QUERY = rf"(?:\?(?:{_PATH_CHARACTER}|[/?])*)?(?:#(?:{_PATH_CHARACTER}|[/?])*)?"
_PATH = rf"(?:/{_PATH_CHARACTER}*)*"
# A name whose last label is of letters, so that it isn't a wrong IPv4 address; or a right one.
_AUTHORITY = r"(?:(?:[a-z0-9](?:-?[a-z0-9]){0,15}\.){0,4}[a-z]{2,24}|" + _IPV4 + ")(?::[1-9][0-9]{0,3})?"
_URL = rf"(?:https?|wss?|ftp)://{_AUTHORITY}{_PATH}{_QUERY}"
_URI = (
    rf"(?:{_URL}|file:///{_PATH_CHARACTER}*{_PATH}|mailto:{_EMAIL}|tel:\+[0-9]{{3,15}}"
    rf"|urn:[a-z][a-z0-9]{{1,15}}:(?:{_PATH_CHARACTER}|/)+)"
)
_REFERENCE = rf"(?:{_URI}|(?:/{_PATH_CHARACTER}+)*/?{_QUERY})"

_COUNT = "(?:0|[1-9][0-9]{0,5})"
_OF_DAY = f"T(?:{_COUNT}H(?:{_COUNT}M(?:{_COUNT}S)?)?|{_COUNT}M(?:{_COUNT}S)?|{_COUNT}S)"
_OF_CALENDAR = f"(?:{_COUNT}Y(?:{_COUNT}M(?:{_COUNT}D)?)?|{_COUNT}M(?:{_COUNT}D)?|{_COUNT}D)"
_DURATION = f"P(?:{_OF_CALENDAR}(?:{_OF_DAY})?|{_OF_DAY}|{_COUNT}W)"


def _uuid(version: str) -> str:
    return f"[0-9a-f]{{8}}-[0-9a-f]{{4}}-{version}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}"


def _base64(more: str) -> str:
    digit = f"[A-Za-z0-9{more}]"
    return f"(?:{digit}{{4}})*(?:{digit}[AQgw]==|{digit}{{2}}[AEIMQUYcgkosw048]=)?"


#: Format -> expression; no character of a value is written with an escape in JSON.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": _DURATION,
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    **{f"uuid{version}": _uuid(version) for version in "1345678"},
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "ipvanyaddress": f"(?:{_IPV4}|{_IPV6})",
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "hostname": _HOST,
    "idn-hostname": _HOST,
    "uri": _URI,
    "iri": _URI,
    "url": _URL,
    "http-url": rf"https?://{_AUTHORITY}{_PATH}{_QUERY}",
    "uri-reference": _REFERENCE,
    "iri-reference": _REFERENCE,
    "json-pointer": r"(?:/(?:[A-Za-z0-9 ._:;,!$&'()*+=@%?#\-]|~[01])*)*",
    "byte": _base64("+/"),
    "base64": _base64("+/"),
    "base64url": _base64("_\\-"),
}
#: Formats that any string has, or any number of the type.
ANY_VALUE = frozenset(("binary", "password", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
                       "uint64", "float", "double", "decimal"))  # fmt: skip
