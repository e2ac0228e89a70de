"""The contract of every modality, including a user's own: a toy sixth one, registered by one line, is tested, too."""

from itertools import permutations

import numpy as np
import pytest
from media_samples import example, make_codecs
from toy_modality import SmellModality

from megamm.common.errors import UnreadableMedia
from megamm.common.sample import IGNORE_LABEL, Document, Part
from megamm.data.pipeline.packing import pack
from megamm.data.pipeline.run_data import load_modalities, packing_specs, vocabulary_of
from megamm.modalities import REGISTRY

NAMES = [*REGISTRY, SmellModality.name]


@pytest.fixture(scope="module")
def modalities(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "smell", SmellModality)
        yield load_modalities(make_codecs(tmp_path_factory.mktemp("codecs")))


@pytest.fixture(params=NAMES)
def modality(request, modalities):
    return modalities[request.param]


def test_media_become_ids_that_may_stand_where_they_stand_and_media_again(modality):
    media = [modality.read_media(*example(modality.name, n)) for n in range(4)]
    for ids in (all_ids := modality.encode(media)):
        assert ids.dtype == np.int64 and ids.ndim == 1 and ids.size > 0 and ids.size % modality.stride == 0
        assert modality.tokens_per_item in (None, ids.size)
        assert all(i in modality.valid_token_ids(place) for place, i in enumerate(ids.tolist()))
        assert ids.max() < modality.vocabulary_size
    for one, ids in zip(media, all_ids, strict=True):  # an id does not depend on the batch
        assert np.array_equal(modality.encode([one])[0], ids)
    again = modality.decode(all_ids[0])
    data = modality.write_media(again)
    modality.check_media(data, modality.extensions[0])
    assert modality.encode([]) == []
    reread = modality.encode([modality.read_media(data, modality.extensions[0])])[0]
    assert reread.size == all_ids[0].size


def test_equal_media_have_one_digest_and_others_another(modality):
    digests = [modality.check_media(*example(modality.name, n)) for n in (0, 1, 2, 0)]
    assert digests[0] == digests[3] and len(set(digests)) == 3 and len(digests[0]) == 64


def test_positions_start_at_zero_and_are_whole_numbers(modality):
    ids = modality.encode([modality.read_media(*example(modality.name, 2))])[0]
    positions = modality.positions(ids.size)
    assert positions.shape == (3, ids.size) and positions.dtype == np.int64 and positions.min() == 0


@pytest.mark.parametrize("data", [b"", b"\0\xff garbage" * 50])
def test_what_is_no_medium_is_refused(modality, data):
    for read in (modality.check_media, modality.read_media):
        with pytest.raises(UnreadableMedia):
            read(data, modality.extensions[0])


def test_every_ordered_pair_is_a_document_whose_losses_are_counted_to_its_modalities(modalities):
    vocabulary, packing = vocabulary_of(modalities), packing_specs(modalities, 512, ())
    parts = {name: Part(name, m.encode([m.read_media(*example(name, 1))])[0]) for name, m in modalities.items()}
    assert vocabulary.modalities == tuple(NAMES)
    for a, b in permutations(NAMES, 2):
        row = pack([Document("d", (parts[a], parts[b]))], vocabulary, 512, packing)
        media = [name for name in (a, b) if name != "text"]
        wanted = {name: parts[name].ids.size + (not packing[name].has_fixed_length) for name in media}  # its end mark
        wanted["text"] = len(media) + 1 + ("text" in (a, b)) * parts["text"].ids.size  # what follows, and the end
        counted = {n: int((row.modality == i).sum()) for i, n in enumerate(vocabulary.modalities)}
        assert {name: count for name, count in counted.items() if count} == wanted
        used = row.segment >= 0
        assert (row.labels[:-1][used[1:]] == row.input_ids[1:][used[1:]]).all()
        assert (row.labels != IGNORE_LABEL).sum() == used.sum() - 1


def test_image_and_video_share_their_ids(modalities):
    vocabulary = vocabulary_of(modalities)
    assert vocabulary["image"] is vocabulary["video"] and vocabulary["image"].name == "visual"
    marks = {vocabulary.begin(name) for name in NAMES[1:]} | {vocabulary.end(name) for name in NAMES[1:]}
    assert len(marks) == 2 * len(NAMES[1:]) and vocabulary.begin("image") + 2 == vocabulary.begin("audio")
