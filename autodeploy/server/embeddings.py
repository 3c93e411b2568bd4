"""POST /v1/embeddings: a vector for each text, by a model served with --task embed."""

from __future__ import annotations

import base64
import uuid
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from ..embedding import embedding_params, vector_of
from ..outputs import RequestOutput
from ..prompts import require_task
from .generation import Generation
from .prompt_input import completion_prompts, count_prompts
from .protocol.embeddings import Embedding, EmbeddingRequest, Embeddings, EmbeddingUsage
from .service import Service, service_of

router = APIRouter()


@router.post("/v1/embeddings", responses={200: {"model": Embeddings}}, response_model=None)
async def embeddings(
    request: EmbeddingRequest, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """One embedding per prompt, in their order."""
    model = service.model_name(request.model)
    require_task("embed", service.host.living().task)
    return service.whole(_embed(request, service, model))


async def _embed(request: EmbeddingRequest, service: Service, model: str) -> Embeddings:
    llm, pooling = service.host.living(), service.config.pooling
    with service.admission.sequences(count_prompts(request.input)):
        prompts = await completion_prompts(
            llm, request.input, service.config, request.add_special_tokens, "input"
        )
        generation = Generation(
            service.host, service.metrics, f"embd-{uuid.uuid4().hex}", prompts,
            embedding_params(pooling), request.priority, request.cache_salt, pooling,
        )  # fmt: skip
        outputs = await generation.whole()
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    data = [
        Embedding(object="embedding", index=index, embedding=_shown(output, request))
        for index, output in enumerate(outputs)
    ]
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return Embeddings(object="list", data=data, model=model, usage=usage)


def _shown(output: RequestOutput, request: EmbeddingRequest) -> list[float] | str:
    vector = vector_of(output, dimensions=request.dimensions)
    if request.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
