"""The demo model under constraints, in both executors."""

import json

import jsonschema
import pytest

from autodeploy import SamplingParams, deploy
from autodeploy.runtime.structured_params import StructuredOutputsParams as Structured


@pytest.mark.parametrize("executor", ["inprocess", "process"])
def test_the_demo_model_writes_valid_json(executor):
    schema = {
        "type": "object", "additionalProperties": False, "required": ["name", "args"],
        "properties": {"name": {"type": "string", "pattern": "^[a-z_]{1,12}$"},
                       "args": {"type": "array", "maxItems": 3, "items": {"enum": ["x", "y"]}}},
    }  # fmt: skip
    with deploy("examples/demo_model", executor=executor) as engine:
        structured = Structured(json=schema, disable_any_whitespace=True)
        params = SamplingParams(max_tokens=80, structured_outputs=structured)
        calls = [params.clone(seed=n) for n in range(4)]
        for output in engine.generate(["call = "] * 4, calls):
            assert output.outputs[0].finish_reason == "stop"
            jsonschema.validate(json.loads(output.outputs[0].text), schema)
        asked = [{"role": "user", "content": "Add or multiply?"}]
        choice = Structured(choice=["add", "multiply"])
        answer = engine.chat(asked, SamplingParams(structured_outputs=choice))[0].outputs[0]
        assert answer.text in ("add", "multiply")
