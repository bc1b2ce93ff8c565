"""DistillationTrainer against plain PyTorch on the models' own logits."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from distilling import ALIGNED, adapted, agree, gradients, trainer_in  # noqa: E402
from language_models import BERT, GEMMA, LLAMA, MODELS, WHISPER, V, batch, build, logits_of, plain_loss  # noqa: E402

import kdkernels as kd  # noqa: E402
from kdkernels.integrations.language_model import LanguageModel  # noqa: E402
from kdkernels.integrations.transformers import Distillation, DistillationTrainer  # noqa: E402

IGNORED = "kdkernels runs on plain PyTorch:RuntimeWarning", ":FutureWarning", ":UserWarning"
pytestmark = [pytest.mark.filterwarnings(f"ignore:{warning}") for warning in IGNORED]


@pytest.fixture
def heads(monkeypatch):
    """How many points each head was called with, by any model of the test."""
    seen = []
    for kind in (nn.Linear, kd.nn.LoRALinear):
        real = kind.forward

        def forward(self, x, real=real):
            y = real(self, x)
            if y.shape[-1] == V:
                seen.append(y.numel() // y.shape[-1])
            return y

        monkeypatch.setattr(kind, "forward", forward)
    return seen


@pytest.fixture
def trainer(tmp_path):
    return trainer_in(tmp_path)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=pytest.mark.native)])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_logits(name, backend, trainer, heads):
    student, teacher, inputs = build(name), build(name, 40, seed=1), batch(name)
    made = trainer(student, teacher, temperature=2, alpha=0.6, backend=backend)
    loss = made.compute_loss(student, inputs)
    assert heads.count(len(inputs["labels"])) == len(heads) == 2  # once a model: one point of each row
    heads.clear()
    again = made.compute_loss(student, inputs)
    assert set(heads) == {0}  # no logits
    ours = gradients(student, again)
    expected = plain_loss(student, [teacher], inputs, "Causal" in name, T=2, alpha=0.6)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
    agree(ours, gradients(student, expected))
    assert all(p.grad is None for p in teacher.parameters())


def test_nothing_of_the_size_of_the_logits_is_made(trainer):
    """In the models: every module's output is smaller."""
    student, teacher, inputs = build(LLAMA), build(LLAMA, 40, seed=1), batch(LLAMA)
    made, sizes = trainer(student, teacher), []
    made.compute_loss(student, inputs)
    hooks = [
        module.register_forward_hook(lambda m, i, y: sizes.append(y.numel()) if isinstance(y, torch.Tensor) else None)
        for model in (student, teacher)
        for name, module in model.named_modules()
        if name != "lm_head"
    ]
    loss, outputs = made.compute_loss(student, inputs, return_outputs=True)
    assert outputs.logits.shape == (4, 0, V) and loss.isfinite()
    assert sizes and max(sizes) < 4 * 9 * V
    for hook in hooks:
        hook.remove()


def test_the_models_are_left_as_they_were(trainer):
    student, teacher, inputs = build(LLAMA), build(LLAMA, 40, seed=1), batch(LLAMA)
    expected, attributes = logits_of(student, inputs), dict(vars(student.lm_head))
    made = trainer(student, teacher)
    made.compute_loss(student, inputs)
    assert vars(student.lm_head) == attributes and logits_of(student, inputs).equal(expected)
    broken = {"input_ids": torch.full((1, 3), 10 * V), "labels": torch.zeros(1, 3, dtype=torch.long)}
    with pytest.raises(IndexError):
        made.compute_loss(student, broken)
    assert vars(student.lm_head) == attributes and logits_of(student, inputs).equal(expected)
    assert student.generate(inputs["input_ids"][:1], max_new_tokens=2, do_sample=False).shape == (1, 11)


@pytest.mark.parametrize("name", [LLAMA, WHISPER, BERT])
def test_padding_reaches_neither_loss_nor_gradient(name, trainer):
    student, teacher, inputs = build(name), build(name, 40, seed=1), batch(name)
    wider = {key: x if x.is_floating_point() else nn.functional.pad(x, (0, 3)) for key, x in inputs.items()}
    wider["labels"][:, -3:] = -100
    if "input_ids" in wider:
        wider["input_ids"][wider["attention_mask"] == 0] = 7
        if name == LLAMA:  # the mask alone says it, too
            wider["labels"][wider["attention_mask"] == 0] = 5
    found = []
    for given in (inputs, wider):
        made = trainer(student, teacher, alpha=0.5, **ALIGNED)
        loss = made.compute_loss(student, given)
        found.append((loss.detach(), gradients(student, loss)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    agree(found[0][1], found[1][1])


def test_a_state_of_padding_does_not_count_for_the_token_after_it(trainer):
    """Rows that are padded on the left: their first token is predicted from padding."""
    student, teacher, inputs = build(LLAMA), build(LLAMA, 40, seed=1), batch(LLAMA)
    flipped = {name: x.flip(1) for name, x in inputs.items()}
    assert (flipped["attention_mask"][1:, 0] == 0).all()
    other = flipped | {"input_ids": flipped["input_ids"].masked_fill(flipped["attention_mask"] == 0, 7)}
    found = []
    for given in (flipped, other):
        loss = trainer(student, teacher, alpha=0.5, **ALIGNED).compute_loss(student, given)
        found.append((loss.detach(), gradients(student, loss)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    agree(found[0][1], found[1][1])


def test_without_labels_the_mask_alone_counts(trainer):
    student, teacher, inputs = build(LLAMA), build(LLAMA, 40, seed=1), batch(LLAMA)
    made = trainer(student, teacher)
    unlabelled = {name: x for name, x in inputs.items() if name != "labels"}
    torch.testing.assert_close(made.compute_loss(student, unlabelled), made.compute_loss(student, inputs))
    with pytest.raises(ValueError, match="labels"):
        trainer(student, teacher, alpha=0.5).compute_loss(student, unlabelled)
    with pytest.raises(ValueError, match="inputs has none of labels"):
        made.compute_loss(student, {})


@pytest.mark.parametrize("states", ["encoder", "decoder"])
def test_a_number_of_tokens_scales_all_of_the_loss(states, trainer):
    student, inputs = build(WHISPER), batch(WHISPER)
    made = trainer(student, build(WHISPER, 40, seed=1), states=states, **ALIGNED)
    count = (inputs["labels"] != -100).sum()
    half = made.compute_loss(student, inputs, num_items_in_batch=2 * count)
    torch.testing.assert_close(half, made.compute_loss(student, inputs) / 2)


def test_an_ensemble_of_teachers_of_different_widths_and_vocabularies(trainer):
    student, teachers = build(LLAMA), [build(LLAMA, 40, seed=1), build(LLAMA, 48, seed=2, vocab_size=V - 8)]
    inputs = batch(LLAMA, vocabulary=V - 8)
    made = trainer(student, teachers, teacher_weights=(0.3, 0.7), vocab_map="truncate", alpha=0.7)
    loss = made.compute_loss(student, inputs)
    ours = gradients(student, loss)
    expected = plain_loss(student, teachers, inputs, True, alpha=0.7, weights=(0.3, 0.7), common=V - 8)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    agree(ours, gradients(student, expected))
    unmapped = trainer(student, teachers)
    with pytest.raises(ValueError, match="vocabulary of 53, but the student has 61"):
        unmapped.compute_loss(student, inputs)


def test_a_teacher_with_inputs_of_its_own(trainer):
    student, teachers, inputs = build(LLAMA), [build(LLAMA, 40, seed=k) for k in (1, 2)], batch(LLAMA)

    def reversed_ids(given):
        return given | {"input_ids": given["input_ids"].flip(1), "attention_mask": given["attention_mask"].flip(1)}

    made = trainer(student, teachers, teacher_inputs=[None, reversed_ids])
    found = made.compute_loss(student, inputs)
    with torch.no_grad():
        y = [logits_of(teachers[0], inputs), logits_of(teachers[1], reversed_ids(inputs))]
    counts = inputs["labels"][:, 1:] != -100
    p = sum(t[:, :-1][counts].softmax(-1) for t in y) / 2
    q = logits_of(student, inputs)[:, :-1][counts].log_softmax(-1)
    torch.testing.assert_close(found, nn.functional.kl_div(q, p, reduction="batchmean"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [LLAMA, BERT])
def test_tied_embeddings(name, trainer):
    student, teacher, inputs = build(name, tie_word_embeddings=True), build(name, 40, seed=1), batch(name)
    student.tie_weights()
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    loss = trainer(student, teacher).compute_loss(student, inputs)
    ours = gradients(student, loss)
    agree(ours, gradients(student, plain_loss(student, [teacher], inputs, name == LLAMA)))


def test_pefts_adapter_on_the_head_is_honoured(trainer):
    student, teacher, inputs = adapted(), build(LLAMA, 40, seed=1), batch(LLAMA)
    loss = trainer(student, teacher, alpha=0.5).compute_loss(student, inputs)
    ours = gradients(student, loss)
    assert sum("lm_head.lora_" in name for name in ours) == 2
    expected = plain_loss(student, [teacher], inputs, True, alpha=0.5)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    agree(ours, gradients(student, expected))
    with pytest.raises(ValueError, match=r"model has a head that cannot be fused: .*DoraLinearVariant"):
        trainer(adapted(use_dora=True), teacher)


@pytest.mark.parametrize("states", ["encoder", "decoder"])
def test_alignment_is_the_modules(states, trainer):
    """Of Whisper, whose teacher's encoder has half the frames."""
    student, teacher = build(WHISPER), build(WHISPER, 40, seed=1, max_source_positions=6)
    inputs = batch(WHISPER)

    def short(given):
        return given | {"input_features": given["input_features"][..., ::2]}

    made = trainer(student, teacher, teacher_inputs=short, soft_weight=0, states=states, resample=True, **ALIGNED)
    loss = made.compute_loss(student, inputs)
    ours = gradients(student, loss) | gradients(made.alignment, made.compute_loss(student, inputs))
    own = student(**inputs, output_hidden_states=True)
    with torch.no_grad():
        other = teacher(**short(inputs), output_hidden_states=True)
    mask = None if states == "encoder" else inputs["labels"] != -100
    hidden = [getattr(outputs, f"{states}_hidden_states") for outputs in (own, other)]
    expected = 0.5 * made.alignment.teachers[0](*hidden, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    both = nn.ModuleList([student, made.alignment])
    theirs = {name.split(".", 1)[1]: x for name, x in gradients(both, expected).items()}
    agree({name: x for name, x in ours.items() if name in theirs}, theirs)


def test_a_model_that_does_more_to_its_logits_is_refused(trainer):
    student, teacher = build(GEMMA), build(GEMMA, 40, seed=1)
    made = trainer(student, teacher)
    student.config.final_logit_softcapping = 1.5  # the loss reads it, and so does the model
    made.compute_loss(student, batch(GEMMA))

    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits + 0.5
            return outputs

    shifted = Shifted(build(LLAMA).config)
    with pytest.raises(ValueError, match="model, a Shifted, does something to its logits"):
        trainer(shifted, build(LLAMA), shift_labels=True).compute_loss(shifted, batch(LLAMA))

    class Silent(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return self.model(*args, **{k: x for k, x in kwargs.items() if k != "labels"})

    silent = Silent(build(LLAMA).config)
    with pytest.raises(ValueError, match="model calls its head 0 times"):
        trainer(silent, build(LLAMA), shift_labels=True).compute_loss(silent, batch(LLAMA))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=0), "temperature is 0"),
        (dict(soft_weight=-1), "soft_weight is -1"),
        (dict(soft_weight=float("inf")), "soft_weight is inf"),
        (dict(alignment_weight="1"), "alignment_weight is str"),
        (dict(soft_weight=0), "soft_weight and alignment_weight are 0"),
        (dict(alignment_weight=1, pairs=[(0, 0)]), "embedding_width is None"),
        (dict(alignment_weight=1, embedding_width=8), "pairs is empty"),
        (dict(pairs=[(0, 0)]), "alignment_weight is 0"),
        (ALIGNED | dict(metric="l1"), "metric is 'l1'"),
        (dict(states="middle"), "states is 'middle'"),
        (dict(shift_labels=1), "shift_labels is 1"),
        (dict(resample=None), "resample is None"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Distillation(**options)


def test_a_teacher_that_the_student_trains_is_refused(trainer):
    """get_peft_model puts the adapters into the base itself, which would then be its own teacher, at a loss of 0."""
    peft = pytest.importorskip("peft")
    base = build(LLAMA)
    student = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    with pytest.raises(ValueError, match=r"teachers\[0\] has .*lora_A.*, which the student trains"):
        trainer(student, base)


def test_arguments_are_checked(trainer):
    student, teacher = build(LLAMA), build(LLAMA, 40, seed=1)
    headless = transformers.LlamaModel(student.config)
    for arguments, kind, message in (
        (("student", teacher), TypeError, "model is str"),
        ((student, "teacher"), TypeError, "teachers is str"),
        ((student, []), ValueError, "teachers is empty"),
        ((student, [teacher, 3]), TypeError, r"teachers\[1\] is int"),
        ((student, student), ValueError, r"teachers\[0\] is the student itself"),
        ((student, nn.Linear(2, 2)), TypeError, r"teachers\[0\] is Linear"),
        ((student, headless), ValueError, r"teachers\[0\], a LlamaModel, has no output embeddings"),
    ):
        with pytest.raises(kind, match=message):
            trainer(*arguments)
    for options, kind, message in (
        (dict(teacher_weights=[0.5, 0.5]), ValueError, "teacher_weights has 2 entries"),
        (dict(vocab_map=[None, None]), ValueError, "vocab_map has 2 entries"),
        (dict(teacher_inputs=3), TypeError, "teacher_inputs is int"),
        (dict(teacher_inputs=[None, None]), ValueError, "teacher_inputs has 2 entries"),
        (dict(training=dict(label_smoothing_factor=0.1)), ValueError, "label_smoothing_factor is 0.1"),
    ):
        with pytest.raises(kind, match=message):
            trainer(student, teacher, **options)
    with pytest.raises(TypeError, match="distillation is dict"):
        DistillationTrainer(student, teachers=teacher, distillation={})
    with pytest.raises(ValueError, match="compute_loss_func was given"):
        DistillationTrainer(student, teachers=teacher, compute_loss_func=print)
    unknown = type("Unknown", (transformers.LlamaForCausalLM,), {})(student.config)
    with pytest.raises(ValueError, match="say by shift_labels"):
        trainer(unknown, teacher)
    made = trainer(student, teacher)
    with pytest.raises(ValueError, match="inputs has shift_labels"):
        made.compute_loss(student, batch(LLAMA) | {"shift_labels": torch.zeros(1)})
    wrong = batch(LLAMA) | {"attention_mask": torch.ones(4, 1, 9, 9)}
    with pytest.raises(ValueError, match=r"attention_mask has shape \(4, 1, 9, 9\)"):
        made.compute_loss(student, wrong)


def test_the_order_of_a_seq2seq_models_start_token_is_its_own():
    model = LanguageModel("model", build(WHISPER))
    labels = torch.tensor([[5, 6, -100]])
    assert model.decoded({"labels": labels}, {})["decoder_input_ids"].tolist() == [[1, 5, 6]]
    assert model.decoded({"labels": labels}, {"decoder_input_ids": labels}) == {"decoder_input_ids": labels}


def test_transformers_is_imported_only_here(python, environment):
    program = "import sys, kdkernels; assert 'transformers' not in sys.modules"
    program += "; sys.modules['transformers'] = None; import kdkernels.integrations.transformers"
    done = python(environment, "-c", program)
    assert "pip install kdkernels[transformers]" in done.stderr
