"""autodeploy: deploy any Hugging Face causal language model.

    from autodeploy import deploy, SamplingParams

    llm = deploy(model, tokenizer=tokenizer)
    for out in llm.generate(["def fib(n):"], SamplingParams(max_tokens=64)):
        print(out.outputs[0].text)

Names are loaded when they are first used, so that `import autodeploy` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .async_llm import AsyncLLM
    from .beam_search import BeamSearchParams
    from .config import DeployConfig
    from .deployment import deploy
    from .llm import LLM
    from .outputs import CompletionOutput, EmbeddingRequestOutput, RequestOutput
    from .runtime.sampling_params import SamplingParams
    from .runtime.structured_params import StructuredOutputsParams

__version__ = "0.1.0"

_HOMES = {
    "AsyncLLM": "async_llm",
    "BeamSearchParams": "beam_search",
    "CompletionOutput": "outputs",
    "DeployConfig": "config",
    "EmbeddingRequestOutput": "outputs",
    "LLM": "llm",
    "RequestOutput": "outputs",
    "SamplingParams": "runtime.sampling_params",
    "StructuredOutputsParams": "runtime.structured_params",
    "deploy": "deployment",
}

__all__ = [
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "DeployConfig",
    "EmbeddingRequestOutput",
    "LLM",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "deploy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autodeploy' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
