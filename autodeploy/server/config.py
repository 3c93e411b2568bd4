"""ServerConfig: everything the HTTP side can be told. Names are vLLM's where they mean the same.

A field is a flag of `autodeploy serve` and a key of its configuration file; the text below a field
is what both say about it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..pooling import POOLINGS, Pooling

ON_ENGINE_DEATH = ("exit", "restart")
LOG_FORMATS = ("text", "json")


@dataclass
class ServerConfig:
    """How requests come in, and how much of them is let in.

    Raises:
        ConfigError: a value is out of range, or two of them contradict each other.
    """

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 is every network this machine is in"""
    port: int = 8000
    """port to listen on; 0 takes a free one"""
    root_path: str = ""
    """path under which a proxy shows this server, such as /llm"""
    data_parallel_size: int = 1
    """replicas of the model on this machine, an engine process and a GPU (or an equal share of the
    CPU's threads) for each; a prompt goes to the one that likely has most of it cached"""
    served_model_name: list[str] = field(default_factory=list)
    """names of the model in requests; the first is given back (default: the model's path)"""
    api_key: list[str] = field(default_factory=list, repr=False)
    """a key that may call; AUTODEPLOY_API_KEY may hold some, with commas (default: all may)"""
    allowed_origins: list[str] = field(default_factory=list)
    """web origins whose pages may call, * for all (default: none)"""
    ssl_keyfile: str | None = None
    """private key, in PEM"""
    ssl_certfile: str | None = None
    """certificate, in PEM; with it the server speaks https"""
    ssl_ca_certs: str | None = None
    """certificates of those who sign clients' certificates, in PEM"""
    ssl_cert_reqs: int = 0
    """whether a client must have a certificate: 0 no, 1 checked if there is one, 2 yes"""
    max_open_sequences: int = 2048
    """sequences (prompts times n) waiting and running; more are answered 429"""
    request_timeout: float | None = None
    """seconds a request may take as a whole (default: no limit)"""
    shutdown_timeout: float = 30.0
    """seconds that open requests may go on for after SIGTERM"""
    tool_call_parser: str = "auto"
    """how the model writes calls of tools; auto: as its chat template does, none: not at all"""
    reasoning_parser: str = "auto"
    """how the model marks its reasoning; auto: as its chat template does, none: not at all"""
    pooling: Pooling = "last"
    """what an embedding is made of: the last token's hidden state, or the mean over all tokens"""
    log_format: str = "text"
    """text, or json with a line per record"""
    otlp_traces_endpoint: str | None = None
    """where to send traces, such as http://localhost:4318/v1/traces (default: nowhere)"""
    on_engine_death: str = "exit"
    """exit with status 1, or restart the engine in place"""
    trust_request_chat_template: bool = False
    """let requests bring a chat template, which can be written to run for hours"""
    response_store: int = 256
    """responses of /v1/responses to keep in memory for previous_response_id; 0 keeps none"""
    max_request_bytes: int = 16 * 2**20
    """largest body of a request"""
    max_prompt_tokens: int | None = None
    """longest prompt of a request (default: what the model's context holds)"""
    max_prompts: int = 1024
    """most prompts in one request"""
    max_n: int = 128
    """most sequences per prompt"""
    max_logprobs: int = 20
    """most candidates that logprobs may show per token"""
    max_stop_strings: int = 32
    """most stop strings of a request"""
    max_stop_length: int = 1024
    """longest stop string, in characters"""

    def __post_init__(self) -> None:
        for name in (
            "data_parallel_size", "max_open_sequences", "max_request_bytes", "max_prompts", "max_n",
        ):  # fmt: skip
            self._at_least(name, 1)
        for name in (
            "max_logprobs", "max_stop_strings", "max_stop_length", "shutdown_timeout",
            "response_store",
        ):  # fmt: skip
            self._at_least(name, 0)
        for name in ("max_prompt_tokens", "request_timeout"):
            if getattr(self, name) is not None:
                self._above_zero(name)
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}")
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path must start with '/', not be '{self.root_path}'")
        self.root_path = self.root_path.rstrip("/")
        if self.on_engine_death not in ON_ENGINE_DEATH:
            raise ConfigError(
                f"on_engine_death must be {' or '.join(ON_ENGINE_DEATH)}, not "
                f"{self.on_engine_death!r}"
            )
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling must be {' or '.join(POOLINGS)}, not {self.pooling!r}")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(
                f"log_format must be {' or '.join(LOG_FORMATS)}, not {self.log_format!r}"
            )
        if not all(key and key.isascii() for key in self.api_key):
            raise ConfigError("an api_key is empty or not ASCII; no header could carry it")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ConfigError("ssl_keyfile needs ssl_certfile, the certificate that goes with it")

        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name}='{path}' is not a file")

    def _at_least(self, name: str, least: int) -> None:
        if not getattr(self, name) >= least:
            raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)!r}")

    def _above_zero(self, name: str) -> None:
        if not getattr(self, name) > 0:
            raise ConfigError(f"{name} must be above 0, not {getattr(self, name)!r}")
