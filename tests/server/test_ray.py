"""`autodeploy serve --ray`: what Ray Serve is told, and (slow) that it serves."""

import signal
import socket
import sys

import httpx
import psutil
import pytest
from running_server import DEMO, eventually
from served_process import Served

from autodeploy.cli.main import main, parser
from autodeploy.cli.serve import read_settings
from autodeploy.errors import ConfigError
from autodeploy.server.ray_serving import ServerReplica, deployment_options, http_options


def settings(*flags):
    return read_settings(parser().parse_args(["serve", "m", "--ray", *flags]))


def test_a_replica_reserves_a_gpu_for_each_engine():
    options = deployment_options(settings("--data-parallel-size", "4"), has_gpus=True)
    assert options["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 4}
    assert deployment_options(settings(), has_gpus=False)["ray_actor_options"]["num_gpus"] == 0


def test_ray_scales_only_if_a_most_is_given():
    fixed = deployment_options(settings("--num-replicas", "3"), has_gpus=False)
    assert fixed["num_replicas"] == 3
    assert "autoscaling_config" not in fixed
    scaled = deployment_options(settings("--max-replicas", "5"), has_gpus=False)
    assert scaled["autoscaling_config"] == {
        "min_replicas": 1, "max_replicas": 5, "target_ongoing_requests": 64,
    }  # fmt: skip
    assert "num_replicas" not in scaled


@pytest.mark.parametrize("flags", [(), ("--max-replicas", "3"), ("--request-router", "session")])
def test_ray_takes_what_it_is_told(flags):
    serve = pytest.importorskip("ray.serve")
    options = deployment_options(settings(*flags), has_gpus=False)
    made = serve.deployment(**options)(serve.ingress()(ServerReplica))
    assert made.name == "autodeploy"


def test_the_servers_own_limit_is_met_before_rays():
    options = deployment_options(settings("--max-open-sequences", "100"), has_gpus=False)
    assert options["max_ongoing_requests"] > 100


def test_rays_proxies_get_address_and_certificates(tmp_path):
    file = tmp_path / "x.pem"
    file.write_text("")
    given = settings("--port", "8443", "--ssl-certfile", str(file), "--ssl-keyfile", str(file))
    assert http_options(given) == {
        "host": "127.0.0.1", "port": 8443, "ssl_certfile": str(file), "ssl_keyfile": str(file),
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ("--num-replicas", "0"),
        ("--num-replicas", "4", "--max-replicas", "2"),
        ("--request-router", "prefix"),
        ("--cpus-per-replica", "-1"),
    ],
)
def test_what_ray_cannot_do_is_refused(flags):
    with pytest.raises(ConfigError, match=flags[-2].lstrip("-").replace("-", "_")):
        settings(*flags)


def test_without_ray_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", DEMO, "--ray"]) == 1
    assert "pip install 'autodeploy-llm[serve,ray]'" in capsys.readouterr().err


def test_a_port_that_other_machines_could_not_know_is_refused(capsys):
    assert main(["serve", DEMO, "--ray", "--port", "0"]) == 1
    assert "the port must be named" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("router", ["power_of_two", "session"])
def test_two_replicas_on_ray_serve_and_one_that_dies_is_replaced(router):
    pytest.importorskip("ray")
    port = free_port()
    one = Served(
        "--ray", "--num-replicas", "2", "--port", str(port), "--max-num-seqs", "8",
        "--cpus-per-replica", "0.5", "--request-router", router,
    )  # fmt: skip
    try:
        assert httpx.get(f"{one.url}/v1/models").status_code == 401
        body = {"prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0}
        answers = [one.client.post("/v1/completions", json=body).json() for _ in range(8)]
        assert len({answer["choices"][0]["text"] for answer in answers}) == 1
        with one.stream(max_tokens=40) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) > 20
        bad = one.client.post("/v1/completions", json={"prompt": "a", "temprature": 1})
        assert bad.json()["error"]["code"] == "unknown_parameter"

        if router == "session":
            assert [found > 0 for found in cached_of_one_session(one, 6)] == [False] + [True] * 5

        engines = engines_of(one)
        assert len(engines) == 2
        engines[0].kill()
        eventually(lambda: len(set(engines_of(one)) - {engines[0]}) == 2, 60)
        eventually(lambda: one.client.get("/health").status_code == 200)
        assert one.client.post("/v1/completions", json=body).status_code == 200

        with one.stream(max_tokens=600) as stream:
            lines = stream.iter_lines()
            next(lines)
            one.process.send_signal(signal.SIGTERM)
            assert list(filter(None, lines))[-1] == "data: [DONE]"
        status, errors = one.end()
        assert status == 0, errors
        assert "of-the-environment" not in errors
        eventually(lambda: not any(engine.is_running() for engine in engines))
    finally:
        if one.process.poll() is None:
            one.process.kill()


def cached_of_one_session(one, count):
    """Prompt tokens found in a cache, for each of several equal requests of one session."""
    body = {"prompt": "def mul(a, b):\n    return a * b\n" * 4, "max_tokens": 2}
    headers = {"X-Session-Id": "mine"}
    answers = [
        one.client.post("/v1/completions", json=body, headers=headers).json() for _ in range(count)
    ]
    return [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]


def engines_of(one):
    """Processes of engines: those that a replica of Ray's has spawned."""
    found = []
    for child in psutil.Process(one.process.pid).children(recursive=True):
        try:
            if child.is_running() and "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
