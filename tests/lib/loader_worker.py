"""A data rank that does not train: it takes rows from the loader and logs them, step by step.

`python loader_worker.py SPEC.json RANK`: appends one line per step to the rank's log, synced before the next step as a
checkpoint would be: consumed_rows after it, the mixture schedule, and which samples were in this rank's rows
(each has a text of two tokens that name it).
"""

import json
import os
import sys
from pathlib import Path

from megamm.data.pipeline.loader import Loader, Reading
from megamm.data.pipeline.packing import PackingSpec
from megamm.data.pipeline.run_data import OpenSource, StreamOptions, begin_stream, resume_stream, schedule_to_json
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.modalities.protocol import sequential_positions
from megamm.model.vocabulary import Vocabulary

CODECS = {"text": "t", "image": "i"}
VOCABULARY = Vocabulary.of({"text": (4096, "t"), "image": (4096, "i")})
PACKING = {"text": PackingSpec(sequential_positions, False), "image": PackingSpec(sequential_positions, True)}
ROW, GLOBAL_BATCH = 128, 12


def cost(lengths):
    return ROW + sum(n * n for n in lengths) / 16


def open_stream(folder, weights, recorded, consumed):
    """Return the stream of {source name: weight} after `consumed` rows."""
    sources = [OpenSource(folder / n, w, TokenDataset(folder / n / "train", CODECS)) for n, w in weights.items()]
    options = StreamOptions(5, ROW, VOCABULARY, PACKING)
    if recorded is None:
        return begin_stream(sources, options), None
    return resume_stream(
        sources, options, recorded, consumed, lambda s: TokenDataset(s.path / "train", CODECS, s.documents)
    )


def texts(batches):
    """Return the names of the samples in these batches: the two tokens of their texts."""
    found = []
    for batch in batches:
        for ids, segment in zip(batch.input_ids, batch.segment, strict=True):
            for number in range(int(segment.max()) + 1):
                mine = ids[segment == number]
                mine = mine[mine < VOCABULARY["text"].stop]
                assert len(mine) == 2, "every sample has one text of two tokens"
                found.append(mine.tolist())
    return found


def main():
    spec, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    folder = Path(spec["folder"])
    stream, _ = open_stream(folder, spec["weights"], spec["recorded"], spec["consumed_rows"])
    loader = Loader(
        stream,
        global_batch=GLOBAL_BATCH,
        micro_batch=spec["micro_batch_size"],
        data_rank=rank,
        data_size=spec["world_size"],
        cost=cost,
        consumed_rows=spec["consumed_rows"],
        reading=Reading(spec["workers"], spec["prefetch"]),
    )
    with (folder / f"{spec['name']}.rank{rank}.jsonl").open("a") as log:
        for _ in range(spec["steps"]):
            read = texts(loader.step())
            state = schedule_to_json(stream, loader.consumed_rows, spec["recorded"])
            line = {"consumed_rows": loader.consumed_rows, "texts": read, "mixture": state}
            log.write(json.dumps(line) + "\n")
            log.flush()
            os.fsync(log.fileno())
    loader.close()


if __name__ == "__main__":
    main()
