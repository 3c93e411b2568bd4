"""Ray Serve: the server on a cluster. Ray routes, scales, watches and replaces its replicas.

Each replica is the whole server, HTTP layer and engines, as `autodeploy serve` runs it: limits, API
keys, errors and streams are the same. Ray's proxy on every machine takes the requests and sends
each to one replica. Within a replica, `data_parallel_size` engines share its prompts by prefix.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, cast

from fastapi import FastAPI

from ..errors import ConfigError, EngineDeadError, EngineError
from .app import build_app
from .logs import LogFormat, set_up_logging
from .ray_config import ROUTERS
from .settings import Settings
from .start import start_engines

APPLICATION = "autodeploy"
_HEALTH_SECONDS = 1.0
_OBJECT_STORE_BYTES = 80 * 2**20
# Ray's limit must not be met before ours, which answers 429; probes count, too.
_REQUESTS_BESIDE = 64
_LEAVING_SECONDS = 15.0
_log = logging.getLogger("autodeploy")


class ServerReplica:
    """What Ray runs on each replica. Its methods' names are Ray Serve's."""

    def __init__(self, settings: Settings) -> None:
        set_up_logging(cast(LogFormat, settings.server.log_format), logging.INFO)
        self._settings = settings
        self._is_lost = False
        self._host = start_engines(settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = build_app(self._settings.server, self._host, self._settings.model)
        self._host.gave_up = self._lose
        return app

    def _lose(self) -> None:
        self._is_lost = True

    def check_health(self) -> None:
        """Asked by Ray, which puts another replica in the place of one that raises.

        Raises:
            EngineDeadError: an engine died and is not coming back by itself.
        """
        if self._is_lost:
            raise EngineDeadError("an engine of this replica died; see its log")


def serve_on_ray(settings: Settings) -> int:
    """Deploys on Ray and waits for SIGTERM or Ctrl-C; the exit status, 0.

    Raises:
        ConfigError: Ray is not installed, or cannot do what the settings ask for.
        EngineError: a replica could not be started.
    """
    _check(settings)
    ray, serve = _import_ray()
    _connect(ray, settings)
    try:
        serve.start(proxy_location="EveryNode", http_options=http_options(settings))
        try:
            _deploy(serve, settings, _has_gpus(ray, settings))
            _wait_for_signal()
        finally:
            _leave(serve, settings.server.shutdown_timeout + _LEAVING_SECONDS)
    finally:
        ray.shutdown()
    return 0


def _deploy(serve: Any, settings: Settings, has_gpus: bool) -> None:
    deployment = serve.deployment(**deployment_options(settings, has_gpus))
    application = deployment(serve.ingress()(ServerReplica)).bind(settings)
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise EngineError(
            f"Ray could not start the server ({error}); what its replicas logged says why"
        ) from error
    server = settings.server
    scheme = "https" if server.ssl_certfile else "http"
    names = ", ".join(server.served_model_name or [settings.model])
    print(f"serving {names} on {scheme}://{server.host}:{server.port}", flush=True)


def _wait_for_signal() -> None:
    """Until SIGTERM or Ctrl-C, which from now on end what was deployed gracefully."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    stop.wait()


def deployment_options(settings: Settings, has_gpus: bool) -> dict[str, Any]:
    """What Ray Serve's `deployment` is told. has_gpus: whether engines run on GPUs."""
    server, ray = settings.server, settings.ray
    engines = server.data_parallel_size
    options: dict[str, Any] = {
        "name": APPLICATION,
        "ray_actor_options": {
            "num_cpus": ray.cpus_per_replica,
            "num_gpus": engines if has_gpus else 0,
        },
        "max_ongoing_requests": server.max_open_sequences + _REQUESTS_BESIDE,
        "health_check_period_s": _HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": server.shutdown_timeout,
        "request_router_config": {"request_router_class": ROUTERS[ray.request_router]},
    }
    if ray.max_replicas is None:
        return {**options, "num_replicas": ray.num_replicas}
    options["autoscaling_config"] = {
        "min_replicas": ray.num_replicas,
        "max_replicas": ray.max_replicas,
        "target_ongoing_requests": ray.target_ongoing_requests,
    }
    return options


def http_options(settings: Settings) -> dict[str, Any]:
    """What Ray's proxies are told."""
    server = settings.server
    tls = {name: getattr(server, name) for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")}
    given = {name: value for name, value in tls.items() if value is not None}
    return {"host": server.host, "port": server.port, **given}


def _import_ray() -> tuple[Any, Any]:
    # Nobody asked for reports to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError(
            f"--ray needs Ray Serve, which is not installed ({error}); "
            "pip install 'autodeploy-llm[serve,ray]'"
        ) from error
    return ray, serve


def _check(settings: Settings) -> None:
    if settings.server.port == 0:
        raise ConfigError("with --ray the port must be named: proxies of all machines open it")
    if settings.server.ssl_cert_reqs:
        raise ConfigError(
            "Ray's proxies do not ask clients for certificates; leave out ssl_cert_reqs, or put a "
            "proxy before them that does"
        )


def _connect(ray: Any, settings: Settings) -> None:
    address = settings.ray.ray_address or os.environ.get("RAY_ADDRESS")
    own = {} if address else {"object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(address=address, include_dashboard=False if own else None, **own)
    except ConnectionError as error:
        raise ConfigError(
            f"there is no Ray cluster at ray_address='{address}' ({error}); start one with  ray "
            "start --head, or leave the address out"
        ) from error


def _has_gpus(ray: Any, settings: Settings) -> bool:
    device = str(settings.deploy.get("device", "auto"))
    # Not this machine's: it may be one of the cluster that only starts others.
    return ray.cluster_resources().get("GPU", 0) > 0 if device == "auto" else device != "cpu"


def _leave(serve: Any, seconds: float) -> None:
    """Lets open requests end, then takes the application down."""
    _log.info("leaving Ray")
    serve.delete(APPLICATION, _blocking=False)
    deadline = time.monotonic() + seconds
    while APPLICATION in serve.status().applications:
        if time.monotonic() > deadline:
            _log.warning("Ray still has replicas after %g seconds; leaving it to them", seconds)
            return
        time.sleep(0.1)
