"""Processes that begin with the heavy imports done.

They are forked from a server that has imported and never computed, so that a process costs the
tests what it does, and not the seconds of its imports. Each is a process of its own, with a pid to
kill and an exit code; functions and arguments are pickled by name, as for any new process.
"""

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "torch._dynamo", "torchvision", "pandas", "hydra",
     "sklearn.datasets", "hypothesis", "pytest"]
)  # fmt: skip
