"""Imported by the process that tests.faults and tests.hostile fork from: what a run imports, and a run, so that none is
the first."""

import tempfile

import torch

from tests import faults, hostile  # noqa: F401
from tests.small_runs import tiny_config
from vit_fast import training

torch.set_num_threads(1)  # threads would be missing in what is forked
with tempfile.TemporaryDirectory() as folder:
    training.train(tiny_config(folder))
    training.train(tiny_config(folder), folder)
