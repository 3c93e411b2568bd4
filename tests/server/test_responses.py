"""POST /v1/responses by plain HTTP: events in their order, items both ways, what is refused."""

import json

import pytest
from running_server import RunningServer

from autodeploy.server.parsing import AnswerParser, reasoning_format, tool_format
from autodeploy.server.response_items import messages_of, without_first
from autodeploy.server.response_output import OutputWriter

PATH = "/v1/responses"
GREEDY = {"temperature": 0, "max_output_tokens": 12}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "weather", "parameters": CITY}
DEMANDED = {
    "input": "How is it in Rome?", "tools": [TOOL], "tool_choice": "required",
    "parallel_tool_calls": False, "temperature": 0, "max_output_tokens": 80,
}  # fmt: skip
TEXT = (
    '<think>Rome.</think>Let me see.<tool_call>{"name": "weather", '
    '"arguments": {"city": "Rome"}}</tool_call>'
)


def streamed(server, **fields):
    """The events of a stream, after a look at their numbers and names."""
    with server.client.stream("POST", PATH, json={**fields, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = list(answer.iter_lines())
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [line[7:] for line in lines if line.startswith("event: ")] == [e["type"] for e in events]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert "[DONE]" not in "".join(lines)
    return events


def without_names(value):
    """The same without ids and times, which differ from response to response."""
    if isinstance(value, list):
        return [without_names(each) for each in value]
    if isinstance(value, dict):
        dropped = ("id", "created_at", "completed_at", "call_id")
        return {k: without_names(v) for k, v in value.items() if k not in dropped}
    return value


def test_a_text_is_answered_with_a_message(server):
    answer = server.post(
        PATH, input="Return the sum of two numbers.", model="demo", **GREEDY
    ).json()
    (item,) = answer["output"]
    (part,) = item["content"]
    assert (item["type"], item["role"], part["type"]) == ("message", "assistant", "output_text")
    chat = server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "Return the sum of two numbers."}],
        temperature=0, max_tokens=12,
    ).json()  # fmt: skip
    assert part["text"] == chat["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == 12
    assert answer["status"] == item["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_stream_tells_the_response_in_openais_order(server):
    # Many tokens: those that come while nobody reads are told together.
    asked = {**GREEDY, "input": "import", "max_output_tokens": 48, "ignore_eos": True}
    whole = server.post(PATH, **asked).json()
    events = streamed(server, **asked)
    kinds = [event["type"] for event in events]
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.incomplete",
    ]  # fmt: skip
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["status"] == "in_progress"
    assert "".join(deltas) == events[-4]["text"] == whole["output"][0]["content"][0]["text"]
    assert len(deltas) > 3
    told = events[-1]["response"]
    # One of them found the prompt in the prefix cache.
    for usage in (told["usage"], whole["usage"]):
        del usage["input_tokens_details"]
    assert without_names(told) == without_names(whole)


def test_a_demanded_call_is_an_item_and_its_output_is_taken(server):
    first = server.post(PATH, **DEMANDED).json()
    (call,) = first["output"]
    assert (call["type"], call["name"], first["status"]) == (
        "function_call",
        "weather",
        "completed",
    )
    assert json.loads(call["arguments"])["city"] in ("Oslo", "Rome")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    question = {"role": "user", "content": DEMANDED["input"]}
    for fields in (
        {"input": [question, call, output]},
        {"input": [output], "previous_response_id": first["id"]},
    ):
        answer = server.post(PATH, **fields, **GREEDY)
        assert answer.status_code == 200, answer.text


def test_a_streamed_call_comes_in_argument_deltas(server):
    events = streamed(server, **DEMANDED)
    kinds = [event["type"] for event in events]
    assert kinds[2] == "response.output_item.added"
    assert set(kinds[3:-3]) == {"response.function_call_arguments.delta"}
    assert kinds[-3:] == [
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    arguments = "".join(e["delta"] for e in events[3:-3])
    assert events[-3]["arguments"] == arguments == events[-2]["item"]["arguments"]
    assert json.loads(arguments)["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize("stream", [False, True])
def test_a_format_holds(server, stream):
    form = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
    for fields in ({"text": {"format": form}}, {"structured_outputs": {"json": CITY}}):
        fields |= {"input": "a city", "temperature": 0, "max_output_tokens": 60}
        if stream:
            answer = streamed(server, **fields)[-1]["response"]
        else:
            answer = server.post(PATH, **fields).json()
        assert json.loads(answer["output"][0]["content"][0]["text"])["city"] in ("Oslo", "Rome")
        assert answer["status"] == "completed"


def test_logprobs_are_told_where_they_are_asked_for(server):
    fields = {
        "input": "a",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        **GREEDY,
    }
    (part,) = server.post(PATH, **fields).json()["output"][0]["content"]
    assert "".join(each["token"] for each in part["logprobs"]) == part["text"]
    assert all(len(each["top_logprobs"]) == 2 for each in part["logprobs"])
    deltas = [e for e in streamed(server, **fields) if e["type"] == "response.output_text.delta"]
    told = [each for event in deltas for each in event["logprobs"]]
    assert [each["token"] for each in told] == [each["token"] for each in part["logprobs"]]


def test_what_was_said_before_is_gone_on_from(server):
    first = server.post(PATH, input="My name is Ada.", **GREEDY).json()
    second = server.post(
        PATH, input="What is it?", previous_response_id=first["id"], **GREEDY
    ).json()
    said = first["output"][0]["content"][0]["text"]
    spelled = server.post(
        PATH,
        input=[
            {"role": "user", "content": "My name is Ada."},
            {"role": "assistant", "content": [{"type": "output_text", "text": said}]},
            {"type": "message", "role": "user", "content": [
                {"type": "input_text", "text": "What is it?"}
            ]},
        ],
        **GREEDY,
    ).json()  # fmt: skip
    assert second["previous_response_id"] == first["id"]
    assert second["usage"]["input_tokens"] == spelled["usage"]["input_tokens"]
    assert second["output"][0]["content"] == spelled["output"][0]["content"]


def test_a_response_is_kept_until_it_is_deleted(server):
    made = server.post(PATH, input="a", metadata={"k": "v"}, **GREEDY).json()
    assert server.client.get(f"{PATH}/{made['id']}").json() == made
    assert made["metadata"] == {"k": "v"}
    gone = server.client.delete(f"{PATH}/{made['id']}").json()
    assert gone == {"id": made["id"], "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        assert server.client.request(method, f"{PATH}/{made['id']}").status_code == 404
    unkept = server.post(PATH, input="a", store=False, **GREEDY).json()
    assert unkept["store"] is False
    assert server.client.get(f"{PATH}/{unkept['id']}").status_code == 404
    answer = server.post(PATH, input="a", previous_response_id=unkept["id"])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "previous_response_not_found"


def test_instructions_come_first_and_are_not_handed_on(server):
    plain = server.post(PATH, input="a", **GREEDY).json()
    told = server.post(PATH, input="a", instructions="Be brief.", **GREEDY).json()
    assert told["usage"]["input_tokens"] > plain["usage"]["input_tokens"]
    after = [
        server.post(PATH, input="b", previous_response_id=one["id"], store=False, **GREEDY).json()
        for one in (plain, told)
    ]
    lengths = [len(one["output"][0]["content"][0]["text"]) for one in (plain, told)]
    if lengths[0] == lengths[1]:
        assert after[0]["usage"]["input_tokens"] == after[1]["usage"]["input_tokens"]


def test_items_in_front_are_left_out_where_that_is_allowed(server):
    long = [{"role": "user", "content": "word " * 400} for _ in range(8)]
    items = [*long, {"role": "user", "content": "Say yes."}]
    refused = server.post(PATH, input=items, **GREEDY)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    answer = server.post(PATH, input=items, truncation="auto", **GREEDY)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["input_tokens"] > 300
    alone = server.post(PATH, input="word " * 4000, truncation="auto", **GREEDY)
    assert alone.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"content": "a"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "a"}]},
         "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "f"}]}, "input[0].arguments"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "metadata": {"k": "\ud800"}}, None),
        ({"input": "a", "instructions": "\ud800"}, None),
        ({"input": [{"role": "user", "content": "a", "id": "\ud800"}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": [], "output": "a"}]},
         "input[0].call_id"),
        ({"input": "a", "top_logprobs": -1}, "top_logprobs"),
        ({"input": "a", "n": 2}, "n"),
        ({"input": "a", "messages": []}, "messages"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "conversation": "x"}, "conversation"),
        ({"input": "a", "prompt": {"id": "x"}}, "prompt"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice"),
        ({"input": "a", "text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "schema": 3}}}, "text.format"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "schema": {"type": 3}}}},
         "text.format"),
        ({"input": "a", "top_logprobs": 21}, "top_logprobs"),
        ({"input": "a", "previous_response_id": "resp_x"}, "previous_response_id"),
        ({**DEMANDED, "text": {"format": {"type": "json_object"}}}, "text.format"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_a_400(server, fields, param, stream):
    body = json.dumps({**fields, "stream": stream})
    headers = {"content-type": "application/json"}
    answer = server.client.post(PATH, content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_what_one_key_keeps_another_does_not_see():
    running = RunningServer(api_key=["first", "second"], response_store=1)
    try:
        mine, other = ({"Authorization": f"Bearer {key}"} for key in ("first", "second"))
        body = {"input": "a", **GREEDY}
        made = running.client.post(PATH, json=body, headers=mine).json()
        place = f"{PATH}/{made['id']}"
        assert running.client.get(place, headers=other).status_code == 404
        follow = {**body, "previous_response_id": made["id"]}
        assert running.client.post(PATH, json=follow, headers=other).status_code == 400
        assert running.client.get(place, headers=mine).status_code == 200
        running.client.post(PATH, json=body, headers=other)
        assert running.client.get(place, headers=mine).status_code == 404  # one is kept
        assert len(running.service.responses) == 1
    finally:
        running.close()


def test_reasoning_is_an_item_of_its_own():
    running = RunningServer(reasoning_parser="deepseek_r1", response_store=0)
    try:
        answer = running.post(PATH, input="a", **GREEDY).json()
        (item,) = answer["output"]
        assert item["type"] == "reasoning"
        assert item["content"][0]["type"] == "reasoning_text"
        assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 5
        assert answer["store"] is False
        kinds = [event["type"] for event in streamed(running, input="a", **GREEDY)]
        assert "response.reasoning_text.delta" in kinds
        assert "response.reasoning_text.done" in kinds
        again = running.post(PATH, input=[{"role": "user", "content": "a"}, item], **GREEDY)
        assert again.status_code == 200
    finally:
        running.close()


def test_a_stream_that_cannot_go_on_ends_with_a_failed_response():
    running = RunningServer(request_timeout=0.4)
    try:
        events = streamed(running, input="a", ignore_eos=True)
        assert events[-1]["type"] == "response.failed"
        failed = events[-1]["response"]
        assert failed["status"] == "failed"
        assert failed["error"]["code"] == "server_error"
        assert "0.4 seconds" in failed["error"]["message"]
        assert failed["output"][0]["status"] == "in_progress"
        answer = running.post(PATH, input="a", ignore_eos=True)
        assert answer.status_code == 504
        assert len(running.service.responses) == 0
    finally:
        running.close()


@pytest.mark.parametrize("step", [1, 7, len(TEXT)])
def test_an_answer_becomes_the_same_items_however_it_comes(step):
    parser = AnswerParser(tool_format("hermes"), reasoning_format("deepseek_r1"))
    stream, writer, kinds = parser.stream(), OutputWriter(), []
    for start in range(0, len(TEXT), step):
        pieces = stream.push(TEXT[start : start + step])
        kinds += [event["type"] for event in writer.add(pieces)]
    kinds += [event["type"] for event in writer.add(stream.end())]
    kinds += [event["type"] for event in writer.end(complete=True)]
    thought, message, call = writer.items
    assert thought["content"] == [{"type": "reasoning_text", "text": "Rome."}]
    assert message["content"][0]["text"] == "Let me see."
    assert json.loads(call["arguments"]) == {"city": "Rome"}
    assert (
        kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    )
    assert writer.reasoning == "Rome."


def test_what_an_assistant_did_in_one_turn_is_one_message():
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": "b"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": "y"},
        {"role": "assistant", "content": "c"},
    ]
    messages = messages_of(items, "Be brief.")
    assert [m["role"] for m in messages] == [
        "system", "user", "assistant", "tool", "tool", "assistant",
    ]  # fmt: skip
    turn = messages[2]
    assert (turn["content"], turn["reasoning_content"], len(turn["tool_calls"])) == ("b", "hm", 2)
    system = [{"role": "system", "content": "Be kind."}, *items]
    (first, *_) = messages_of(system, "Be brief.")
    assert [part["text"] for part in first["content"]] == ["Be brief.", "Be kind."]
    kept = without_first(system, 5)
    assert [item.get("role") for item in kept] == ["system", "assistant"]
