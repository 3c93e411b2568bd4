"""Options several commands share: recipes and what `deploy` can be told."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import ConfigError


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """--set, which changes options of recipe steps."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="STEP.OPTION=VALUE", dest="changes",
        help="change an option of a recipe step; the value is YAML (repeatable)",
    )  # fmt: skip


def read_changes(changes: list[str]) -> dict[str, dict[str, Any]]:
    """Overrides by step id from `STEP.OPTION=VALUE` words.

    Raises:
        ConfigError: a word has another form, or its value is not YAML.
    """

    overrides: dict[str, dict[str, Any]] = {}
    for change in changes:
        place, equals, value = change.partition("=")
        step, dot, option = place.partition(".")
        if not (equals and dot and step and option):
            raise ConfigError(f"--set takes STEP.OPTION=VALUE, not '{change}'")
        overrides.setdefault(step, {})[option] = yaml_value(change, value)
    return overrides


def yaml_value(change: str, text: str) -> Any:
    """The value of a `--set` word.

    Raises:
        ConfigError: it is not YAML.
    """
    # omegaconf brings PyYAML with it, and reads recipe files by it.
    import yaml
    from omegaconf import OmegaConf

    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {change}: '{text}' is not YAML; write a list as [a, b], and quote the whole "
            "option for the shell"
        ) from error
    return dict(parsed)["value"]


def add_deploy_options(parser: argparse.ArgumentParser) -> None:
    """Fields of DeployConfig as flags, named as in vLLM; what is not given keeps its default."""
    group = parser.add_argument_group("deployment")
    group.add_argument("--recipe", default="default", help="name or path (default: default)")
    add_recipe_options(parser)
    group.add_argument(
        "--task", choices=("generate", "embed"),
        help="embed: a vector for each prompt, by the model without its head",
    )  # fmt: skip
    group.add_argument("--tokenizer", help="path or id; default: the checkpoint's own")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; auto: the checkpoint's",
    )
    group.add_argument(
        "--load-format", choices=("auto", "dummy"),
        help="dummy: random weights of the config's shapes, for benchmarks",
    )  # fmt: skip
    group.add_argument("--device", help="such as cpu or cuda:0; default: cuda if there is one")
    for name, text in (
        ("max-model-len", "longest prompt plus output, in tokens"),
        ("max-num-seqs", "most sequences in one step"),
        ("max-num-batched-tokens", "token budget of one step"),
        ("block-size", "tokens in a KV page"),
        ("kv-cache-memory-bytes", "memory of all caches together"),
        ("cpu-threads", "threads that compute on a CPU"),
    ):
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)
    group.add_argument(
        "--gpu-memory-utilization", type=float, metavar="FRACTION",
        help="of the GPU's memory, for weights, steps and caches (default: 0.92)",
    )  # fmt: skip
    group.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=None,
        help="reuse pages between requests that start alike (default: yes)",
    )  # fmt: skip
    group.add_argument("--enforce-eager", action="store_true", default=None,
                       help="no CUDA graphs: every kernel is launched by itself")  # fmt: skip
    group.add_argument("--cuda-graph-sizes", type=int, nargs="+", metavar="N",
                       help="numbers of decoding requests to capture graphs for")  # fmt: skip
    group.add_argument(
        "--cudagraph-mode", type=str.lower, choices=("full", "full_decode_only"),
        help="which steps are CUDA graphs: all that gain by it, or those without prompt tokens",
    )  # fmt: skip
    group.add_argument(
        "--async-scheduling", action=argparse.BooleanOptionalAction, default=None,
        help="plan a step while the one before runs (default: on a GPU)",
    )  # fmt: skip
    group.add_argument(
        "--visible-devices", metavar="GPUS",
        help="GPUs that the engine's process sees, as CUDA_VISIBLE_DEVICES has them",
    )  # fmt: skip
    group.add_argument("--executor", choices=("inprocess", "process"), help="where the engine runs")
    group.add_argument("--trust-remote-code", action="store_true", default=None,
                       help="run code that the checkpoint brings along")  # fmt: skip
    group.add_argument("--verify", action="store_true", default=None,
                       help="compare logits with the plain model after every step")  # fmt: skip
    group.add_argument("--dump-graphs", metavar="DIR", help="write the graph's text per step")


_DEPLOY = (
    "task", "tokenizer", "dtype", "load_format", "device", "max_model_len", "max_num_seqs",
    "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes", "gpu_memory_utilization",
    "enable_prefix_caching", "enforce_eager", "cuda_graph_sizes", "cudagraph_mode",
    "async_scheduling", "executor", "visible_devices", "cpu_threads", "trust_remote_code", "verify",
    "dump_graphs",
)  # fmt: skip


def deploy_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords for `deploy` from parsed flags."""
    given = {name: getattr(args, name) for name in _DEPLOY if getattr(args, name) is not None}
    return {**given, "recipe": args.recipe, "overrides": read_changes(args.changes)}
