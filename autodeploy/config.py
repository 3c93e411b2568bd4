"""Everything `deploy` can be told, in one place. Names are vLLM's where they mean the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .transforms.recipe import Recipe, load_recipe, suggest

EXECUTORS = ("inprocess", "process")
LOAD_FORMATS = ("auto", "dummy")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TASKS = ("generate", "embed")
CUDAGRAPH_MODES = ("full", "full_decode_only")


@dataclass
class DeployConfig:
    """What to deploy and how.

    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    model: Any
    """A live `AutoModelForCausalLM`, a checkpoint directory, or a hub id."""
    tokenizer: Any = None
    """A tokenizer object, a path or id, or None: the checkpoint's own, if `model` names one."""
    task: str = "generate"
    """generate text, or embed: the model without its head gives each prompt a vector."""
    recipe: str | Path | Mapping[str, Any] | Recipe = "default"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of recipe steps by step id, applied last."""
    dtype: str = "auto"
    """Of a checkpoint; a live model keeps the one it has."""
    device: str = "auto"
    """Where a checkpoint is loaded; a live model stays where it is. auto: cuda if there is one."""
    visible_devices: str | None = None
    """GPUs that the engine's process sees, as CUDA_VISIBLE_DEVICES has them, such as "1"; None: all
    that this one sees. It needs executor='process'."""
    cpu_threads: int | None = None
    """Threads that compute on a CPU; None: as many as torch takes."""
    load_format: str = "auto"
    """auto: the checkpoint's weights. dummy: random ones of its config's shapes, for benchmarks;
    the directory needs no weights and no tokenizer."""
    max_model_len: int | None = None
    """Longest prompt plus output; None: what the model states."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; None: 8192 on a GPU, 2048 on a CPU."""
    max_prefill_chunk: int | None = None
    """Most prompt tokens of one request in one step; None: only the step's budget."""
    block_size: int | None = None
    """Tokens a KV page holds; None: 16."""
    enable_prefix_caching: bool = True
    kv_cache_memory_bytes: int | None = None
    """None: enough for `max_num_seqs` full sequences, but on a GPU at most what the weights and a
    measured step leave of it, on a CPU at most a quarter of free memory."""
    gpu_memory_utilization: float = 0.92
    """Fraction of the GPU's memory for weights, steps and caches; without effect if the caches'
    size is given."""
    num_pages: int | None = None
    """Exact number of KV pages per cache group; overrides the memory budget."""
    enforce_eager: bool = False
    """On a GPU: launch every kernel of a step by itself, without CUDA graphs."""
    cuda_graph_sizes: Sequence[int] | None = None
    """Numbers of decoding requests to capture CUDA graphs for; None: a range up to max_num_seqs."""
    cudagraph_mode: str = "full"
    """Which steps are CUDA graphs. full: decoding ones, and those with prompt tokens up to as many
    as the device computes while the host launches a step. full_decode_only: decoding ones."""
    async_scheduling: bool | None = None
    """Plan a step while the one before runs; None: on a GPU."""
    executor: str = "inprocess"
    """inprocess, or process: a worker process that a crash cannot take the caller down with."""
    verify: bool = False
    """Compare logits with the plain model after every step of the recipe."""
    dump_graphs: str | Path | None = None
    """Directory for the graph's text after every step."""
    seed: int = 0
    """Of the stream that gives requests without a seed theirs."""
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self._positive("max_num_seqs")
        for name in (
            "max_model_len", "max_num_batched_tokens", "block_size", "max_prefill_chunk",
            "kv_cache_memory_bytes", "num_pages", "cpu_threads",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                self._positive(name)
        for size in self.cuda_graph_sizes or ():
            if type(size) is not int or not 1 <= size <= self.max_num_seqs:
                raise ConfigError(
                    f"cuda_graph_sizes has {size!r}; use integers from 1 to max_num_seqs="
                    f"{self.max_num_seqs}"
                )
        self._one_of("executor", EXECUTORS)
        self._one_of("task", TASKS)
        if self.task == "embed" and self.verify:
            raise ConfigError(
                "verify compares logits, which a model with task='embed' has none of; verify it "
                "with task='generate', whose graph is the same but for the head"
            )
        if self.visible_devices is not None and self.executor != "process":
            raise ConfigError(
                "visible_devices is for a process of the engine's own; use executor='process', or "
                "set CUDA_VISIBLE_DEVICES"
            )
        self._one_of("dtype", DTYPES)
        self._one_of("load_format", LOAD_FORMATS)
        self.cudagraph_mode = str(self.cudagraph_mode).lower()  # vLLM writes it in capitals
        self._one_of("cudagraph_mode", CUDAGRAPH_MODES)
        if self.load_format == "dummy" and not isinstance(self.model, (str, Path)):
            raise ConfigError(
                "load_format='dummy' makes weights for a checkpoint's config; a live model has "
                "its own"
            )
        fraction = self.gpu_memory_utilization
        if type(fraction) not in (int, float) or not 0 < fraction <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], not {fraction!r}")
        if type(self.seed) is not int:
            raise ConfigError(f"seed must be an integer, not {self.seed!r}")

    def resolved_recipe(self) -> Recipe:
        """What happens to the model.

        Raises:
            RecipeError: the recipe is wrong.
        """
        recipe = load_recipe(self.recipe, self.overrides)
        if self.task == "generate":
            return recipe
        from .embedding import embedding_recipe

        return embedding_recipe(recipe)

    @classmethod
    def from_options(cls, model: Any, options: Mapping[str, Any]) -> DeployConfig:
        """Builds a config from keywords; an unknown one is an error that suggests the nearest."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"deploy has no option '{name}'{suggest(name, known)}")
        return cls(model, **options)

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be a positive integer, not {value!r}")

    def _one_of(self, name: str, values: tuple[str, ...]) -> None:
        if getattr(self, name) not in values:
            raise ConfigError(
                f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}"
            )
