"""docs/observability.md: its table is what /metrics gives."""

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from autodeploy.runtime.messages import EngineStats
from autodeploy.server.metrics import ServerMetrics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "observability.md"
ROW = re.compile(r"^\| `((?:vllm|autodeploy):\w+)` \| (\w+) \|", re.MULTILINE)


class Engine:
    stats = EngineStats()
    open_requests = 0
    max_model_len = 100


def test_the_table_lists_every_metric_and_its_type_and_no_other():
    metrics = ServerMetrics(lambda: [Engine()], "demo")
    metrics.responses["/", "200"] += 1
    families = text_string_to_metric_families(metrics.text().decode())
    given = {f.name + "_total" * (f.type == "counter"): f.type for f in families}
    assert dict(ROW.findall(PAGE.read_text())) == given


def test_the_table_has_the_labels_that_it_says():
    metrics = ServerMetrics(lambda: [Engine()], "demo")
    metrics.responses["/", "200"] += 1
    for family in text_string_to_metric_families(metrics.text().decode()):
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        extra = {"vllm:request_success": {"finished_reason"}}.get(family.name, set())
        expected = {"model_name", "engine"} | extra
        if family.name == "autodeploy:http_responses":
            expected = {"route", "status"}
        assert labels == expected, family.name
