"""The origin of a model by its own files: cards, metadata, a hub id; and what strangers write there instead."""

import gguf
import pytest

from edgeprune.model.origin import Origin, origin_of

CARD = """---
license: other
license_name: Our Licence
license_link: https://example.org/licence
base_model:
- someone/large
language:
- en
- ja
---
# A model
"""


def test_a_checkpoint_tells_it_in_its_card(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    licence = {"license": "other", "license_name": "Our Licence", "license_link": "https://example.org/licence"}
    assert origin_of(str(tmp_path), tmp_path) == Origin("someone/large", licence, ("en", "ja"))
    known = origin_of("someone/tiny", tmp_path)  # of the hub: it is the base itself
    assert known == Origin("someone/tiny", licence, ("en", "ja"))


def test_a_gguf_file_tells_it_in_its_metadata(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/someone/base")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    assert origin_of(str(path), tmp_path / "cache") == Origin("someone/base", {"license": "apache-2.0"}, ("en",))


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# no fields",
        "---\nlicense: [\n---\n",
        "---\n- 1\n---\n",
        "---\nlicense: 3\nlanguage: {a: 1}\nbase_model: ../../etc\n---\n",
        "---\nbase_model: []\nlanguage: [3, 'x y']\n---\n",
    ],
)
def test_a_card_without_them_tells_nothing(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert origin_of(str(tmp_path), tmp_path) == Origin()


def test_a_folder_without_a_card_tells_nothing(tmp_path):
    assert origin_of(str(tmp_path), tmp_path) == Origin()
