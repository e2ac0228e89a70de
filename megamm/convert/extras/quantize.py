"""`megamm convert quantize EXPORT OUT --to int8|int4|fp8`: weight-only quantisation in the compressed-tensors format.

It quantises the matrices of the layers `[out, in]`, experts one by one; embedding, head, norms, biases and routers
stay unchanged. A weight w becomes q = round(w / s), read back as q * s, symmetric and without calibration data:
    int8  s by row, max |w| / 127.5, q in [-128, 127]
    int4  s by row and group of GROUPS inputs, max |w| / 7.5, q in [-8, 7], eight of them in an int32
    fp8   s by row, max |w| / 448, q in float8 e4m3 (Micikevicius et al. 2022, "FP8 formats for deep learning")
transformers reads the folder through the package compressed-tensors. The output is read back and compared: no weight
may be off by more than half a step. It works tensor by tensor, on safetensors only.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch

from megamm.common.errors import UserError
from megamm.convert.extras import card
from megamm.convert.io.export_folder import copy_without_weights, read_metadata
from megamm.convert.io.safetensors_files import Weights, rewrite
from megamm.tokenizers.io import new_folder, weight_files

log = logging.getLogger(__name__)
Target = Literal["int8", "int4", "fp8"]
GROUPS = (128, 64, 32)
"""Inputs that share a scale in int4: the first value that divides the inputs of every matrix."""
_FORMATS = {"int8": "pack-quantized", "int4": "pack-quantized", "fp8": "naive-quantized"}
_KEPT = ("embed_tokens", "lm_head", ".gate.", ".router.")


def quantize(export: Path, out: Path, to: Target) -> Path:
    """Write the quantised export `out`. Raises UserError for a bad export, an unsuitable model, or if `out` exists."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        remedy = "install it: pip install 'megamm[quantize]'"
        raise UserError("the package compressed-tensors is missing", remedy=remedy) from None
    metadata = read_metadata(export)[2]
    theirs = json.loads((export / "config.json").read_text())
    if "quantization_config" in theirs:
        raise UserError("the export is already quantised", where=export, remedy="give the export it was made from")
    infos = Weights(export).infos
    matrices = {n: info.shape for n, info in infos.items() if n.endswith(".weight") and len(info.shape) == 2}
    kept = [name for name in matrices if any(part in name for part in _KEPT)]
    scheme = _Scheme(to, {name: shape for name, shape in matrices.items() if name not in kept}, export)
    with new_folder(out) as folder:
        copy_without_weights(export, folder)
        rewrite(export, folder, scheme.change)
        theirs["quantization_config"] = scheme.config(["lm_head", *(name.removesuffix(".weight") for name in kept)])
        (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
        card.write_card(folder, metadata)
    before, after = (sum(file.stat().st_size for file in weight_files(at)) for at in (export, out))
    log.info("%s: %d matrices, weights %.1f -> %.1f MiB", to, scheme.matrices, before / 2**20, after / 2**20)
    return out


class _Scheme:
    """A quantisation scheme. The library does the arithmetic; this class only sets which numbers share a scale."""

    def __init__(self, to: Target, matrices: dict[str, tuple[int, ...]], where: Path) -> None:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        self.to, self.names, self.where, self.matrices = to, matrices.keys(), where, len(matrices)
        values: dict[str, Any] = {"num_bits": 4 if to == "int4" else 8, "symmetric": True}
        values |= {"type": "float" if to == "fp8" else "int", "strategy": "channel"}
        if to == "int4":
            group = next((g for g in GROUPS if all(inputs % g == 0 for _, inputs in matrices.values())), None)
            if group is None:
                name, shape = next((n, s) for n, s in matrices.items() if s[1] % GROUPS[-1])
                what = f"{name} has {shape[1]} inputs, which is not a multiple of {GROUPS[-1]}"
                raise UserError(what, where=where, remedy="use --to int8 or fp8")
            log.info("int4: one scale per %d inputs", group)
            values |= {"strategy": "group", "group_size": group}
        self.arguments = QuantizationArgs(**values)
        self.scheme = QuantizationScheme(targets=["Linear"], weights=self.arguments, format=_FORMATS[to])
        self.compressor = BaseCompressor.get_value_from_registry(_FORMATS[to])

    def change(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors written in place of one tensor. Raises UserError if it is not finite."""
        if name not in self.names:
            return {name: tensor}
        if not tensor.isfinite().all():
            what, remedy = f"{name} contains NaN or Inf", "export an older checkpoint, without NaN and Inf"
            raise UserError(what, where=self.where, remedy=remedy)
        scale = self._scale(tensor)
        made = self.compressor.compress({"weight": tensor, "weight_scale": scale}, self.scheme)
        self._check(name, tensor, scale, made)
        return {f"{name.removesuffix('weight')}{key}": value.contiguous() for key, value in made.items()}

    def _scale(self, tensor: torch.Tensor) -> torch.Tensor:
        """The scales `[out, groups]`, in the weights' dtype."""
        from compressed_tensors.quantization.utils import calculate_qparams

        # [out, groups, inputs of a group]; with one scale per output, a row is one group.
        groups = tensor.unflatten(1, (-1, self.arguments.group_size or tensor.shape[1]))
        scale: torch.Tensor = calculate_qparams(groups.amin(-1), groups.amax(-1), self.arguments)[0]
        return scale

    def _check(self, name: str, tensor: torch.Tensor, scale: torch.Tensor, made: dict[str, torch.Tensor]) -> None:
        """Read the result back and check that no weight is off by more than half a step."""
        back = self.compressor.decompress(made, self.scheme)["weight"].float()
        error = (back - tensor.float()).abs()
        bound = half_step(tensor.float(), scale.float(), self.to) + tensor.float().abs() * torch.finfo(tensor.dtype).eps
        assert (error <= bound).all(), f"{name}: {error.max():.1e} off"

    def config(self, kept: list[str]) -> dict[str, Any]:
        """The quantization_config of config.json; kept: modules that are not quantised."""
        from compressed_tensors import __version__
        from compressed_tensors.quantization import QuantizationConfig

        groups = {"group_0": self.scheme}
        ignored = sorted(set(kept))
        config = QuantizationConfig(
            config_groups=groups, format=_FORMATS[self.to], ignore=ignored, quantization_status="compressed"
        )
        return {"version": __version__, **config.model_dump(mode="json")}


def half_step(weight: torch.Tensor, scale: torch.Tensor, to: Target) -> torch.Tensor:
    """Half the distance between neighbouring values around each weight: `[out, in]`, for scales `[out, groups]`."""
    step = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    if to == "fp8":  # e4m3 has 3 bits after the point, and below 2^-6 steps of 2^-9
        exponent = torch.frexp(weight.abs() / step).exponent - 1
        step = step * torch.exp2(exponent.clamp(min=-6).float() - 3)
    return step / 2
