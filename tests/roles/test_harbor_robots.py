"""What tells of Harbor's robot accounts, against a double of Harbor's API that answers as its own description says."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.roles.rendering import load_file
from tests.support.rendering import DISTRIBUTIONS, ROLES, render

robots = load_file(ROLES / "harbor/files/robots.py", "harbor_robots")
api = load_file(ROLES.parent / "molecule/harbor/files/api.py", "harbor_api")
DESCRIPTION = yaml.safe_load((Path(__file__).parent / "harbor_api.yml").read_text())
NAME = "registry.example.org"
PASSWORD = 'it\'s: $1 "k8Rz"\\'
SOON, LATER = 1_800_000_000, 1_900_000_000

# -- the double --------------------------------------------------------------------------------------------------------


def schema(of: str, *, rows: bool) -> dict[str, Any]:
    """Of that definition, or of a list of them; a name that the description does not have is none of Harbor's."""
    definitions = {
        name: {"type": "object", "additionalProperties": False, "properties": properties}
        for name, properties in DESCRIPTION["definitions"].items()
    }
    one = {"$ref": f"#/definitions/{of}"}
    return {"definitions": definitions, **({"type": "array", "items": one} if rows else {"allOf": [one]})}


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


@pytest.mark.parametrize(
    ("asked", "login", "status", "rows"),
    [
        ("robots", ("admin", PASSWORD), 200, 10),
        ("robots?page_size=100", ("admin", PASSWORD), 200, 100),
        ("robots?page=2&page_size=100", ("admin", PASSWORD), 200, 22),
        ("robots?page=3&page_size=100", ("admin", PASSWORD), 200, 0),
        ("robots?q=Level%3Dproject%2CProjectID%3D2", ("admin", PASSWORD), 200, 2),
        ("robots?q=Level%3Dproject%2CProjectID%3D1", ("admin", PASSWORD), 200, 0),
        ("projects?with_detail=false", ("admin", PASSWORD), 200, 2),
        ("projects", ("admin", "wrong"), 200, 1),
        ("robots", ("admin", "wrong"), 401, None),
        ("robots?q=Level%3Dproject", ("admin", PASSWORD), 400, None),
        ("robots?q=Level%3Dproject%2CProjectID%3D9", ("admin", PASSWORD), 404, None),
        ("robots?page_size=101", ("admin", PASSWORD), 422, None),
    ],
)
def test_the_double_answers_as_harbors_description_says(
    asked: str, login: tuple[str, str], status: int, rows: int | None
) -> None:
    path = f"{DESCRIPTION['basePath']}/{asked}"
    said, headers, body = api.sample(PASSWORD).answer(path, basic(*login))
    described = DESCRIPTION["paths"][f"/{asked.partition('?')[0]}"]
    assert said == status
    assert set(headers) <= set(described["headers"])
    jsonschema.validate(body, schema(described["rows"] if rows is not None else "Errors", rows=rows is not None))
    assert rows is None or len(body) == rows


def test_a_page_says_whether_there_is_another() -> None:
    for page, words in ((1, ["next"]), (2, ["prev", "next"]), (13, ["prev"])):
        _, headers, _ = api.sample(PASSWORD).answer(f"/api/v2.0/robots?page={page}", basic("admin", PASSWORD))
        assert [link.split('rel="')[1].rstrip('"') for link in headers["Link"].split(" , ")] == words
        assert headers["X-Total-Count"] == "122"


# -- the reader --------------------------------------------------------------------------------------------------------


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


def make_certificate(folder: Path, name: str = NAME) -> Path:
    """A key in it and, signed by an authority that nobody here knows, a certificate for that name."""
    folder.mkdir(parents=True)
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    own = ["-x509", "-days", "2", "-subj", "/CN=An authority"]
    openssl("req", *own, *new, "-keyout", folder / "ca.key", "-out", folder / "ca.pem")
    openssl("req", *new, "-subj", f"/CN={name}", "-keyout", folder / "key", "-out", folder / "request")
    (folder / "names").write_text(f"subjectAltName = DNS:{name}\n")
    openssl(
        "x509", "-req", "-in", folder / "request", "-days", "2", "-extfile", folder / "names",
        "-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-CAcreateserial", "-out", folder / "certificate",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with certificate and key, as the site brings them."""
    return make_certificate(tmp_path_factory.mktemp("given") / "registry")


class Site:
    """A Harbor that runs, and the program beside it."""

    def __init__(self, folder: Path, given: Path) -> None:
        self.world = api.World({"admin": PASSWORD}, {1: "library", 2: "gpu"}, {0: [], 2: []})
        self.asked: list[str] = []
        self.answer: Callable[[str, str | None], tuple[int, dict[str, str], Any]] | None = None
        self.output = folder / "metrics" / "robots.prom"
        self.output.parent.mkdir()
        self.credentials = folder / "credentials"
        self.credentials.mkdir()
        (self.credentials / "certificate").write_bytes((given / "certificate").read_bytes())
        self.sign_in("admin", PASSWORD)
        world = _Recorded(self)
        self.server = api.serve(world, 0, given / "certificate", given / "key")
        self.port = self.server.server_address[1]

    def sign_in(self, user: str, password: str) -> None:
        (self.credentials / "login").write_text(json.dumps({"user": user, "password": password}))

    def tell(self, *more: str) -> int:
        """Run it; how it ended."""
        argv = [f"--hostname={NAME}", f"--port={self.port}", f"--output={self.output}", "--timeout=5"]
        return int(robots.main([*argv, f"--credentials={self.credentials}", *more]))

    def series(self) -> dict[str, int]:
        lines = [line for line in self.output.read_text().splitlines() if not line.startswith("#")]
        return {name: int(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def ends(self) -> dict[str, int]:
        return {name: value for name, value in self.series().items() if name.startswith(robots.END)}


class _Recorded:
    """The site's world, and what it was asked."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], Any]:
        self._site.asked.append(path)
        return (self._site.answer or self._site.world.answer)(path, authorization)


@pytest.fixture
def site(tmp_path: Path, given: Path) -> Iterator[Site]:
    site = Site(tmp_path, given)
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield site
    site.server.shutdown()
    thread.join()
    site.server.server_close()


def of_system(name: str) -> str:
    return f'{robots.END}{{robot="{name}",level="system"}}'


def of_project(name: str, project: str) -> str:
    return f'{robots.END}{{robot="{name}",level="project",project="{project}"}}'


def test_every_robot_that_ends_is_told_with_its_end(site: Site) -> None:
    site.world.robots[0] = [api.robot("robot$sync", SOON), api.robot("robot$for-ever", -1)]
    off = api.robot("robot$gpu+off", SOON, of="gpu", disable=True)
    site.world.robots[2] = [api.robot("robot$gpu+pull", LATER, of="gpu"), off]
    assert site.tell() == 0
    assert site.ends() == {of_system("robot$sync"): SOON, of_project("robot$gpu+pull", "gpu"): LATER}
    assert site.series()[robots.SUCCESS] > SOON - 100_000_000
    assert site.output.stat().st_mode & 0o777 == 0o644
    assert [file.name for file in site.output.parent.iterdir()] == ["robots.prom"], "no half of it is left"


def test_the_file_is_one_that_prometheus_can_read(site: Site) -> None:
    site.world.robots[0] = [api.robot("robot$a+b", SOON), api.robot('x"\\\n', SOON)]
    assert site.tell() == 0
    checked = subprocess.run(["promtool", "check", "metrics"], input=site.output.read_bytes(), capture_output=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
    assert set(site.ends()) == {of_system("robot$a+b"), of_system(r"x\"\\\n")}


def test_every_page_is_read_of_every_list(site: Site) -> None:
    for number, of in ((0, ""), (2, "gpu")):
        site.world.robots[number] = [api.robot(f"robot${of}-{each:03}", SOON + each, of=of) for each in range(250)]
    site.world.projects = {number: f"p{number:03}" for number in range(3, 140)} | {2: "gpu"}
    site.world.robots[139] = [api.robot("robot$p139+last", LATER, of="p139")]
    assert site.tell() == 0
    assert len(site.ends()) == 501
    assert site.ends()[of_system("robot$-249")] == SOON + 249
    assert site.ends()[of_project("robot$p139+last", "p139")] == LATER
    assert not [path for path in site.asked if "page_size=100" not in path]


def test_a_legacy_robot_that_another_project_has_too_is_another_series() -> None:
    told = robots.exported([robots.Robot("robot$ci", "a", SOON), robots.Robot("robot$ci", "b", LATER)], now=0)
    assert told.count("robot$ci") == 2
    again = robots.exported([robots.Robot("robot$ci", "a", LATER), robots.Robot("robot$ci", "a", SOON)], now=0)
    assert f"{of_project('robot$ci', 'a')} {SOON}\n" in again
    assert again.count("robot$ci") == 1, "node_exporter refuses a file that has a series twice"


def refuse(status: int) -> Callable[[str, str | None], tuple[int, dict[str, str], Any]]:
    return lambda _path, _authorization: (status, {}, {"errors": []})


def spoil_password(site: Site) -> None:
    site.sign_in("admin", "Molecule-another")


def close_project(site: Site) -> None:
    site.world.closed = {"admin": {2}}


def break_inside(site: Site) -> None:
    site.answer = refuse(500)


def stop_a_part(site: Site) -> None:
    site.answer = refuse(502)


def put_something_else_there(site: Site) -> None:
    site.answer = lambda _path, _authorization: (200, {}, {"hello": "world"})


def forget_the_ends(site: Site) -> None:
    site.answer = lambda _path, _authorization: (200, {}, [{"name": "robot$a"}])


def stop_it(site: Site) -> None:
    site.port = 9


def take_the_place(site: Site) -> None:
    site.output = site.output.parent / "away" / "robots.prom"


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (spoil_password, "Harbor does not know admin with this password."),
        (close_project, "Harbor does not let admin ask for /api/v2.0/robots?q=Level%3Dproject%2CProjectID%3D2"),
        (break_inside, "Harbor answers 500"),
        (stop_a_part, "Harbor answers 502: a part of it does not run."),
        (put_something_else_there, "does not speak its API v2.0"),
        (forget_the_ends, "something that has no expires_at"),
        (stop_it, "Harbor does not answer on 127.0.0.1:9"),
    ],
)
def test_what_fails_says_so_and_leaves_what_was_told(
    breaks: Callable[[Site], None], said: str, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.world.robots[2] = [api.robot("robot$gpu+pull", LATER, of="gpu")]
    assert site.tell() == 0
    before = site.output.read_bytes()
    site.world.robots[0] = [api.robot("robot$new", SOON)]
    breaks(site)
    assert site.tell() == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert PASSWORD not in error
    assert site.output.read_bytes() == before
    assert [file.name for file in site.output.parent.iterdir()] == ["robots.prom"]


def test_a_folder_that_cannot_be_written_is_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    take_the_place(site)
    assert site.tell() == 1
    assert f"{site.output} cannot be written" in capsys.readouterr().err


def test_a_login_without_a_right_sees_no_part_for_the_whole(site: Site) -> None:
    site.world.logins["robot$reader"] = "k8Rz"
    site.sign_in("robot$reader", "k8Rz")
    assert site.tell() == 0
    site.world.closed = {"robot$reader": {0}}
    assert site.tell() == 1


def test_a_project_that_was_removed_meanwhile_takes_its_robots_along(site: Site) -> None:
    site.world.robots[2] = [api.robot("robot$gpu+pull", LATER, of="gpu")]

    def removed(path: str, authorization: str | None) -> tuple[int, dict[str, str], Any]:
        answer = api.World.answer(site.world, path, authorization)
        if "projects" in path:
            del site.world.projects[1]
        return answer

    site.answer = removed
    assert site.tell() == 0
    assert list(site.ends()) == [of_project("robot$gpu+pull", "gpu")]


def test_harbor_is_given_time_to_start(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robots, "PAUSE_S", 0.01)
    left = iter([502, 503])

    def starting(path: str, authorization: str | None) -> tuple[int, dict[str, str], Any]:
        status = next(left, None)
        return refuse(status)(path, authorization) if status else site.world.answer(path, authorization)

    site.answer = starting
    assert site.tell("--patience=30") == 0
    assert next(left, None) is None


def test_a_wrong_password_is_not_tried_again(site: Site) -> None:
    spoil_password(site)
    assert site.tell("--patience=30") == 1
    assert len(site.asked) == 1, "it does not become right by itself"


@pytest.mark.parametrize("name", [NAME, "elsewhere.example.org"])
def test_who_is_not_harbor_hears_no_password(
    name: str, site: Site, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another certificate, also with the right name; the right certificate, under another name."""
    folder = make_certificate(tmp_path / "another", NAME) if name == NAME else given
    (site.credentials / "certificate").write_bytes((folder / "certificate").read_bytes())
    assert site.tell(f"--hostname={name}", "--patience=30") == 1
    assert f"does not prove to be {name}" in capsys.readouterr().err
    assert site.asked == []


# -- its unit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_the_unit_names_no_login_and_stays_within_its_walls(suite: str) -> None:
    said = {
        "harbor_hostname": NAME,
        "harbor_bundle_sha256": "0" * 64,
        "harbor_robots_user": "robot$reader",
        "harbor_robots_password": PASSWORD,
        "ansible_managed": "managed",
    }
    unit = render("harbor", "remotegpu-harbor-robots.service.j2", suite, **said)
    lines = unit.replace("\\\n", "").splitlines()
    assert "robot$reader" not in unit
    assert PASSWORD not in unit
    assert "ConditionPathIsDirectory=/var/lib/prometheus/node-exporter" in lines
    assert "ReadWritePaths=-/var/lib/prometheus/node-exporter" in lines
    assert "ProtectSystem=strict" in lines
    (command,) = [line for line in lines if line.startswith("ExecStart=")]
    options = robots.parse([*command.split()[3:], "--credentials=/run/credentials/x"])
    assert (options.hostname, options.port) == (NAME, 8444)
    assert options.output == Path("/var/lib/prometheus/node-exporter/remotegpu-harbor-robots.prom")
