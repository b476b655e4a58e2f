"""Synthetic values of each kind of personal data, with valid checksums. They are random, so they belong to nobody."""

from __future__ import annotations

import base64
import hashlib
import string
import zlib
from collections.abc import Callable
from functools import partial
from random import Random

_GIVEN = (  # noqa: SIM905  shorter than a name a line
    "Amelia|Oliver|Priya|Mateusz|Sofía|Hiroshi|Fatima|Jan|Ingrid|Kwame|Chloé|Luca|Nadia|Viktor|Aisha|Tomás|"
    "Leila|Björn|Grace|Dmitri|Yuki|Carlos|Hannah|Omar|Elena|Patrick|Mei|Samuel|Zoë|Rajesh|Greta|Ahmed|Isabel|"
    "Petra|Daniel|Nkechi|Julia|Marco|Helga|Ivan|Rosa|George|Linh|Anna|Pavel|Maria|James|Noor|Emma|William"
).split("|")
_FAMILY = (  # noqa: SIM905  shorter than a name a line
    "Novak|Patel|Kowalski|García|Tanaka|Haddad|Müller|Lindqvist|Mensah|Dubois|Rossi|Petrov|Khan|Silva|"
    "Johansson|Murphy|Sokolov|Nakamura|Reyes|Cohen|Farouk|Popescu|Byrne|Chen|Goldberg|Laurent|Iyer|Schneider|"
    "Hassan|Moreno|Horvat|Park|Okafor|Lehmann|Bianchi|Olsen|Ivanova|Torres|Whitfield|Nguyen|Svoboda|Costa|"
    "Harris|Aziz|Thompson|Bergström|Abbott|Fischer|Walsh|Greenberg"
).split("|")
_PLACES = (  # noqa: SIM905  shorter than a name a line
    "Lisbon|Kraków|Nairobi|Toronto|Gothenburg|Osaka|Valparaíso|Leeds|Marseille|Tallinn|Pune|Adelaide|"
    "Porto Alegre|San Antonio|Tbilisi|Hanoi|Cape Town|Bergen|Utrecht|Ghent|Nuremberg|Seville|Bologna|Gdańsk|"
    "Brno|Debrecen|Izmir|Amman|Accra|Kigali|Lima|Quito|Montevideo|Calgary|Portland|Tucson|Galway|Aberdeen|"
    "Norway|Bolivia|Vietnam|Kenya"
).split("|")
_COMPANIES = (  # noqa: SIM905  shorter than a name a line
    "Halvorsen Shipping|Brightwater Labs|Kessler & Sons|Northgate Insurance|Mirador Foods|Tessera Analytics|"
    "Oakline Partners|Zephyr Logistics Ltd|Redmond Steel Inc|Alder Health"
).split("|")
_STREETS = (  # noqa: SIM905  shorter than a name a line
    "Maple|Church|Station|Victoria|Mill|Elm|Harbour|Lincoln|Chestnut|Windsor|Orchard|Juniper"
).split("|")
_KINDS = ["Street", "Road", "Avenue", "Lane", "Drive", "Boulevard", "Court", "Way", "St", "Ave"]
_DOMAINS = ("proton.me", "fastmail.com", "web.de", "orange.fr", "uni-hamburg.de", "acme.co.uk", "mailbox.org")
Maker = Callable[[Random], str]
_ALNUM = string.ascii_letters + string.digits


def _chars(chance: Random, n: int, letters: str = _ALNUM) -> str:
    return "".join(chance.choice(letters) for _ in range(n))


_digits = partial(_chars, letters=string.digits)


def person(chance: Random) -> str:
    """Mostly a given and a family name, sometimes a given name with an initial between."""
    given, family = chance.choice(_GIVEN), chance.choice(_FAMILY)
    return chance.choice(
        (f"{given} {family}", f"{given} {family}", f"{given} {chance.choice(string.ascii_uppercase)}. {family}")
    )


def street_address(chance: Random) -> str:
    """Number, street and, half of the time, unit, town and postal code."""
    street = f"{chance.randint(1, 999)} {chance.choice(_STREETS)} {chance.choice(_KINDS)}"
    longer = f"{street}, Apt. {chance.randint(1, 99)}, {chance.choice(_PLACES)} {_digits(chance, 5)}"
    german = f"{chance.choice(('Linden', 'Garten', 'Schiller', 'Bahnhof'))}straße {chance.randint(1, 99)}"
    return chance.choice((street, longer, german))


def email(chance: Random) -> str:
    """given.family@domain."""
    letters = f"{chance.choice(_GIVEN)}{chance.choice(('.', '_', ''))}{chance.choice(_FAMILY)}".lower()
    name = letters.encode("ascii", "ignore").decode()
    return f"{name}@{chance.choice(_DOMAINS)}"


def phone(chance: Random) -> str:
    """As written in the United States, Britain, Germany and internationally."""
    area = chance.choice(("212", "415", "617", "312", "206"))
    line = f"{chance.randint(200, 999)}-{_digits(chance, 4)}"
    return chance.choice(
        (f"+1 {area}-{line}", f"({area}) {line}", f"+44 20 7{_digits(chance, 3)} {_digits(chance, 4)}",
         f"+49 30 {_digits(chance, 7)}", f"{area}-{line}")
    )  # fmt: skip


def credit_card(chance: Random) -> str:
    """Sixteen digits that pass the Luhn check, with or without spaces."""
    body = chance.choice(("4", "51", "55")) + _digits(chance, 14)
    body = body[:15]
    total = sum(int(digit) if place % 2 else sum(divmod(2 * int(digit), 10)) for place, digit in enumerate(body))
    number = f"{body}{-total % 10}"
    return chance.choice((number, " ".join(number[at : at + 4] for at in range(0, 16, 4))))


def iban(chance: Random) -> str:
    """A British IBAN with valid check digits (ISO 13616)."""
    bban = _chars(chance, 4, string.ascii_uppercase) + _digits(chance, 14)
    number = int("".join(str(int(letter, 36)) for letter in f"{bban}GB00"))
    return f"GB{98 - number % 97:02d}{bban}"


def bitcoin(chance: Random) -> str:
    """A pay-to-public-key-hash address (Base58Check)."""
    alphabet = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    payload = b"\0" + chance.randbytes(20)
    whole = payload + hashlib.sha256(hashlib.sha256(payload).digest()).digest()[:4]
    number, out = int.from_bytes(whole, "big"), ""
    while number:
        number, rest = divmod(number, 58)
        out = alphabet[rest] + out
    return "1" * (len(whole) - len(whole.lstrip(b"\0"))) + out


def nhs(chance: Random) -> str:
    """Ten digits, the last of which is the remainder modulo 11."""
    while True:
        body = "9" + _digits(chance, 8)
        check = 11 - sum(int(digit) * (10 - place) for place, digit in enumerate(body)) % 11
        if check != 10:
            number = f"{body}{check % 11}"
            return f"{number[:3]}-{number[3:6]}-{number[6:]}"


def pesel(chance: Random) -> str:
    """Date of birth, four digits, and a check digit."""
    body = f"{chance.randint(50, 99)}{chance.randint(1, 12):02d}{chance.randint(1, 28):02d}{_digits(chance, 4)}"
    total = sum(int(digit) * weight for digit, weight in zip(body, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3), strict=True))
    return f"{body}{-total % 10}"


def nif(chance: Random) -> str:
    """Eight digits and the letter that they give modulo 23."""
    number = _digits(chance, 8)
    return number + "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23]


def fiscal_code(chance: Random) -> str:
    """An Italian one, with its check letter."""
    odd = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
    body = (
        f"{_chars(chance, 6, 'BCDFGLMNPRSTVZ')}{chance.randint(50, 99)}{chance.choice('ABCDEHLMPRST')}"
        f"{chance.randint(1, 28):02d}{chance.choice('ABCDEFGHL')}{chance.randint(100, 899)}"
    )
    total = 0
    for place, letter in enumerate(body):
        value = int(letter) if letter.isdigit() else ord(letter) - 65
        total += odd[value] if place % 2 == 0 else value
    return body + string.ascii_uppercase[total % 26]


def ssn(chance: Random) -> str:
    """With an area number that is in use."""
    return f"{chance.randint(100, 665)}-{chance.randint(10, 99)}-{chance.randint(1000, 9999)}"


def itin(chance: Random) -> str:
    """Begins with 9; its fourth digit is 7 or 8."""
    return f"9{_digits(chance, 2)}-{chance.choice('78')}{chance.randint(0, 7)}-{chance.randint(1000, 9999)}"


def nino(chance: Random) -> str:
    """Two letters, six digits, one letter."""
    digits = " ".join(_digits(chance, 2) for _ in range(3))
    return f"{chance.choice(('AB', 'CE', 'JK', 'LM', 'PR', 'SE'))} {digits} {chance.choice('ABCD')}"


def ip(chance: Random) -> str:
    """Version 4 or 6."""
    four = ".".join(str(chance.randint(1, 254)) for _ in range(4))
    return chance.choice((four, four, ":".join(f"{chance.randint(4096, 65535):x}" for _ in range(8))))


def mac(chance: Random) -> str:
    """Six bytes."""
    return ":".join(f"{byte:02X}" for byte in chance.randbytes(6))


def url(chance: Random) -> str:
    """A personal web page."""
    name = chance.choice(_FAMILY).encode("ascii", "ignore").decode().lower()
    return f"https://www.{name}-{_chars(chance, 4, string.ascii_lowercase)}.org/{_chars(chance, 6)}"


def _token(before: str, n: int, letters: str = _ALNUM) -> Maker:
    return lambda chance: before + _chars(chance, n, letters)


def _github(chance: Random) -> str:
    """Thirty characters and their CRC-32 in base 62, as GitHub issues them."""
    body, check = _chars(chance, 30), ""
    number = zlib.crc32(body.encode())
    for _ in range(6):
        number, rest = divmod(number, 62)
        check = (string.digits + string.ascii_uppercase + string.ascii_lowercase)[rest] + check
    return f"ghp_{body}{check}"


def _jwt(chance: Random) -> str:
    parts = (b'{"alg":"HS256","typ":"JWT"}', f'{{"sub":"{_digits(chance, 10)}"}}'.encode(), chance.randbytes(32))
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


def _private_key(chance: Random) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.from_private_bytes(chance.randbytes(32))
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode().strip()


def key_of_no_form(chance: Random) -> str:
    """Random characters without a form of their own, as most services issue them: hex, base 36, base 62, base 64."""
    kind, size = chance.choice(("hex", "36", "62", "64", "url")), chance.choice((24, 32, 40, 64))
    if kind in ("64", "url"):
        plain = chance.randbytes(size * 3 // 4)
        return (base64.b64encode(plain) if kind == "64" else base64.urlsafe_b64encode(plain)).decode()
    letters = {"hex": string.digits + "abcdef", "36": string.digits + string.ascii_lowercase, "62": _ALNUM}[kind]
    return _chars(chance, size, letters)


# How people paste a key, each form with a word that announces it.
KEY_FORMS = (
    "api_key={}", "export SERVICE_TOKEN={}", "DB_PASSWORD='{}'", 'client_secret = "{}"', "secretKey := {}",
    '{"user": "app", "api_key": "{}"}', "{'access_token': '{}'}", "{token:{}}",
    "password: {}", "auth:\n  client_secret: {}\n", 'api-key: "{}"', "<password>{}</password>",
    "Authorization: Bearer {}", "authorization: token {}", "X-Api-Key: {}", "-H 'X-Auth-Token: {}'",
    "https://api.example.com/v1/items?token={}&page=2", "GET /login?user=app&api_key={}", "https://app:{}@example.com/",
    "deploy --token {} --force", "deploy --api-key={}", "curl -u app:{} https://api.example.com",
    "my api key is {}", "The password is {}.", "use the token {} please", "the secret for staging is {}, keep it",
    "here is the client secret you asked for: {}", "{} is our api key",
)  # fmt: skip


# Kind of secret -> a maker. A `password` is recognised only after words that announce it.
SECRETS: dict[str, Maker] = {
    "aws access key": _token("AKIA", 16, string.ascii_uppercase + "234567"),
    "github": _github,
    "gitlab": _token("glpat-", 20),
    "slack": lambda chance: f"xoxb-{_digits(chance, 12)}-{_digits(chance, 12)}-{_chars(chance, 24)}",
    "stripe": _token("sk_live_", 24),
    "openai": lambda chance: f"sk-proj-{_chars(chance, 20)}T3BlbkFJ{_chars(chance, 20)}",
    "google": _token("AIza", 35),
    "hugging face": _token("hf_", 34),
    "sendgrid": lambda chance: f"SG.{_chars(chance, 22)}.{_chars(chance, 43)}",
    "jwt": _jwt,
    "private key": _private_key,
    "url with password": lambda chance: f"postgres://app:{_chars(chance, 14)}@db.internal:5432/main",
    "password": lambda chance: _chars(chance, 8) + chance.choice("!#%&*") + _digits(chance, 2),
}


def secret(chance: Random) -> str:
    """A secret of a kind that is recognised without context."""
    kind = chance.choice(sorted(SECRETS.keys() - {"password", "url with password"}))
    return SECRETS[kind](chance)


MAKERS: dict[str, Maker] = {
    "EMAIL_ADDRESS": email,
    "PHONE_NUMBER": phone,
    "CREDIT_CARD": credit_card,
    "IBAN_CODE": iban,
    "CRYPTO": bitcoin,
    "IP_ADDRESS": ip,
    "MAC_ADDRESS": mac,
    "URL": url,
    "US_SSN": ssn,
    "US_ITIN": itin,
    "UK_NHS": nhs,
    "UK_NINO": nino,
    "ES_NIF": nif,
    "IT_FISCAL_CODE": fiscal_code,
    "PL_PESEL": pesel,
    "PERSON": person,
    "LOCATION": lambda chance: chance.choice(_PLACES),
    "ORGANIZATION": lambda chance: chance.choice(_COMPANIES),
    "STREET_ADDRESS": street_address,
    "SECRET": secret,
}
