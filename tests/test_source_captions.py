"""Captions of the public sources, read from unpacked packages."""

from megamm.data.sources.drawings import clipart_caption, write_clipart
from megamm.data.sources.emoji import emoji_caption

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20">{}</svg>'


def test_captions_of_the_public_sources():
    assert (
        emoji_caption(":woman_juggling_medium-dark_skin_tone:", is_flag=False)
        == "woman juggling: medium-dark skin tone"
    )
    assert emoji_caption(":person_dark_skin_tone_white_hair:", is_flag=False) == "person: dark skin tone, white hair"
    assert emoji_caption(":Samoa:", is_flag=True) == "flag of samoa"
    for name, title, author, caption in [
        ("food/butter_01", "Butter 1", "", "butter"),
        ("recreation/games/cards/white/white_d_j", "", "", "jack of diamonds playing card"),
        ("signs_and_symbols/flags/oceania/samoa", "Samoa", "", "flag of samoa"),
        ("signs_and_symbols/flags/flag_of_brazil", "flag of Brazil", "", "flag of brazil"),
        ("computer/icons/theme/folder_tar", "", "Jose Hevia", "folder tar icon"),
        ("people/clouds_jon_phil_10", "", "Jon Phillips", "clouds"),
        ("computer/icons/70a027", "", "", ""),
    ]:
        assert clipart_caption(name, title, author) == caption


def test_clipart_is_read_from_the_unpacked_package(tmp_path):
    folder = tmp_path / "package/usr/share/openclipart/svg/food"
    folder.mkdir(parents=True)
    rdf = '<metadata><d xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>Red Apple 2</dc:title></d></metadata>'
    (folder / "apple.svg").write_text(SVG.format(rdf))
    (folder / "broken.svg").write_text("<svg")
    (folder / "same.svg").symlink_to("apple.svg")
    (tmp_path / "raw").mkdir()
    samples = write_clipart(tmp_path / "package", tmp_path / "raw")
    assert [(s.parts[1].content, s.noun) for s in samples] == [("red apple", "apple"), ("broken", "broken")]
    files = [tmp_path / "raw" / s.parts[0].content for s in samples]
    assert all(file.is_file() and file.suffix == ".svg" for file in files)
    assert len({s.key for s in samples}) == 2
