"""Distillation with the Trainer of transformers: the logits of student and teachers are never all there.

trainer = DistillationTrainer(
    student, TrainingArguments(...), teachers=teacher, distillation=Distillation(temperature=2, alpha=0.5),
    train_dataset=dataset, data_collator=collator,
)
trainer.train()
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.integrations.distillation import Distillation
from kdkernels.integrations.language_model import LanguageModel, Pass, counted
from kdkernels.losses import nonzero

try:
    from safetensors.torch import load_file, save_file
    from transformers import Trainer, TrainerCallback
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
except ImportError as error:
    raise ImportError(
        "kdkernels.integrations.transformers needs transformers and accelerate: pip install kdkernels[transformers]"
    ) from error

__all__ = ["Distillation", "DistillationTrainer"]

ALIGNMENT = "distillation_alignment.safetensors"  # in a checkpoint, beside the model's own files
TeacherInputs = Callable[[dict[str, Any]], Mapping[str, Any]]


class DistillationTrainer(Trainer):
    """Distils frozen teachers into a student that ends in a language model's head.

    Student and teachers are causal, seq2seq (speech-to-text too) or masked language models of transformers, or
    PeftModels of one. Each runs as ever, but its head is only asked what it is: hidden states and head make the loss,
    by `kdkernels.nn.LinearDistillation`, of which no (batch, tokens, V) logits are kept. Where the config speaks of a
    scale or a softcap of logits, they are part of the head; a model that does anything else to its logits is refused
    in its first pass. While metrics are computed (`compute_metrics`), and in `predict`, the student makes its own
    logits in a second pass.

    The loss of a batch is

        soft_weight · soft targets, mixed with hard labels by alpha + alignment_weight · projection alignment

    each averaged over the tokens that count: those whose label is not −100 and whose attention mask is not 0. Of a
    causal model a state belongs to the next token. With gradient accumulation, and on several processes, the average is
    over all tokens of the step. Without labels the attention mask alone counts.

    The alignment's learned projections are trained by the Trainer's optimizer, clipped by their own norm, and kept in
    the checkpoints' `distillation_alignment.safetensors`.

    Args:
        model: the student.
        args: as in Trainer.
        teachers: one model or a list, no parameter of which is trained. They are moved to the student's device and run
            in eval mode without gradients.
        distillation: the options; soft targets alone when None.
        teacher_inputs: makes a teacher's inputs of the student's, for all teachers, or a list of one or None for each.
            Its tokens must be those of the student. Columns that only it needs are kept by the training argument
            `remove_unused_columns=False`.
        kwargs: as in Trainer; all but `model_init` and `compute_loss_func`.

    Raises:
        TypeError: an argument has the wrong type, or a head is a layer that cannot be fused.
        ValueError: an option does not fit the models, or a head does what cannot be fused; the message names it.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        teachers: nn.Module | Sequence[nn.Module],
        distillation: Distillation | None = None,
        teacher_inputs: TeacherInputs | Sequence[TeacherInputs | None] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}, but must be a torch.nn.Module")
        for name in ("model_init", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} was given, but must be None: model and loss are those of the distillation")
        options = Distillation() if distillation is None else distillation
        if not isinstance(options, Distillation):
            raise TypeError(f"distillation is {type(options).__name__}, but must be a Distillation")
        self.distillation = options
        self.student = LanguageModel("model", model)
        self.teachers = _as_teachers(teachers, model)
        self.teacher_inputs = _as_inputs(teacher_inputs, len(self.teachers))
        options.check_teachers(len(self.teachers))
        self._shift = _shifts(self.student, options.shift_labels)
        super().__init__(model=model, args=args, **kwargs)
        _check_arguments(self)
        self.model_accepts_loss_kwargs = True  # the loss is scaled for gradient accumulation in older versions too
        for teacher in self.teachers:
            teacher.model.to(self.args.device)
        self.soft = options.soft_targets().to(self.args.device)
        self.alignment = options.alignments(self.student, self.teachers)
        if self.alignment is not None:
            self.alignment.to(self.args.device)
            if self.lr_scheduler is not None and self._learned():
                raise ValueError(
                    "optimizers has a scheduler, but must have none where projections are learned: the Trainer adds "
                    "them to the optimizer first"
                )
            self.add_callback(_TrainAlignment(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss of a batch: its share of `num_items_in_batch`, or without it the mean.

        Args:
            num_items_in_batch: how many tokens count in the whole step; or (2,), those and the encoder's frames, as
                `get_batch_samples` says.
            return_outputs: the student's outputs too. Their logits have no points.
        """
        options, aligns = self.distillation, self.alignment is not None
        labels, counts = self._counted(inputs)
        student = self.student.run(inputs, hidden_states=aligns, wrapped=model)
        with self.accelerator.autocast():
            teachers = self._taught(inputs, aligns)
            own = self._amounts(inputs)
            totals = own if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=own.device)
            if totals.dim() == 0:  # of tokens alone: frames are as many for each
                totals = torch.stack([totals, totals * own[1] / nonzero(own[0])])
            totals = nonzero(totals)
            loss = student.states.new_zeros((), dtype=torch.float32)
            if options.soft_weight > 0:
                states, heads = [teacher.states for teacher in teachers], [teacher.head for teacher in teachers]
                total = self.soft(student.states, student.head, states, heads, labels=labels, weights=counts)
                loss = loss + options.soft_weight * total / totals[0]
            if self.alignment is not None:
                mean = self.alignment(*self._hidden(inputs, student, teachers, counts))
                which = 0 if self._at_tokens() else 1
                loss = loss + options.alignment_weight * mean * own[which] / totals[which]
        return (loss, student.outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of a step, and (2,), the tokens and the encoder's frames that count in them, for each process."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        amounts = torch.stack([self._amounts(inputs).to(device) for inputs in samples]).sum(0)
        # gradients are averaged over the processes, so each divides by the average
        return samples, self.accelerator.reduce(amounts, reduction="mean")

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The distillation loss and, unless only that is wanted, the student's logits of a pass of its own."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.compute_loss(model, inputs).detach()
        if prediction_loss_only:
            return loss, None, None
        labels = inputs.get("labels")
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        _, logits, _ = super().prediction_step(model, self.student.decoded(inputs, unlabelled), False, ignore_keys)
        return loss, logits, labels

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, of the learned projections too."""
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        added = [p for p in self._learned() if id(p) not in known]
        if added:
            optimizer.add_param_group({"params": added, "weight_decay": self.args.weight_decay})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student as ever, and the learned projections beside it."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and self.alignment is not None and self._learned():
            save_file(self.alignment.state_dict(), Path(output_dir or str(self.args.output_dir)) / ALIGNMENT)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_alignment(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_alignment(self.state.best_model_checkpoint)

    def _load_alignment(self, checkpoint: Any) -> None:
        if self.alignment is None or not self._learned():
            return
        path = Path(checkpoint) / ALIGNMENT
        if not path.exists():
            raise ValueError(f"{checkpoint} has no {ALIGNMENT}, but the projections of `pairs` are learned")
        self.alignment.load_state_dict(load_file(path, device=str(self.args.device)))

    def _learned(self) -> list[nn.Parameter]:
        return [] if self.alignment is None else list(self.alignment.parameters())

    def _taught(self, inputs: dict[str, Any], hidden_states: bool) -> list[Pass]:
        found = []
        for teacher, own_inputs in zip(self.teachers, self.teacher_inputs, strict=True):
            teacher.model.eval()
            with torch.no_grad():
                given = inputs if own_inputs is None else self._prepare_inputs(dict(own_inputs(dict(inputs))))
                found.append(teacher.run(given, hidden_states=hidden_states))
        return found

    def _counted(self, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
        if inputs.get("shift_labels") is not None:
            raise ValueError("inputs has shift_labels, but must have labels: the Trainer shifts them")
        return counted(inputs, encoder_decoder=self.student.encoder_decoder, shift=self._shift)

    def _at_tokens(self) -> bool:
        """Whether alignment is of the states that the soft targets are of."""
        return not (self.student.encoder_decoder and self.distillation.states == "encoder")

    def _amounts(self, inputs: Mapping[str, Any]) -> Tensor:
        """(2,): the tokens that count, and the encoder's frames, or rows where no mask tells them apart."""
        counts = self._counted(inputs)[1]
        mask = inputs.get("attention_mask")
        frames = counts.new_tensor(len(counts), dtype=torch.float32) if mask is None else (mask != 0).sum().float()
        return torch.stack([counts.sum().float(), frames.to(counts.device)])

    def _hidden(
        self, inputs: Mapping[str, Any], student: Pass, teachers: Sequence[Pass], counts: Tensor
    ) -> tuple[Any, list[Any], Tensor | None]:
        """The hidden states by layer of the student and of each teacher, and the states that count."""
        name = f"{self.distillation.states}_hidden_states" if self.student.encoder_decoder else "hidden_states"
        own, others = getattr(student.outputs, name), [getattr(teacher.outputs, name) for teacher in teachers]
        if self._at_tokens():
            return own, others, counts
        mask = inputs.get("attention_mask")
        if mask is None:
            return own, others, None
        stride, left = divmod(mask.shape[1], own[-1].shape[1])  # an encoder of speech merges frames
        if left or not stride:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} frames, but must have a multiple of the encoder's "
                f"{own[-1].shape[1]}"
            )
        return own, others, mask[:, ::stride] != 0


class _TrainAlignment(TrainerCallback):
    """What the Trainer does to the gradients of its model alone: zero, average over processes, clip."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in self._trainer._learned():
            parameter.grad = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [p for p in self._trainer._learned() if p.grad is not None]
        for parameter in trained:
            parameter.grad = self._trainer.accelerator.reduce(parameter.grad, reduction="mean")
        if args.max_grad_norm and trained:
            nn.utils.clip_grad_norm_(trained, args.max_grad_norm)


def _as_teachers(teachers: Any, student: nn.Module) -> list[LanguageModel]:
    listed = [teachers] if isinstance(teachers, nn.Module) and not isinstance(teachers, nn.ModuleList) else teachers
    if not isinstance(listed, (list, tuple, nn.ModuleList)):
        raise TypeError(f"teachers is {type(teachers).__name__}, but must be a model or a list of them")
    if not len(listed):
        raise ValueError("teachers is empty, but must have at least one teacher")
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    for k, teacher in enumerate(listed):
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teachers[{k}] is {type(teacher).__name__}, but must be a torch.nn.Module")
        if teacher is student:
            raise ValueError(f"teachers[{k}] is the student itself, but must be a model of its own: copy it")
        shared = next((name for name, p in teacher.named_parameters() if id(p) in trained), None)
        if shared is not None:  # such as the base model that get_peft_model put the student's adapters into
            raise ValueError(f"teachers[{k}] has {shared}, which the student trains: it must be a copy of its own")
    return [LanguageModel(f"teachers[{k}]", teacher) for k, teacher in enumerate(listed)]


def _as_inputs(teacher_inputs: Any, K: int) -> list[TeacherInputs | None]:
    listed = [teacher_inputs] * K if teacher_inputs is None or callable(teacher_inputs) else teacher_inputs
    if not isinstance(listed, (list, tuple)) or not all(x is None or callable(x) for x in listed):
        raise TypeError(
            f"teacher_inputs is {type(teacher_inputs).__name__}, but must be a function, a list of them or None"
        )
    if len(listed) != K:
        raise ValueError(f"teacher_inputs has {len(listed)} entries, but must have one for each of {K} teachers")
    return list(listed)


def _shifts(student: LanguageModel, shift_labels: bool | None) -> bool:
    """Whether the label of a state is the next token's."""
    if student.encoder_decoder:
        return bool(shift_labels)
    if shift_labels is not None:
        return shift_labels
    name = type(student.base).__name__
    masked = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    causal = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith("ForConditionalGeneration")
    if masked == causal:
        raise ValueError(
            f"model, a {name}, is not known as a causal or a masked language model: say by shift_labels whether the "
            "label of a state is the next token's"
        )
    return causal


def _check_arguments(trainer: Trainer) -> None:
    """Refuse what would be ignored, and where a head's weight is not whole."""
    args = trainer.args
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor is {args.label_smoothing_factor}, but must be 0")
    if args.n_gpu > 1:
        raise ValueError(f"args has {args.n_gpu} GPUs in one process, but must have one: use torchrun")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("args asks for DeepSpeed or FSDP, which share a head's weight out, but it must be whole")
