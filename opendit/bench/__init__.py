"""`python -m opendit bench`: what opendit gives on this machine, beside plain PyTorch and `torch.compile`.

    training step    forward, loss, backward, optimizer; bf16 autocast on a GPU, fp32 on a CPU
    sampling step    one evaluation without gradients, of samples and their unconditional twins for a known model

Every variant has the same weights, batch and label drops. Before it is timed it is held against the plain model in a
higher precision (fp32 without TF32 on a GPU, fp64 on a CPU): gradients, the losses of a few steps, outputs. It may be
1.2 times as far off as the plain model is in the precision that is measured; what is further off gets no figure.
"""

from opendit.bench.jobs import Job, job_of_model, job_of_name
from opendit.bench.measuring import VARIANTS, measure
from opendit.bench.table import as_json, table

__all__ = ["VARIANTS", "Job", "as_json", "job_of_model", "job_of_name", "measure", "table"]
