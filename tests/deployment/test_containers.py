"""The Dockerfile and the compose file, without a container engine: they parse, name what is there, and their commands run."""

import pathlib
import re
import shlex

import pytest
import yaml

from fedpeft.addresses import free_port
from fedpeft.arguments import parser
from fedpeft.cli import COMMANDS
from fedpeft.keys import make

from .conftest import NAMES

ROOT = pathlib.Path(__file__).parent.parent.parent
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_image_copies_what_is_there_and_starts_our_command():
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        for source in shlex.split(line)[:-1]:
            assert (ROOT / source).exists(), source
    assert re.search(r'^ENTRYPOINT \["fedpeft"\]$', DOCKERFILE, re.MULTILINE)
    assert re.search(r"^USER fedpeft$", DOCKERFILE, re.MULTILINE), "not as root"


def mounts(service):
    """Path in the container -> path on the host."""
    return {there: here for here, there, *_ in (volume.split(":") for volume in service["volumes"])}


@pytest.mark.parametrize("name", SERVICES)
def test_every_command_is_one_of_ours_with_files_that_are_mounted(name):
    service = SERVICES[name]
    given = parser(COMMANDS).parse_args(service["command"])
    paths = [word for word in service["command"] if word.startswith("/")]
    for path in paths:
        assert any(path == place or path.startswith(f"{place}/") for place in mounts(service)), path
    assert given.health == "127.0.0.1:8080"
    assert '"127.0.0.1:8080"' in DOCKERFILE, "the health check asks where the commands answer"
    if name != "server":
        assert given.server == "server:9092"
        assert mounts(service)["/keys"] == f"./deployment/keys/{name}", "its own keys and nobody else's"
    else:
        assert service["ports"] == ["9092:9092"] and given.address == "0.0.0.0:9092"
        assert given.resume, "a restart goes on"


def test_there_are_three_clients():
    assert set(SERVICES) == {"server", *NAMES}


@pytest.mark.slow
def test_the_commands_of_the_compose_file_run_a_federation(three, deploy):
    """The exact words, with the paths that the volumes give and this machine's addresses."""
    deployment = deploy(three)
    root, port = deployment.folder / "host", free_port()
    make(root / "deployment" / "keys", ["server"], NAMES)
    (root / "deployment" / "run-folder").mkdir()
    (root / "deployment" / "config.yaml").write_text(deployment.config.read_text())
    for name in NAMES:
        (root / "deployment" / name).mkdir()
        (root / "deployment" / name / "data.yaml").write_text((deployment.folder / f"{name}.yaml").read_text())

    def words(service):
        places = mounts(service)
        for word in service["command"]:
            inside = next((place for place in places if word == place or word.startswith(f"{place}/")), None)
            if inside is not None:
                word = str(root / places[inside].removeprefix("./")) + word.removeprefix(inside)
            word = word.replace("server:9092", f"127.0.0.1:{port}").replace("0.0.0.0:9092", f"127.0.0.1:{port}")
            yield word if word != "127.0.0.1:8080" else f"127.0.0.1:{free_port()}"

    running = {name: deployment.start(name, *words(service)) for name, service in SERVICES.items()}
    for name, process in running.items():
        assert process.end(200) == 0, (name, process.said)
    assert (root / "deployment" / "run-folder" / "run" / "adapter" / "adapter_config.json").is_file()
    assert '"event": "finished"' in running["server"].said
