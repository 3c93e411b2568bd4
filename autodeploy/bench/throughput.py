"""Output tokens per second on a ragged workload, beside Hugging Face in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..custom_ops.cost import Cost
from ..llm import LLM
from ..runtime.sampling_params import SamplingParams
from ..runtime.structured_params import StructuredOutputsParams
from ..transforms.cost import Peaks, workload_floor_seconds
from .report import Roof, Row
from .workload import Workload

BATCH = 8


@dataclass(frozen=True)
class Result:
    """One system's run of one workload."""

    name: str
    seconds: float
    output_tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds


def run_autodeploy(
    llm: LLM, work: Workload, structured: StructuredOutputsParams | None = None
) -> Result:
    """All requests submitted at once, greedy, exactly the asked number of tokens each.

    structured: a constraint, of which no output may reach the end.
    """
    free = structured is None
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=n, ignore_eos=free, structured_outputs=structured
        )
        for n in work.outputs
    ]
    started = time.perf_counter()
    outputs = llm.generate([list(p) for p in work.prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    made = sum(len(o.outputs[0].token_ids) for o in outputs)
    return Result("autodeploy", seconds, made)


def measure(llm: LLM, roof: Roof, work: Workload, most: int, repeat: int) -> Row:
    """The median of `repeat` runs. most: requests that run at once."""
    runs = [run_autodeploy(llm, work) for _ in range(repeat)]
    rate = statistics.median(run.tokens_per_second for run in runs)
    prompts = [len(prompt) for prompt in work.prompts]

    def floor(cost: Cost, peaks: Peaks) -> float:
        seconds = workload_floor_seconds(cost, prompts, work.outputs, most, peaks)
        return work.output_tokens / seconds

    details = {
        "seconds": work.output_tokens / rate,
        "tokens_per_second": rate,
        "runs": [run.tokens_per_second for run in runs],
    }
    return Row("throughput", "autodeploy", rate, "tok/s", roof.floor(floor), details)


SCHEMA = {
    "type": "array",
    # More than any workload asks for: every output has the length that its request names.
    "minItems": 4096,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
            "score": {"type": ["number", "null"]},
        },
        "required": ["name", "age", "tags", "score"],
        "additionalProperties": False,
    },
}
"""What the outputs of `measure_structured` are pieces of."""


def measure_structured(llm: LLM, work: Workload, repeat: int) -> Row:
    """The same work with every request under a JSON schema, in turn with runs without one.

    The row's detail `ratio` is the median of their quotients; the grammar is compiled before.
    """
    structured = StructuredOutputsParams(json=SCHEMA)
    first = SamplingParams(temperature=0.0, max_tokens=1, structured_outputs=structured)
    llm.generate([work.prompts[0]], first, use_tqdm=False)
    pairs = [(run_autodeploy(llm, work), run_autodeploy(llm, work, structured))
             for _ in range(repeat)]  # fmt: skip
    rate = statistics.median(bound.tokens_per_second for _, bound in pairs)
    free = [run.tokens_per_second for run, _ in pairs]
    ratio = statistics.median(
        bound.tokens_per_second / free.tokens_per_second for free, bound in pairs
    )
    details = {"ratio": ratio, "tokens_per_second": rate, "tokens_per_second_without": free}
    name = f"with a JSON schema ({ratio:.2f} of without)"
    return Row("throughput", name, rate, "tok/s", None, details)


def measure_against(name: str, model: nn.Module, work: Workload) -> Row:
    """One run of one of AGAINST."""
    result = AGAINST[name](model, work)
    rate = result.tokens_per_second
    details = {"seconds": result.seconds, "tokens_per_second": rate}
    return Row("throughput", result.name, rate, "tok/s", None, details)


def run_generate(model: nn.Module, work: Workload) -> Result:
    """`model.generate` in batches of 8 with left padding; a batch runs to its longest output.

    Only tokens that were asked for count.
    """
    device = next(model.parameters()).device
    started = time.perf_counter()
    for first in range(0, len(work.prompts), BATCH):
        prompts = work.prompts[first : first + BATCH]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = (torch.arange(width) >= torch.tensor([[width - len(p)] for p in prompts])).long()
        longest = max(work.outputs[first : first + BATCH])
        with torch.inference_mode():
            model.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask.to(device),
                eos_token_id=None,
                do_sample=False,
                max_new_tokens=longest,
            )
    return Result("transformers generate", time.perf_counter() - started, work.output_tokens)


def run_generate_batch(model: nn.Module, work: Workload) -> Result:
    """transformers' continuous batching, each request with its own number of tokens.

    On a GPU with the fastest attention that is installed, which lets it use CUDA graphs and
    overlap its host; warm-up is not timed.
    """
    from transformers import GenerationConfig

    on_gpu = next(model.parameters()).device.type == "cuda"
    if on_gpu:
        model.set_attn_implementation(_fastest_attention())  # type: ignore[operator]
    config = GenerationConfig(do_sample=False, max_new_tokens=max(work.outputs), pad_token_id=0)
    made = 0
    with model.continuous_batching_context_manager(  # type: ignore[operator]
        generation_config=config, block=True, timeout=5, warmup=on_gpu
    ) as manager:
        started = time.perf_counter()
        for index, (prompt, count) in enumerate(zip(work.prompts, work.outputs, strict=True)):
            manager.add_request(
                list(prompt), request_id=f"r{index}", max_new_tokens=count, eos_token_id=-1
            )
        finished = 0
        while finished < len(work.prompts):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped by itself")
                continue
            if result.is_finished():
                finished += 1
                made += len(result.generated_tokens)
        seconds = time.perf_counter() - started
    return Result("transformers generate_batch", seconds, made)


def _fastest_attention() -> str:
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


AGAINST: dict[str, Callable[[nn.Module, Workload], Result]] = {
    "generate": run_generate,
    "generate_batch": run_generate_batch,
    "hf": run_generate_batch,
}
"""What `--against` can name."""
