"""The files of examples/deployment: what they name exists, and they agree with each other."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from autodeploy.cli.main import main
from autodeploy.server.serving import CLOSING_SECONDS
from autodeploy.server.settings import read_file, settle

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "deployment"
UNIT = FOLDER / "autodeploy.service"
CONTAINER = FOLDER / "Containerfile"
COMMAND = "/opt/autodeploy/bin/autodeploy"


@pytest.fixture(scope="module")
def manifest():
    """The objects of kubernetes.yaml by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((FOLDER / "kubernetes.yaml").open())}


@pytest.fixture(scope="module")
def pod(manifest):
    return manifest["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    (only,) = pod["containers"]
    return only


def unit_values(name):
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def instructions(name):
    """Arguments of an instruction of the Containerfile, lines joined."""
    joined = CONTAINER.read_text().replace("\\\n", " ")
    return re.findall(rf"^{name}\s+(.*)$", joined, re.MULTILINE)


def test_every_flag_is_one_of_serve(capsys, container):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    (line,) = unit_values("ExecStart")
    command, serve, *args = line.split()
    assert (command, serve) == (COMMAND, "serve")
    (entry,) = map(json.loads, instructions("ENTRYPOINT"))
    assert entry[-2:] == ["autodeploy", "serve"]
    args += [*entry[3:], *json.loads(instructions("CMD")[0]), *container["args"]]
    flags = {each for each in args if each.startswith("--")}
    assert flags
    assert flags <= known


@pytest.mark.parametrize("kind", ["file", "config map"])
def test_the_settings_are_settings(kind, manifest, tmp_path):
    file = FOLDER / "serve.yaml"
    if kind == "config map":
        file = tmp_path / "serve.yaml"
        file.write_text(manifest["ConfigMap"]["data"]["serve.yaml"])
    server = settle(read_file(file)).server
    assert (server.host, server.on_engine_death) == ("0.0.0.0", "exit")


def test_who_stops_the_server_waits_until_it_has_closed(manifest, pod, container, tmp_path):
    server = settle(read_file(FOLDER / "serve.yaml")).server
    takes = server.shutdown_timeout + CLOSING_SECONDS
    (seconds,) = unit_values("TimeoutStopSec")
    assert int(seconds) > takes
    assert int(re.search(r"--stop-timeout (\d+)", CONTAINER.read_text())[1]) > takes
    data = yaml.safe_load(manifest["ConfigMap"]["data"]["serve.yaml"])
    slept = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = pod["terminationGracePeriodSeconds"]
    assert grace > slept + data["shutdown-timeout"] + CLOSING_SECONDS


def test_the_unit_restarts_a_server_whose_engine_died_and_signals_the_server_alone():
    assert unit_values("Restart") == ["on-failure"]
    assert unit_values("Type") == ["exec"]
    assert unit_values("KillMode") == ["mixed"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed here")
def test_systemd_understands_the_unit(tmp_path):
    # It wants the program to exist.
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(COMMAND, sys.executable))
    found = subprocess.run(
        ["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_the_container_is_made_of_files_and_extras_that_exist():
    for line in instructions("COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install = next(line for line in instructions("RUN") if "pip install" in line)
    extras = re.search(r"\[([a-z,]+)\]", install)[1].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    (image,) = instructions("FROM")
    version = re.search(r"python:(3\.\d+)", image)[1]
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]


def test_probes_ask_what_the_server_answers_without_a_key(server, manifest, container):
    (port,) = container["ports"]
    settings = yaml.safe_load(manifest["ConfigMap"]["data"]["serve.yaml"])
    assert settings["port"] == port["containerPort"]
    paths = {
        name: container[name]["httpGet"]["path"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert paths["livenessProbe"] == "/health"
    assert paths["readinessProbe"] == "/ready"
    for name, path in paths.items():
        assert container[name]["httpGet"]["port"] == port["name"]
        assert server.client.get(path).status_code == 200


def test_the_manifest_names_only_what_it_has(manifest, pod, container):
    names = {kind: each["metadata"]["name"] for kind, each in manifest.items()}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} == set(volumes)
    assert volumes["config"]["configMap"]["name"] == names["ConfigMap"]
    claim = volumes["cache"]["persistentVolumeClaim"]["claimName"]
    assert claim == names["PersistentVolumeClaim"]
    labels = manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifest["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert manifest["Service"]["spec"]["selector"] == labels
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_what_is_cached_is_kept(container):
    (cached,) = instructions("VOLUME")
    assert cached in {each["mountPath"] for each in container["volumeMounts"]}
    variables = dict(each.split("=") for each in instructions("ENV")[0].split())
    assert all(path.startswith(f"{cached}/") for path in variables.values())
    of_unit = dict(each.split("=") for each in unit_values("Environment"))
    assert set(of_unit) == set(variables)
