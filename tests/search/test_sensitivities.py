import torch

from edgeprune.progress import Silent
from edgeprune.pruning.methods import METHODS
from edgeprune.search.sensitivity import sensitivities_of
from tests.tiny import as_model, llama


def test_what_is_kept_is_read_again_but_not_for_another_score(tmp_path, monkeypatch):
    """`default` may stand for another score in another version."""
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path))
    model = as_model(llama())
    ids = torch.randint(0, 101, (4, 16), generator=torch.Generator().manual_seed(0)).numpy()
    first = sensitivities_of(model, ids, "default", 0, Silent())
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    again = sensitivities_of(model, ids, "default", 0, Silent())
    assert again.mlp.tolist() == first.mlp.tolist()
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    monkeypatch.setitem(METHODS, "default", METHODS["magnitude+ls"])
    other = sensitivities_of(model, ids, "default", 0, Silent())
    assert len(list(tmp_path.rglob("*.npz"))) == 2
    assert other.mlp.tolist() != first.mlp.tolist()
