"""The profiles and the page of estimates say what the fit says."""

import pytest

from edgeprune.profiles import list_profiles, load_profile, profiles_folder
from tools.estimates import PAGE, WRITERS, figures_of, fill, fill_profile

PROFILES = [profile.name for profile in list_profiles() if profile.is_probed]


def test_the_tables_are_those_of_the_fit():
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in page for name in WRITERS)
    assert fill(page) == page


@pytest.mark.parametrize("name", PROFILES)
def test_figures_and_sources_of_a_profile_are_those_of_the_fit(name):
    profile, figures = load_profile(name), figures_of(name)
    own = {f"formats.{form}.{name}": figure for form, of in profile.formats.items() for name, figure in of if figure}
    assert {figure: own.get(figure) or getattr(profile, figure) for figure in figures} == figures
    assert own.keys() <= figures.keys()
    assert profile.decode_overhead is None  # the layers' overhead stands for it
    text = (profiles_folder() / f"{name}.toml").read_text(encoding="utf-8")
    assert fill_profile(text, figures) == text


def test_a_profile_without_the_figure_is_not_half_written():
    with pytest.raises(ValueError, match="stand in 0 places"):
        fill_profile("[memory]\nvalue = 8\n", figures_of("a10"))
