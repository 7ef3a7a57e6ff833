"""Generate a picture of the bundled base in a process of its own; print the bytes foretold and those used."""

import json
import sys

import torch

from controlkit import sampling
from controlkit.base import load_base
from controlkit.memory import Memory
from controlkit.memory_plan import Estimate, Request
from controlkit.training.memory import peak_mb

if __name__ == "__main__":
    torch.set_num_threads(1)
    base, memory = load_base("tiny"), Memory.of(sys.argv[2:])
    side = int(sys.argv[1])
    foretold = Estimate(base, [], Request(side, side)).phases(memory)
    sampling.generate(base, "a cube", steps=1, width=side, height=side, memory=memory)
    used = 1e6 * peak_mb(torch.device("cpu"))
    sys.stdout.write(json.dumps({"phases": foretold, "used": used}) + "\n")
