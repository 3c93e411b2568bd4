"""A small server around one model: what observability needs of a real one, and no more."""

import asyncio
import json
from contextlib import aclosing, asynccontextmanager, contextmanager
from threading import Thread

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse

from autodeploy import AsyncLLM, SamplingParams
from autodeploy.server.engine_host import EngineHost
from autodeploy.server.metrics import ServerMetrics
from autodeploy.server.observation import Observation
from autodeploy.server.page import page_router
from autodeploy.server.replica import Replica
from autodeploy.server.status import status_router
from autodeploy.server.watch import watched

MODEL = "examples/demo_model"
OPTIONS = {"max_num_seqs": 16, "max_model_len": 512, "num_pages": 256}


def observed_app(llm, traces=None, key=None):
    """An app with the routes of observability and two that generate; `app.state.metrics`."""
    app = FastAPI()

    def key_checked(request: Request):
        if key is not None and request.headers.get("authorization") != f"Bearer {key}":
            raise HTTPException(401, "the API key is wrong")

    @app.exception_handler(HTTPException)
    async def refuse(request, error):
        return JSONResponse({"error": {"message": error.detail}}, error.status_code)

    metrics = app.state.metrics = ServerMetrics(lambda: [llm], "demo")
    app.include_router(metrics.router())
    status = status_router(EngineHost([Replica(llm)]), "demo", key is not None)
    app.include_router(status, dependencies=[Depends(key_checked)])
    app.include_router(page_router())

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await answer(request, lambda body: body["prompt"])

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        return await answer(request, lambda body: chat_prompt(llm, body["messages"]), chat=True)

    @app.post("/broken")
    async def broken():
        raise RuntimeError("it broke")

    async def answer(request, prompt_of, chat=False):
        key_checked(request)
        body = await request.json()
        params = SamplingParams(
            max_tokens=body.get("max_tokens", 16),
            temperature=body.get("temperature", 0),
            ignore_eos=body.get("ignore_eos", False),
            stop=body.get("stop"),
            n=body.get("n", 1),
        )
        kind = "delta" if body.get("stream") else "final"
        outputs = llm.generate(prompt_of(body), params, output_kind=kind)
        outputs = watched(outputs, metrics, params, kind)
        if body.get("stream"):
            return StreamingResponse(events(outputs, chat), media_type="text/event-stream")
        (output,) = [output async for output in outputs]
        return {"choices": [{"text": part.text} for part in output.outputs]}

    app.add_middleware(Observation, metrics=metrics, traces=traces)
    return app


def chat_prompt(llm, messages):
    return llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


async def events(outputs, chat):
    tokens = 0
    async with aclosing(outputs):
        async for output in outputs:
            for part in output.outputs:
                tokens += len(part.token_ids)
                text = {"delta": {"content": part.text}} if chat else {"text": part.text}
                choice = {"index": part.index, "finish_reason": part.finish_reason, **text}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
    yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n\n"
    yield "data: [DONE]\n\n"


@asynccontextmanager
async def deployed():
    """An AsyncLLM of the demo model, in this process."""
    llm = await asyncio.to_thread(AsyncLLM, MODEL, **OPTIONS)
    async with llm:
        yield llm


@contextmanager
def served(app):
    """The app behind a real socket, in a thread; gives its URL."""
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
