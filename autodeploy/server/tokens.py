"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from ..detokenizer import decode
from ..errors import UnknownTokenError
from .errors import invalid
from .prompt_input import chat_prompt, completion_prompts
from .protocol.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from .service import Service, service_of

router = APIRouter()


@router.post("/tokenize")
async def tokenize(
    request: TokenizeRequest, service: Annotated[Service, Depends(service_of)]
) -> Tokenized:
    """Token ids of a prompt, or of messages under the chat template."""
    service.model_name(request.model)
    llm = service.host.living()
    if (request.prompt is None) == (request.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if request.messages is not None:
        kwargs = {**(request.chat_template_kwargs or {})}
        if request.tools is not None:
            kwargs["tools"] = request.tools
        if request.continue_final_message:
            kwargs["continue_final_message"] = True
        prompt = await chat_prompt(
            llm,
            request.messages,
            service.config,
            add_generation_prompt=request.add_generation_prompt,
            chat_template=request.chat_template,
            template_kwargs=kwargs,
        )
    else:
        (prompt,) = await completion_prompts(
            llm, request.prompt, service.config, request.add_special_tokens
        )
    ids = prompt.token_ids
    texts = llm.tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
    return Tokenized(count=len(ids), max_model_len=llm.max_model_len, tokens=ids, token_strs=texts)


@router.post("/detokenize")
async def detokenize(
    request: DetokenizeRequest, service: Annotated[Service, Depends(service_of)]
) -> Detokenized:
    """The text of token ids."""
    service.model_name(request.model)
    llm = service.host.living()
    if llm.tokenizer is None:
        raise invalid("this server has no tokenizer")
    for token in request.tokens:
        if not 0 <= token < llm.vocab_size:
            raise UnknownTokenError(
                f"token id {token} is outside the vocabulary; use 0 to {llm.vocab_size - 1}"
            )
    return Detokenized(prompt=decode(llm.tokenizer, request.tokens))
