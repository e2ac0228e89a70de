"""Configs and packed documents of the comparisons with transformers."""

from megamm.parity.case import Case


def model_config(model):
    """Return a run of one rank with these keys of the model section."""
    settings = {f"model.{key}": value for key, value in model.items()} | {"model.init_std": 0.02}
    return Case.of(1, settings).config


def documents(batch):
    """Yield every packed document of a batch: (row, slice)."""
    for row in range(len(batch.segment)):
        for segment in range(int(batch.segment[row].max()) + 1):
            places = (batch.segment[row] == segment).nonzero().flatten()
            yield row, slice(int(places[0]), int(places[-1]) + 1)
