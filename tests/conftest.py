"""Settings of the whole suite."""

import os

import torch

if not torch.cuda.is_available():
    # Read by triton when it is first imported: kernels are checked in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
