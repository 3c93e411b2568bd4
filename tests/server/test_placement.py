"""What part of the machine each replica gets."""

import pytest
import torch

from autodeploy.config import DeployConfig
from autodeploy.errors import ConfigError
from autodeploy.server.placement import replica_options


@pytest.fixture
def gpus(monkeypatch):
    def have(count, visible=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return have


def seen(options):
    return [each.get("visible_devices") for each in options]


def test_one_engine_keeps_its_options():
    assert replica_options({"device": "cuda:1", "seed": 7}, 1) == [{"device": "cuda:1", "seed": 7}]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_replica_has_a_gpu_of_its_own(gpus, device):
    gpus(4)
    assert seen(replica_options({"device": device}, 3)) == ["0", "1", "2"]


def test_gpus_are_those_that_the_server_may_see(gpus):
    gpus(2, visible="5, 3")
    assert seen(replica_options({}, 2)) == ["5", "3"]
    assert seen(replica_options({"visible_devices": "GPU-a,GPU-b", "device": "cuda"}, 2)) == [
        "GPU-a", "GPU-b",
    ]  # fmt: skip


def test_too_few_gpus_or_one_for_all_are_refused(gpus):
    gpus(1)
    with pytest.raises(ConfigError, match="1 can be seen"):
        replica_options({}, 2)
    with pytest.raises(ConfigError, match="'cuda:0' names one for all"):
        replica_options({"device": "cuda:0"}, 2)


def test_replicas_on_a_cpu_share_its_threads(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    assert [each["cpu_threads"] for each in replica_options({}, 4)] == [2] * 4
    assert [each["cpu_threads"] for each in replica_options({}, 20)] == [1] * 20
    assert [each["cpu_threads"] for each in replica_options({"cpu_threads": 3}, 2)] == [3, 3]


def test_replicas_draw_their_own_random_numbers(gpus):
    gpus(0)
    assert [each["seed"] for each in replica_options({"seed": 5}, 3)] == [5, 6, 7]


def test_replicas_need_processes(gpus):
    gpus(0)
    with pytest.raises(ConfigError, match="executor='inprocess'"):
        replica_options({"executor": "inprocess"}, 2)
    with pytest.raises(ConfigError, match="visible_devices"):
        DeployConfig("m", visible_devices="1")
    assert DeployConfig("m", visible_devices="1", executor="process").visible_devices == "1"
