"""Which judges a data set has, and which the user may name."""

import pytest
import torch

from pixlat.common.config.schema import DataConfig
from pixlat.common.datasets.load import load_data
from pixlat.common.datasets.summary import DataSummary
from pixlat.common.errors import UserError
from pixlat.common.plugins import Plugin
from pixlat.evaluation.features.extractor import Features
from pixlat.evaluation.judges import panel
from pixlat.evaluation.judges.shipped import JUDGES

EMOJI = load_data(DataConfig()).info
FOLDER = DataSummary("folder", 3, 64, 100, 40, ("a", "b", "c"), "digest")


class Blank:
    """A plug-in's extractor."""

    id, sha256, layer, resize, scaling, dims, num_classes = "blank", "1" * 64, "none", "none", "none", 2, 2
    comparable_with_inception_fid, resize_digest = False, None

    def __init__(self, device):
        self.device = device

    def __call__(self, images):
        return Features(torch.zeros(len(images), 2), torch.zeros(len(images), 2))


@pytest.fixture
def plug_in(monkeypatch):
    found = {"blank": Plugin("blank", f"{__name__}:Blank", "a-package")}
    monkeypatch.setattr(panel, "plugins_of", lambda *_: found)


def test_emoji_have_judges_that_rank_and_one_that_does_not():
    judges = panel.panel(EMOJI, [], "cpu")
    assert [(judge.id, judge.ranks) for judge in judges] == [*((name, True) for name in JUDGES), ("embedded-v1", False)]
    assert len(JUDGES) >= 3 and all(judge.labels_of == "emoji32" for judge in judges[:-1])
    features = judges[0].extractor(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert features.pooled.shape == (2, judges[0].extractor.dims) and features.logits.shape == (2, 10)


def test_other_data_have_efficientnet_which_then_ranks():
    (judge,) = panel.panel(FOLDER, [], "cpu")
    assert (judge.id, judge.ranks, judge.labels_of) == ("embedded-v1", True, None)


def test_judges_that_the_user_names_all_rank(plug_in):
    judges = panel.panel(FOLDER, ["blank", "embedded"], "cpu")
    assert [(judge.id, judge.ranks) for judge in judges] == [("blank", True), ("embedded-v1", True)]
    assert judges[0].extractor.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["embeded"], "embedded"),
        (["embedded", "embedded"], "names embedded twice"),
        ([next(iter(JUDGES))], "emoji of 32 pixels, but folder has images of 64 pixels"),
    ],
)
def test_names_that_do_not_fit_are_refused_before_anything_is_loaded(names, message):
    with pytest.raises(UserError, match=message):
        panel.check_judges(names, FOLDER)


def test_a_run_with_an_unknown_judge_is_refused_before_it_begins(tmp_path, capsys):
    from pixlat.launch.run import main

    assert main(["method=jit", "eval.judges=[nobody]", f"out={tmp_path}"]) == 2
    assert "eval.judges='nobody'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
