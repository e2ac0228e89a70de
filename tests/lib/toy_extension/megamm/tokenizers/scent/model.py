"""The model of the toy tokenizer: learns a table letter -> code and a table code -> letter."""

from typing import Literal

import torch
from torch import Tensor, nn

from megamm.tokenizers.io import CodecConfig

KIND = "scent-table"
LETTERS = "abcdefgh"


class ScentCodecConfig(CodecConfig):
    """Its size: the number of codes."""

    kind: Literal["scent-table"] = KIND
    codes: int = 16


class ScentCodec(nn.Module):
    """Two tables, trained so that every letter comes back."""

    Config = ScentCodecConfig

    def __init__(self, config: ScentCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Embedding(len(LETTERS), config.codes)
        self.decoder = nn.Embedding(config.codes, len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        """The training loss of letters `[N]`: the cross entropy of their reconstructions."""
        expected = self.encoder(letters).softmax(-1) @ self.decoder.weight
        return nn.functional.cross_entropy(expected, letters)

    @torch.inference_mode()
    def encode(self, letters: Tensor) -> Tensor:
        return self.encoder(letters).argmax(-1)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        return self.decoder(ids).argmax(-1)
