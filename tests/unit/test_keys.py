"""Keys of a deployment: private files are private, nothing is overwritten, and the certificate is for the names that were given."""

import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedpeft import UserError, keys
from fedpeft.flower_link import public_key_bytes


@pytest.fixture
def folder(tmp_path):
    keys.make(tmp_path / "keys", ["fed.example.org", "10.1.2.3"], ["anna", "ben"])
    return tmp_path / "keys"


def test_private_files_can_be_read_by_their_owner_alone(folder):
    private = [folder / "ca.key", folder / "server.key", folder / "anna" / "key", folder / "ben" / "key"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert stat.S_IMODE((folder / "anna").stat().st_mode) == 0o700


def test_the_certificate_is_for_the_names_given_and_for_this_machine(folder):
    server = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3", "127.0.0.1", "::1"]
    assert (folder / "anna" / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()


def test_the_listed_key_is_that_of_the_private_one(folder):
    (anna, ben) = keys.listed(folder)
    assert (anna.name, anna.client, ben.name, ben.client) == ("anna", 0, "ben", 1)
    public = keys.private_key(folder / "anna").public_key()
    assert load_pem_public_key(public_key_bytes(anna.key)) == public
    assert (folder / "anna" / "key.pub").read_text() == f"{anna.key} anna\n"


def test_clients_are_added_under_new_numbers_and_nothing_is_overwritten(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "clients.yaml"}
    made = keys.make(folder, ["fed.example.org"], ["ben", "carla"])
    assert [one.name for one in keys.listed(folder)] == ["anna", "ben", "carla"]
    assert keys.listed(folder)[2].client == 2
    assert len(made) == 1
    assert {path: path.read_bytes() for path in before} == before


def test_a_revoked_client_keeps_its_number(folder):
    file = folder / "clients.yaml"
    file.write_text(file.read_text().replace("ben:\n  client: 1\n", "ben:\n  client: 1\n  revoked: true\n"))
    keys.make(folder, ["fed.example.org"], ["carla"])
    assert [(one.client, one.revoked) for one in keys.listed(folder)] == [(0, False), (1, True), (2, False)]


@pytest.mark.parametrize(
    ("server", "clients", "says"),
    [
        (["fed.example.org:9092"], ["x"], "--server.*no host name"),
        (["other.example.org"], ["x"], "not for other.example.org"),
        (["fed.example.org"], [], "--clients: no client"),
        (["fed.example.org"], ["../x"], '"../x" is no name'),
        (["fed.example.org"], ["x", "x"], "stands twice"),
    ],
)
def test_mistakes_are_one_line(server, clients, says, folder):
    with pytest.raises(UserError, match=says):
        keys.make(folder, server, clients)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("anna: {client: 0}", '"anna" is no client'),
        ("anna: {client: 0, key: rubbish}", "no public key"),
        ("anna: {client: -1, key: x}", '"anna" is no client'),
    ],
)
def test_a_spoilt_list_names_its_line(text, says, folder):
    (folder / "clients.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"clients.yaml, line 1: .*{says}"):
        keys.listed(folder)


@pytest.mark.parametrize(("said", "says"), [("y", "'y'"), ("1", "1"), ('"true"', "'true'")])
def test_who_is_revoked_by_another_word_is_not_let_in(said, says, folder):
    anna = keys.listed(folder)[0].key
    (folder / "clients.yaml").write_text(f"anna: {{client: 0, key: {anna}, revoked: {said}}}")
    with pytest.raises(UserError, match=rf'line 1: revoked of "anna" is {says}; allowed: true or false'):
        keys.listed(folder)


def test_a_name_that_yaml_takes_for_something_else_is_one_line(folder):
    anna = keys.listed(folder)[0].key
    (folder / "clients.yaml").write_text(f"no: {{client: 0, key: {anna}}}")
    with pytest.raises(UserError, match=r"False is no name; write it in quotes"):
        keys.listed(folder)


def test_two_clients_cannot_share_a_key(folder):
    anna = keys.listed(folder)[0].key
    (folder / "clients.yaml").write_text(f"anna: {{client: 0, key: {anna}}}\nben: {{client: 1, key: {anna}}}\n")
    with pytest.raises(UserError, match="two clients have the same key"):
        keys.listed(folder)


def test_a_private_key_that_others_can_read_is_not_used(folder):
    (folder / "anna" / "key").chmod(0o644)
    with pytest.raises(UserError, match=r"can be read by others.*chmod 600"):
        keys.private_key(folder / "anna")
    keys.private(folder / "server.key")
    (folder / "server.key").chmod(0o640)
    with pytest.raises(UserError, match=r"server.key can be read by others.*chmod 600"):
        keys.private(folder / "server.key")


@pytest.mark.parametrize("data", [b"", b"rubbish", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"])
def test_a_spoilt_private_key_is_one_line(data, folder):
    (folder / "anna" / "key").write_bytes(data)
    with pytest.raises(UserError, match="holds no private key"):
        keys.private_key(folder / "anna")
