"""Distillation by soft targets from hidden states and heads: the operator, its definition and its implementations."""

from kdkernels.ops.linear_distillation.api import linear_distillation_loss
from kdkernels.ops.linear_distillation.head import Head
from kdkernels.ops.linear_distillation.top_k import TopKTeacher, topk_teacher

__all__ = ["Head", "TopKTeacher", "linear_distillation_loss", "topk_teacher"]
