"""RayConfig: how servers are spread over a Ray cluster. Its fields are flags, as ServerConfig's."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

ROUTERS = {
    "power_of_two": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
    "session": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter",
}
"""Ray Serve's request routers by our names. Its prefix-aware one is for Ray Serve LLM: it reads the
prompt of a typed call, and what reaches the replicas of a web application are bytes."""


@dataclass
class RayConfig:
    """What Ray Serve is told beside the server's own settings.

    Raises:
        ConfigError: a value is out of range.
    """

    ray: bool = False
    """serve by Ray Serve, on one machine or many, instead of this process"""
    ray_address: str | None = None
    """the cluster to join: auto, or HOST:PORT (default: RAY_ADDRESS, else a new one here)"""
    num_replicas: int = 1
    """with --ray: servers, with data_parallel_size engines each; the least if max_replicas says
    more"""
    max_replicas: int | None = None
    """with --ray: most servers; Ray starts and stops them as requests come"""
    target_ongoing_requests: int = 64
    """with --ray and max_replicas: open requests of a server, at which Ray is content"""
    cpus_per_replica: float = 1
    """with --ray: CPU cores that a server reserves"""
    request_router: str = "power_of_two"
    """with --ray: power_of_two, the shorter queue of two; or session, one server for all requests
    with the same X-Session-Id"""

    def __post_init__(self) -> None:
        for name in ("num_replicas", "max_replicas", "target_ongoing_requests"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ConfigError(f"{name} must be at least 1, not {value!r}")
        if not self.cpus_per_replica >= 0:
            raise ConfigError(f"cpus_per_replica must be at least 0, not {self.cpus_per_replica!r}")
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas} is below num_replicas={self.num_replicas}, the "
                "least; raise one or lower the other"
            )
        if self.request_router not in ROUTERS:
            raise ConfigError(
                f"request_router must be {' or '.join(ROUTERS)}, not {self.request_router!r}"
            )
