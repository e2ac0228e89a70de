"""llama.cpp itself (xllamacpp) on a GGUF file: its token ids, and how far its predictions are from transformers'."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (3, 40)))


def llama_cpp(file: Path) -> Any:
    """Run llama.cpp on the CPU, in float32 throughout."""
    import xllamacpp as xl

    options = xl.CommonParams()
    options.model.path, options.verbosity = str(file), -1
    options.n_ctx, options.n_parallel, options.n_gpu_layers = 64, 1, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = xl.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.warmup = options.fit_params = False
    return xl.Server(options)


def token_ids(server: Any, text: str) -> list[int]:
    """llama.cpp's ids of a text, with the tokens that it adds itself."""
    return post(server, "tokenize", {"content": text, "parse_special": True, "add_special": True})["tokens"]


def post(server: Any, path: str, content: dict[str, Any]) -> dict[str, Any]:
    """The answer of llama.cpp's server to a request."""
    body = json.dumps(content).encode()
    request = urllib.request.Request(f"{server.listening_address}/{path}", body, {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=30).read())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def largest_error(export: Path, file: Path, rows: int = len(IDS), lengths: tuple[int, ...] = (1, 17, 40)) -> float:
    """The largest difference of llama.cpp's log-probabilities from transformers', relative to the largest logit."""
    model: Any = AutoModelForCausalLM.from_pretrained(export)
    raw = logits(model).double()
    expected, scale = torch.log_softmax(raw, -1), raw.abs().max()
    server, size, errors = llama_cpp(file), model.config.vocab_size, []
    for row in range(rows):
        for length in lengths:
            asked = {"prompt": IDS[row, :length].tolist(), "n_predict": 1, "n_probs": size, "cache_prompt": False}
            asked |= {"logit_bias": [[64, 1000.0]]}  # generates "a": it gives no probabilities for part of a character
            answer = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            got = torch.full((size,), torch.nan, dtype=torch.float64)
            for entry in answer:
                got[entry["id"]] = entry["logprob"]
            errors.append(float((got - expected[row, length - 1]).abs().max() / scale))  # NaN if an id is missing
    return float(np.max(errors))
