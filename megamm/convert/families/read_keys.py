"""The keys of config.json that transformers reads for a model type, found in transformers' own source text.

A configuration class declares fields, but model code also reads undeclared keys (`getattr(config, "head_dim", None)`,
`getattr(config, "is_causal", True)`). A key that none of these files reads cannot change what the model computes.
"""

import inspect
import re
from functools import cache
from pathlib import Path

_MODELS = ("modeling_utils", "masking_utils", "modeling_rope_utils")
"""Files with code that every model uses, without .py."""
_CONFIG = r"\b\w*config"
_READ = re.compile(
    rf"{_CONFIG}\.(\w+)(?!\()\b"  # config.key, but not config.method()
    rf"|attr\([\w.]*{_CONFIG},\s*[\"'](\w+)[\"']"  # getattr(config, "key", ...)
)
_READ_BY_CLASS = re.compile(r"\bself\.(\w+)(?!\()\b|attr\(self,\s*[\"'](\w+)[\"']")


@cache
def read_keys(model_type: str) -> frozenset[str]:
    """Keys that the model type's class and model code read."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    kind = CONFIG_MAPPING[model_type]
    classes = [Path(inspect.getfile(kind)), Path(inspect.getfile(PreTrainedConfig))]
    models = [classes[0].with_name(classes[0].name.replace("configuration_", "modeling_"))]
    models += [classes[1].with_name(f"{name}.py") for name in _MODELS]
    texts = [(_READ, file.read_text()) for file in classes + models]
    # The classes of configurations inherit code for RoPE.
    texts += [(_READ_BY_CLASS, file.read_text()) for file in (*classes, models[-1])]
    found = {key for pattern, text in texts for match in pattern.findall(text) for key in match if key}
    declared = {*kind().to_dict(), *PreTrainedConfig().to_dict(), *kind.attribute_map}
    return frozenset(found | declared)
