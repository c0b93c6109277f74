"""The claims framework: verdicts follow from intervals, records validate and reach the leaderboard as data, and the claims measure what they say."""

import json
import math

import pytest
import torch
from matplotlib.figure import Figure

from common.errors import UserError
from evaluation import leaderboard
from evaluation.claims import command, cost, jit_manifold, pmf_manifold, rae_width
from evaluation.claims.framework import Budget, Claim, Criterion, Estimate, Evidence, Verdict, all_claims, find, judge
from evaluation.claims.record import build, read_claim, read_claims, write_claim
from evaluation.claims.swiss_roll import lifted, off_plane, plane, roll, sliced_distance

HOSTILE = "</script><script>alert(1)</script>"
PAIR = (Criterion("a", "a number", "at most", 1.0), Criterion("b", "another one", "at least", 10.0))


def evidence(a, b, text="cell"):
    figure = Figure()
    figure.subplots().plot([0, 1])
    return Evidence({"a": a, "b": b}, ["name", "value"], [[text, "1 ± 0.1"]], figure, remarks=[text])


def claim(name="toy", measure=lambda budget: evidence(Estimate(0.5, 0.01, 3), Estimate(20.0, 0.1, 3)), **changes):
    return Claim(**{"name": name, "paper": "paper", "statement": "s", "setting": "how", "criteria": PAIR, "measure": measure, "minutes": (0.1, 0.2), **changes})


# -- verdicts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (Estimate(0.5, 0.1, 3), Estimate(12.0, 0.1, 3), Verdict.HOLDS),
        (Estimate(0.5, 0.1, 3), Estimate(10.1, 0.1, 3), Verdict.OPEN),  # 4.3 standard errors of three seeds reach the bound
        (Estimate(0.5, 0.1, 3), Estimate(9.0, 0.1, 3), Verdict.FAILS),
        (Estimate(0.9, 0.1, 3), Estimate(9.0, 0.1, 3), Verdict.FAILS),  # one missed criterion is enough
        (Estimate.exact(1.0), Estimate.exact(10.0), Verdict.HOLDS),
        (Estimate.exact(1.0 + 1e-9), Estimate.exact(10.0), Verdict.FAILS),
        (Estimate(math.nan, 0.1, 3), Estimate(12.0, 0.1, 3), Verdict.FAILS),
    ],
)
def test_a_verdict_follows_from_the_intervals(a, b, verdict):
    assert judge(claim(), evidence(a, b))[0] == verdict


def test_error_bars_are_those_of_the_mean_over_seeds():
    found = Estimate.over([1.0, 2.0, 3.0])
    assert (found.value, found.se, found.n) == (2.0, pytest.approx(3**-0.5), 3) and found.margin == pytest.approx(4.303 * 3**-0.5)
    with pytest.raises(ValueError, match="two seeds"):
        Estimate.over([1.0])


# -- records ----------------------------------------------------------------------------------------------------------------------


def test_a_record_round_trips_and_faults_are_named(tmp_path):
    record = build(claim(), evidence(Estimate(0.5, 0.01, 3), Estimate(20.0, 0.1, 3)), quick=True, seconds=1.5, device="cpu")
    write_claim(record, tmp_path)
    assert read_claim(tmp_path / "claim.json") == record and record["verdict"] == "holds" and record["seeds"] == [0, 1, 2]
    assert record["criteria"][1]["text"] == "another one is at least 10"
    for change, message in ((("verdict", "true"), "verdict"), (("extra", 1), "extra"), (("criteria", []), "criteria")):
        (tmp_path / "claim.json").write_text(json.dumps({**record, change[0]: change[1]}))
        with pytest.raises(UserError, match=message):
            read_claim(tmp_path / "claim.json")


def test_the_newest_record_of_a_claim_counts_and_broken_ones_are_named(tmp_path):
    for name, quick, created in (("one", True, "2026-01-01"), ("two", False, "2026-01-02"), ("broken", False, "")):
        (tmp_path / name).mkdir()
        record = build(claim(), claim().measure(None), quick, 1.0, "cpu") | {"created_utc": created}
        write_claim(record, tmp_path / name)
    (tmp_path / "broken" / "claim.json").write_text("{")
    left_out = []
    ((record, folder),) = read_claims(tmp_path, left_out)
    assert not record["quick"] and folder == tmp_path / "two" and "broken/claim.json" in left_out[0]


def test_a_run_leaves_record_picture_and_report_and_reaches_the_leaderboard_as_data(tmp_path, monkeypatch, capsys):
    hostile = claim("toy", lambda budget: evidence(Estimate(0.5, 0.01, 3), Estimate(20.0, 0.1, 3), HOSTILE), statement=HOSTILE)
    monkeypatch.setattr(command, "find", lambda names: [hostile])
    assert command.main(["run", "--quick", "--out", str(tmp_path / "claims")]) == 0
    assert "holds" in capsys.readouterr().out and (tmp_path / "claims" / "toy-quick" / "claim.png").stat().st_size > 1000
    report = (tmp_path / "claims" / "claims.md").read_text()
    assert "toy-quick/claim.png" in report and "<script>" not in report
    assert leaderboard.main(["--runs", str(tmp_path)]) == 0
    page, table = ((tmp_path / f"leaderboard.{suffix}").read_text() for suffix in ("html", "md"))
    assert HOSTILE not in page and '"verdict":"holds"' in page and "data:image/webp" in page
    assert "Claims of the papers" in table and "<script>" not in table


def test_the_command_lists_and_refuses(tmp_path, capsys):
    assert command.main([]) == 0
    listed = capsys.readouterr().out
    assert all(each.name in listed and str(each.criteria[0]) in listed for each in all_claims().values())
    assert command.main(["run", "jit-manifol", "--out", str(tmp_path)]) == 2 and "jit-manifold" in capsys.readouterr().err
    assert command.main(["report", "--out", str(tmp_path)]) == 2 and "run --quick" in capsys.readouterr().err


def test_every_claim_is_complete():
    for each in all_claims().values():
        assert find([each.name]) == [each] and each.criteria and each.paper and each.setting
        assert all(0 < quick <= full for quick, full in [each.minutes]) and (each.num_seeds == (0, 0) or min(each.num_seeds) >= 2)
    quick, full = (sum(each.minutes[i] for each in all_claims().values()) for i in (0, 1))
    assert quick <= 2 * 15 and full <= 2 * 120  # minutes of one core; what is promised is for two


# -- the claims themselves, cut short ---------------------------------------------------------------------------------------------


def test_the_toy_lies_on_its_plane_and_distances_are_metres():
    torch.manual_seed(0)
    points, projection = roll(500), plane(16, 0)
    x = lifted(points, projection).flatten(1)
    assert torch.allclose(projection.T @ projection, torch.eye(2), atol=1e-6) and torch.allclose(x @ projection, points, atol=1e-5)
    assert off_plane(x, projection) < 1e-6 and points.std(dim=0).tolist() == pytest.approx([1.05, 1.09], abs=0.1)
    noise = torch.randn(500, 16)
    assert off_plane(x + 0.3 * (noise - noise @ projection @ projection.T), projection) == pytest.approx(0.3, rel=0.05)
    shifted = points + torch.tensor([0.5, 0.0])
    assert sliced_distance(points, shifted) == pytest.approx(0.5 * 2 / math.pi, rel=1e-3)  # the mean of |cos| over directions


@pytest.mark.parametrize("samples", [lambda: jit_manifold.samples("x", 4, 60, 0), lambda: pmf_manifold.trained("x", 4, 60, 0).points])
def test_toys_learn_by_the_methods_own_objective_and_sampler(samples):
    drawn, projection = samples(), plane(4, 0)
    assert drawn.shape == (3000, 4) and off_plane(drawn, projection) < 0.5
    torch.manual_seed(1)
    assert sliced_distance(drawn @ projection, roll(3000)) < 0.6 < sliced_distance(torch.zeros(3000, 2), roll(3000))


def test_a_width_rules_bound_is_the_covariances_tail():
    latent = rae_width.latent_of(0)
    assert rae_width.bound(rae_width.plain(16), latent) == pytest.approx(0.5, abs=1e-4)  # 16 tokens have 15 directions, all among the 16
    assert rae_width.bound(rae_width.plain(8), latent) > 0.75 and rae_width.bound(rae_width.plain(32), latent) == 0
    assert rae_width.bound(rae_width.NETWORKS["width 16 + head of width 48"], latent) == 0
    losses = [rae_width.final_loss(rae_width.plain(48), steps, 0) for steps in (14, 84)]
    assert losses[1] < 0.8 * losses[0]


def test_counted_costs_are_the_published_ones():
    rows = {row.name: row for row in cost.PUBLISHED}
    decoder, pmf, head = (cost.count(rows[name]) for name in ("RAE decoder ViT-B", "pMF-B/16", "RAE DiT-DH-XL"))
    assert decoder.executed / 1e9 == pytest.approx(23.35, abs=0.005) and decoder.explained / 1e9 == pytest.approx(22.13, abs=0.005)
    assert head.forwards == "49 network + 1 decoder + 49 guide" and head.image == pytest.approx(10.40e12, rel=1e-3)
    assert pmf.executed == pmf.explained == pmf.image and pmf.executed / 1e9 == pytest.approx(33.33, abs=0.005)
    assert head.executed / 1e9 == pytest.approx(161.58, abs=0.01) and head.explained / 1e9 == pytest.approx(146.6, abs=0.1)
    assert cost.rounding(23.01) == pytest.approx(0.005) and cost.rounding(146) == 0.5


def test_budgets_differ_in_what_they_choose():
    assert [Budget(quick, (0,)).choose(1, 2) for quick in (True, False)] == [1, 2] and claim().budget(True).seeds == (0, 1, 2)
