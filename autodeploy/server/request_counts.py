"""RequestCounts: what the server counts of the requests that one engine serves."""

from __future__ import annotations

from collections import Counter

from .histogram import COUNTS, SECONDS, TOKEN_SECONDS, Histogram, token_counts

FINISHED_REASONS = ("stop", "length", "abort", "error")


class RequestCounts:
    """Counters and histograms; filled and read on the event loop.

    max_model_len: tokens; the histograms of token counts end there.
    """

    def __init__(self, max_model_len: int) -> None:
        self.finished: Counter[str] = Counter(dict.fromkeys(FINISHED_REASONS, 0))
        self.refused = 0
        self.prompt_tokens = 0
        tokens = token_counts(max_model_len)
        self.request_prompt_tokens = Histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a finished request.", tokens
        )
        self.request_generation_tokens = Histogram(
            "vllm:request_generation_tokens", "Output tokens of a finished request.", tokens
        )
        self.params_n = Histogram(
            "vllm:request_params_n", "The parameter n of a finished request.", COUNTS
        )
        self.params_max_tokens = Histogram(
            "vllm:request_params_max_tokens",
            "The parameter max_tokens of a finished request that had one.", tokens,
        )  # fmt: skip
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token, at the server.", SECONDS,
        )  # fmt: skip
        self.inter_token = Histogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of a sequence, at the server; of a request that is not streamed, "
            "its mean, once per token.", TOKEN_SECONDS,
        )  # fmt: skip
        self.per_output_token = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between the tokens of a finished request, in the engine.", TOKEN_SECONDS,
        )  # fmt: skip
        self.end_to_end = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From a request's arrival to its end, at the server.", SECONDS,
        )  # fmt: skip
        self.queue = Histogram(
            "vllm:request_queue_time_seconds",
            "From a request's arrival to the first step that computes some of it.", SECONDS,
        )  # fmt: skip
        self.prefill = Histogram(
            "vllm:request_prefill_time_seconds",
            "From the first step that computes some of a request to its first token.", SECONDS,
        )  # fmt: skip
        self.decode = Histogram(
            "vllm:request_decode_time_seconds",
            "From a request's first token to its last.", SECONDS,
        )  # fmt: skip
        self.inference = Histogram(
            "vllm:request_inference_time_seconds",
            "From the first step that computes some of a request to its last token.", SECONDS,
        )  # fmt: skip
        self.histograms = [v for v in vars(self).values() if isinstance(v, Histogram)]
