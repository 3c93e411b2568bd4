"""The transforms that ship with autodeploy, one file each; importing this registers them."""

from . import (
    absorb_latent,
    cache,
    canonicalize,
    compile,
    fuse_add_norm,
    fuse_gated_activation,
    fuse_linear,
    fuse_parallel_linears,
    fuse_rest,
    fuse_rotary_attention,
    fuse_rotary_table,
    fuse_router,
    gather_logits,
    load,
    lower,
)

__all__ = [
    "absorb_latent",
    "cache",
    "canonicalize",
    "compile",
    "fuse_add_norm",
    "fuse_gated_activation",
    "fuse_linear",
    "fuse_parallel_linears",
    "fuse_rest",
    "fuse_router",
    "fuse_rotary_attention",
    "fuse_rotary_table",
    "gather_logits",
    "load",
    "lower",
]
