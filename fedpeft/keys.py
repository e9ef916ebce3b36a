"""Certificates and keys of a deployment: who the server is, and which clients may take part.

    DIR/ca.crt  ca.key            the authority that signs the server's certificate; ca.key is needed only to make more
    DIR/server.crt  server.key    the server's certificate, for its names and for this machine
    DIR/clients.yaml              number and public key of every client, by name; "revoked: true" shuts one out
    DIR/NAME/key  key.pub  ca.crt    what client NAME is given: its private key, and what it knows the server by

Private files can be read by their owner alone. Nothing that exists is overwritten: the same command with more clients adds
them under new numbers. Keys are EC keys (NIST P-384) in OpenSSH's form, as Flower's nodes use them.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from fedpeft import yaml_file
from fedpeft.errors import Problem, Problems, UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
VALID_DAYS = 825  # the longest that common TLS libraries accept of a server's certificate
HEADER = '# Who may take part. "revoked: true" shuts a client out; leave the entry, so that its number is not given again.\n'
ASK = "give the folder that fedpeft keys made (for a client: the one with its name)"


@dataclass(frozen=True)
class Listed:
    """A client of clients.yaml."""

    name: str
    client: int  # its number in the federation, for good
    key: str  # "ecdsa-sha2-nistp384 AAAA..."
    revoked: bool = False


def make(folder: pathlib.Path, server: Sequence[str], clients: Sequence[str]) -> list[str]:
    """Write what is missing in `folder` for a server of these names and these clients; a line on each. Raises UserError."""
    problems = Problems()
    if not clients:
        problems.add("--clients", "no client", do="give their names: --clients anna,ben,carla")
    for name in clients:
        if not NAME.fullmatch(name) or clients.count(name) > 1:
            problems.add("--clients", f'"{name}" is no name, or stands twice', "letters, digits, dots, hyphens and underscores, each once")
    for name in server:
        if _address(name) is None and not re.fullmatch(r"[A-Za-z0-9*]([A-Za-z0-9.-]*[A-Za-z0-9])?", name):
            problems.add("--server", f'"{name}" is no host name', "a DNS name or an IP address, without a port")
    problems.raise_if_any()
    known = listed(folder) if (folder / "clients.yaml").is_file() else []
    folder.mkdir(parents=True, exist_ok=True)
    made = _authority(folder) + _server(folder, server)
    for name in clients:
        if name not in {one.name for one in known}:
            number = max((one.client for one in known), default=-1) + 1
            known.append(Listed(name, number, _client(folder, name)))
            made.append(f"{folder / name}: hand this folder to client {name} (number {number}), then delete it here")
    entries = {one.name: {"client": one.client, "key": one.key} | ({"revoked": True} if one.revoked else {}) for one in known}
    _write(folder / "clients.yaml", (HEADER + yaml.safe_dump(entries, sort_keys=False, width=1000)).encode())
    return made


def listed(folder: pathlib.Path) -> list[Listed]:
    """The clients of clients.yaml, by number. Raises UserError."""
    path = folder / "clients.yaml"
    if not path.is_file():
        raise UserError(Problem("--keys", f"{folder} holds no clients.yaml", do="make one: fedpeft keys DIR --server NAME --clients a,b"))
    data, lines = yaml_file.read(path)
    problems, found = Problems(), []
    entries: dict[Any, Any] = dict(data)  # a name without quotes may be something else to YAML
    for name, entry in entries.items():
        where = f"{path}, line {lines.get((str(name),), '?')}"
        keys = entry.keys() if isinstance(entry, dict) else set()
        if not {"client", "key"} <= keys <= {"client", "key", "revoked"} or type(entry["client"]) is not int or entry["client"] < 0:
            problems.add(where, f'"{name}" is no client', "NAME: {client: NUMBER, key: PUBLIC KEY}")
        elif not isinstance(name, str):
            problems.add(where, f"{name!r} is no name", do=f'write it in quotes: "{name}"')
        elif not isinstance(entry.get("revoked", False), bool):
            problems.add(where, f'revoked of "{name}" is {entry["revoked"]!r}', "true or false")
        elif not _is_public(entry["key"]):
            problems.add(where, f'the key of "{name}" is no public key', "the text of its key.pub (an EC key)")
        else:
            found.append(Listed(name, entry["client"], entry["key"], entry.get("revoked", False)))
    for field in ("client", "key"):
        if len({getattr(one, field) for one in found}) < len(found):
            problems.add(str(path), f"two clients have the same {field}", f"one {field} each")
    problems.raise_if_any()
    return sorted(found, key=lambda one: one.client)


def private_key(folder: pathlib.Path) -> EllipticCurvePrivateKey:
    """A client's private key. Raises UserError when it is not there, no EC key, or open to others."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    path = folder / "key"
    data = private(path)
    try:
        key = load_ssh_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise UserError(
            Problem("--keys", f"{path} holds no private key ({error})", do="ask the server's operator for a new folder")
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(Problem("--keys", f"{path} holds no EC key", "an EC key in OpenSSH's form, as fedpeft keys makes it"))
    return key


def private(path: pathlib.Path) -> bytes:
    """The bytes of a private key file. Raises UserError when there is none, or others may read it."""
    data = read(path)
    if path.stat().st_mode & 0o077:
        raise UserError(Problem("--keys", f"{path} can be read by others on this machine", do=f"chmod 600 {path}"))
    return data


def read(path: pathlib.Path) -> bytes:
    """The bytes of a key file. Raises UserError when there is none."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(Problem("--keys", f"{path} cannot be read ({error.strerror})", do=ASK)) from error


def _authority(folder: pathlib.Path) -> list[str]:
    from cryptography import x509

    if (folder / "ca.crt").exists():
        return []
    key = _new_key()
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    _write(folder / "ca.key", _pem(key), private=True)
    _write(folder / "ca.crt", _certificate("fedpeft authority", key, key, [(x509.BasicConstraints(True, 0), True), (usage, True)]))
    return [f"{folder / 'ca.crt'} and ca.key: keep ca.key off the network"]


def _server(folder: pathlib.Path, names: Sequence[str]) -> list[str]:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509.oid import ExtendedKeyUsageOID

    path = folder / "server.crt"
    every = list(dict.fromkeys([*names, "localhost", "127.0.0.1", "::1"]))  # the server speaks to its own SuperLink, too
    alternatives = [x509.IPAddress(address) if (address := _address(name)) else x509.DNSName(name) for name in every]
    if path.exists():
        there = x509.load_pem_x509_certificate(read(path)).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if missing := [name for name, alternative in zip(every, alternatives, strict=True) if alternative not in there]:
            do = f"delete {path} to make another under the same authority"
            raise UserError(Problem("--server", f"{path} is there and not for {', '.join(missing)}", do=do))
        return []
    authority = load_pem_private_key(read(folder / "ca.key"), password=None)
    key = _new_key()
    extensions = [
        (x509.BasicConstraints(False, None), True),
        (x509.SubjectAlternativeName(alternatives), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
    ]
    _write(folder / "server.key", _pem(key), private=True)
    _write(path, _certificate("fedpeft server", key, authority, extensions))
    return [f"{path} and server.key: for {', '.join(every)}"]


def _client(folder: pathlib.Path, name: str) -> str:
    """Make a client's folder; its public key."""
    from cryptography.hazmat.primitives import serialization as form

    own = folder / name
    if own.exists():
        raise UserError(Problem("--clients", f"{own} is there and {name} is not in clients.yaml", do="move the folder away"))
    own.mkdir(mode=0o700)
    key = _new_key()
    public: str = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode()
    _write(own / "key", key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()), private=True)
    _write(own / "key.pub", f"{public} {name}\n".encode())
    _write(own / "ca.crt", read(folder / "ca.crt"))
    return public


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def _certificate(subject: str, key: EllipticCurvePrivateKey, signer: Any, extensions: Sequence[tuple[Any, bool]]) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpeft authority")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _is_public(text: Any) -> bool:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        return isinstance(load_ssh_public_key(str(text).encode()), ec.EllipticCurvePublicKey)
    except Exception:  # the library raises many kinds for text that is no key
        return False


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _write(path: pathlib.Path, data: bytes, private: bool = False) -> None:
    """Whole or not at all; a private file is never open to others, not even for a moment."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "wb") as file:
        file.write(data)
    os.replace(beside, path)
