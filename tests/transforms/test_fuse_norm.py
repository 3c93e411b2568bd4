"""fuse_norm rewrites norms written out in float32, spares near misses and holds at other sizes."""

import pytest
import torch
from test_library import Small, count, logits, op_names, program_of
from torch import nn

from autodeploy.transforms.pipeline import run_step
from autodeploy.transforms.recipe import Step
from autodeploy.transforms.transform import TRANSFORMS

aten = torch.ops.aten


def written_out(self, x):
    x = torch.tanh(x)
    return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def cubed(self, x):
    x = torch.tanh(x)
    return self.scale * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5))


def of_each_token(self, x):
    x = torch.tanh(x)
    return self.scale * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5))


def centred_elsewhere(self, x):
    x = torch.tanh(x)
    return x + self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def scaled_by_one_number(self, x):
    x = torch.tanh(x)
    return self.scale[:1] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def program_with(body):
    model = Small(body)
    model.scale = nn.Parameter(torch.randn(64))
    return program_of(model, "canonicalize")


def fused(program, **options):
    return run_step(program, Step("n", TRANSFORMS["fuse_norm"](**options))).matches


def test_a_norm_written_out_is_one_op():
    program = program_with(written_out)
    before = [logits(program, 5, 3), logits(program, 9)]
    assert fused(program, devices=("cpu",)) == 1
    assert op_names(program).count("rms_norm") == 1
    assert count(program, aten.rsqrt.default) == 0
    for found, expected in zip((logits(program, 5, 3), logits(program, 9)), before, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "body",
    [cubed, of_each_token, centred_elsewhere, scaled_by_one_number],
    ids=lambda f: f.__name__,
)
def test_near_misses_are_spared(body):
    assert fused(program_with(body), devices=("cpu",)) == 0


def test_nothing_is_done_on_devices_without_a_kernel():
    assert fused(program_with(written_out)) == 0
