"""The claims framework: verdicts follow from intervals, records validate and reach the leaderboard as data,
and the claims measure what they say.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import claim_checks
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pixlat.common.config.resolve import resolve
from pixlat.common.errors import UserError
from pixlat.evaluation import leaderboard
from pixlat.evaluation.board import page
from pixlat.evaluation.records.claims import read_claim, read_claims, write_claim
from pixlat.evaluation.studies import collapse
from pixlat.evaluation.studies.claim_tools import command, emoji_runs
from pixlat.evaluation.studies.claim_tools.framework import (
    Budget,
    Claim,
    Criterion,
    Estimate,
    Evidence,
    Verdict,
    all_claims,
    build_record,
    claim_modules,
    find,
    verdicts_of,
)
from pixlat.evaluation.studies.claim_tools.swiss_roll import lifted, off_plane, plane, roll, sliced_distance
from pixlat.evaluation.studies.claims import (
    cost,
    dsd_collapse,
    jit_combinations,
    jit_manifold,
    jit_resolution,
    pmf_manifold,
    rae_noise,
    rae_shift,
    rae_width,
    reg_gain,
)
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evaluation" / "studies" / "claims" / "results"
HOSTILE = "</script><script>alert(1)</script>"
PAIR = (Criterion("a", "a number", "at most", 1.0), Criterion("b", "another one", "at least", 10.0))


def evidence(a, b, text="cell"):
    figure = Figure()
    figure.subplots().plot([0, 1])
    return Evidence({"a": a, "b": b}, ["name", "value"], [[text, "1 ± 0.1"]], figure, remarks=[text])


def claim(name="toy", measure=lambda budget: evidence(Estimate(0.5, 0.01, 3), Estimate(20.0, 0.1, 3)), **changes):
    return Claim(
        **{
            "name": name,
            "paper": "paper",
            "statement": "s",
            "setting": "how",
            "criteria": PAIR,
            "measure": measure,
            "minutes": (0.1, 0.2),
            **changes,
        }
    )


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (Estimate(0.5, 0.1, 3), Estimate(12.0, 0.1, 3), Verdict.HOLDS),
        # 4.3 standard errors of three seeds reach the bound
        (Estimate(0.5, 0.1, 3), Estimate(10.1, 0.1, 3), Verdict.OPEN),
        (Estimate(0.5, 0.1, 3), Estimate(9.0, 0.1, 3), Verdict.FAILS),
        (Estimate(0.9, 0.1, 3), Estimate(9.0, 0.1, 3), Verdict.FAILS),  # one missed criterion is enough
        (Estimate.exact(1.0), Estimate.exact(10.0), Verdict.HOLDS),
        (Estimate.exact(1.0 + 1e-9), Estimate.exact(10.0), Verdict.FAILS),
        (Estimate(math.nan, 0.1, 3), Estimate(12.0, 0.1, 3), Verdict.FAILS),
    ],
)
def test_a_verdict_follows_from_the_intervals(a, b, verdict):
    assert verdicts_of(claim(), evidence(a, b))[0] == verdict


@pytest.mark.parametrize(("needed", "verdict"), [(0.5, Verdict.FAILS), (0.9, Verdict.OPEN), (2.0, Verdict.OPEN)])
def test_a_claim_stays_open_where_what_it_needs_is_not_met(needed, verdict):
    criteria = (replace(PAIR[0], needed=True), PAIR[1])
    assert (
        verdicts_of(claim(criteria=criteria), evidence(Estimate(needed, 0.1, 3), Estimate(9.0, 0.1, 3)))[0] == verdict
    )


def test_error_bars_are_those_of_the_mean_over_seeds():
    found = Estimate.over([1.0, 2.0, 3.0])
    assert (found.value, found.se, found.n) == (2.0, pytest.approx(3**-0.5), 3) and found.margin == pytest.approx(
        4.303 * 3**-0.5
    )
    with pytest.raises(ValueError, match="two seeds"):
        Estimate.over([1.0])


# -- records -----------------------------------------------------------------------------------------------------------


def test_a_record_round_trips_and_faults_are_named(tmp_path):
    record = build_record(
        claim(), evidence(Estimate(0.5, 0.01, 3), Estimate(20.0, 0.1, 3)), quick=True, seconds=1.5, device="cpu"
    )
    write_claim(record, tmp_path)
    assert (
        read_claim(tmp_path / "claim.json") == record and record["verdict"] == "holds" and record["seeds"] == [0, 1, 2]
    )
    assert record["criteria"][1]["text"] == "another one is at least 10"
    for change, message in ((("verdict", "true"), "verdict"), (("extra", 1), "extra"), (("criteria", []), "criteria")):
        (tmp_path / "claim.json").write_text(json.dumps({**record, change[0]: change[1]}))
        with pytest.raises(UserError, match=message):
            read_claim(tmp_path / "claim.json")


def test_the_newest_record_of_a_claim_counts_and_broken_ones_are_named(tmp_path):
    for name, quick, created in (("one", True, "2026-01-01"), ("two", False, "2026-01-02"), ("broken", False, "")):
        (tmp_path / name).mkdir()
        record = build_record(claim(), claim().measure(None), quick, 1.0, "cpu") | {"created_utc": created}
        write_claim(record, tmp_path / name)
    (tmp_path / "broken" / "claim.json").write_text("{")
    left_out = []
    ((record, folder),) = read_claims(tmp_path, left_out)
    assert not record["quick"] and folder == tmp_path / "two" and "broken/claim.json" in left_out[0]


def test_a_run_leaves_record_picture_and_report_and_reaches_the_leaderboard_as_data(tmp_path, monkeypatch, capsys):
    hostile = claim(
        "toy", lambda budget: evidence(Estimate(0.5, 0.01, 3), Estimate(20.0, 0.1, 3), HOSTILE), statement=HOSTILE
    )
    monkeypatch.setattr(command, "find", lambda names: [hostile])
    assert command.main(["run", "--quick", "--out", str(tmp_path / "claims")]) == 0
    assert (
        "holds" in capsys.readouterr().out and (tmp_path / "claims" / "toy-quick" / "claim.png").stat().st_size > 1000
    )
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
    assert (
        command.main(["run", "jit-manifol", "--out", str(tmp_path)]) == 2 and "jit-manifold" in capsys.readouterr().err
    )
    assert (
        command.main(["report", "--out", str(tmp_path)]) == 2
        and "`pixlat claims run quick=true`" in capsys.readouterr().err
    )


def test_an_unknown_name_is_refused_before_torch_is_imported():
    code = (
        "import sys; from pixlat.evaluation.studies.claim_tools.command import main; "
        "assert main(['run', 'nosuch']) == 2; "
        "print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout == "False\n" and "'nosuch' is not a claim" in answer.stderr and "dsd-collapse" in answer.stderr


def test_every_claim_is_found_under_the_name_of_its_file():
    assert [each.name for each in find([])] == list(claim_modules()) and len(claim_modules()) >= 13
    assert find(["rae-shift"])[0].name == "rae-shift"


def test_what_was_amended_after_numbers_had_been_seen_is_told_everywhere(tmp_path):
    record = build_record(
        claim(amended=f"turned round {HOSTILE}"), claim().measure(None), quick=False, seconds=1.0, device="cpu"
    )
    untouched = build_record(claim(name="other"), claim().measure(None), quick=False, seconds=1.0, device="cpu")
    for each in (record, {key: value for key, value in untouched.items() if key != "amended"}):  # as older records are
        (tmp_path / each["name"]).mkdir()
        write_claim(each, tmp_path / each["name"])
    text = command.to_markdown(read_claims(tmp_path, []), tmp_path)
    assert text.count(command.AMENDED) == 1 and "turned round &lt;/script&gt;" in text
    told = {
        name: page.claim_data(each, tmp_path, [])["amended"]
        for name, each in ((each["name"], each) for each, _ in read_claims(tmp_path, []))
    }
    assert told == {record["name"]: f"turned round {HOSTILE}", "other": ""}
    changed = {name for name, each in all_claims().items() if each.amended}
    assert {
        "rae-shift",
        "reg-gain",
        "jit-noise",
        "jit-resolution",
        "jit-bottleneck",
        "jit-combinations",
        "pmf-manifold",
        "pmf-times",
    } <= changed
    for each in all_claims().values():
        # all `needed` ones were added after a run
        assert each.amended or not any(criterion.needed for criterion in each.criteria), each.name


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_claim_that_fails_does_not_stop_the_others(tmp_path, jobs):
    names = ["fails", "first", "second"] if jobs == 1 else ["fails", "dies", "first", "second"]
    outcomes = command.run_all([(name, True, tmp_path / name) for name in names], jobs, claim_checks.done_or_not)
    assert (
        outcomes == [name in ("first", "second") for name in names]
        and (tmp_path / "first").is_dir()
        and (tmp_path / "second").is_dir()
    )


def test_what_failed_is_named_and_the_exit_code_says_so(tmp_path, monkeypatch, capsys):
    broken = claim("broken", lambda budget: 1 / 0)
    every = {"toy": claim(), "broken": broken}
    monkeypatch.setattr(command, "find", lambda names: [every[name] for name in names or every])
    assert command.main(["--quick", "--jobs", "1", "--out", str(tmp_path)]) == 1  # without a command, --quick runs
    told = capsys.readouterr()
    assert (
        "ZeroDivisionError" in told.err
        and "these claims failed for the reasons above: broken" in told.err
        and "toy" in told.out
        and "broken" not in told.out
    )


def test_every_claim_is_complete():
    for each in all_claims().values():
        assert find([each.name]) == [each] and each.criteria and each.paper and each.setting
        assert all(0 < quick <= full for quick, full in [each.minutes]) and (
            each.num_seeds == (0, 0) or min(each.num_seeds) >= 3
        )
    quick, full = (sum(each.minutes[i] for each in all_claims().values()) for i in (0, 1))
    assert quick <= 2 * 15 and full <= 2 * 120  # minutes of one core; what is promised is for two


# -- the claims themselves, cut short ----------------------------------------------------------------------------------


def test_the_toy_lies_on_its_plane_and_distances_are_metres():
    torch.manual_seed(0)
    points, projection = roll(500), plane(16, 0)
    x = lifted(points, projection).flatten(1)
    assert torch.allclose(projection.T @ projection, torch.eye(2), atol=1e-6) and torch.allclose(
        x @ projection, points, atol=1e-5
    )
    assert off_plane(x, projection) < 1e-6 and points.std(dim=0).tolist() == pytest.approx([1.05, 1.09], abs=0.1)
    noise = torch.randn(500, 16)
    assert off_plane(x + 0.3 * (noise - noise @ projection @ projection.T), projection) == pytest.approx(0.3, rel=0.05)
    shifted = points + torch.tensor([0.5, 0.0])
    # the mean of |cos| over directions
    assert sliced_distance(points, shifted) == pytest.approx(0.5 * 2 / math.pi, rel=1e-3)


@pytest.mark.parametrize(
    "samples", [lambda: jit_manifold.samples("x", 4, 60, 0), lambda: pmf_manifold.trained("x", 4, 60, 0).points]
)
def test_toys_learn_by_the_methods_own_objective_and_sampler(samples):
    drawn, projection = samples(), plane(4, 0)
    assert drawn.shape == (3000, 4) and off_plane(drawn, projection) < 0.5
    torch.manual_seed(1)
    assert sliced_distance(drawn @ projection, roll(3000)) < 0.6 < sliced_distance(torch.zeros(3000, 2), roll(3000))


def test_a_width_rules_bound_is_the_covariances_tail():
    latent = rae_width.latent_of(0)
    # 16 tokens have 15 directions, all among the 16
    assert rae_width.bound(rae_width.plain(16), latent) == pytest.approx(0.5, abs=1e-4)
    assert rae_width.bound(rae_width.plain(8), latent) > 0.75 and rae_width.bound(rae_width.plain(32), latent) == 0
    assert rae_width.bound(rae_width.NETWORKS["width 16 + head of width 48"], latent) == 0
    losses = [rae_width.final_loss(rae_width.plain(48), steps, 0) for steps in (14, 84)]
    assert losses[1] < 0.8 * losses[0]


def test_counted_costs_are_the_published_ones():
    rows = {row.name: row for row in cost.PUBLISHED}
    decoder, pmf, head = (cost.count(rows[name]) for name in ("RAE decoder ViT-B", "pMF-B/16", "RAE DiT-DH-XL"))
    assert decoder.executed / 1e9 == pytest.approx(23.35, abs=0.005) and decoder.explained / 1e9 == pytest.approx(
        22.13, abs=0.005
    )
    assert head.forwards == "49 network + 1 decoder + 49 guide" and head.image == pytest.approx(10.40e12, rel=1e-3)
    assert pmf.executed == pmf.explained == pmf.image and pmf.executed / 1e9 == pytest.approx(33.33, abs=0.005)
    assert head.executed / 1e9 == pytest.approx(161.58, abs=0.01) and head.explained / 1e9 == pytest.approx(
        146.6, abs=0.1
    )
    assert cost.rounding(23.01) == pytest.approx(0.005) and cost.rounding(146) == 0.5


def test_budgets_differ_in_what_they_choose():
    assert [Budget(quick, (0,)).choose(1, 2) for quick in (True, False)] == [1, 2] and claim().budget(True).seeds == (
        0,
        1,
        2,
    )


# -- claims about images -----------------------------------------------------------------------------------------------


def test_emoji_of_other_sizes_are_the_same_pictures():
    small, large = emoji_runs.emoji(16).train, emoji_runs.emoji(64).train
    original, first = emoji_runs.emoji().train, np.arange(20)
    assert small.image_size == 16 and large.image_size == 64 and emoji_runs.emoji(64).info.image_size == 64
    whole = original.fetch(first).astype(float)
    halved = whole.reshape(20, 3, 16, 2, 16, 2).mean(axis=(3, 5))
    assert np.abs(small.fetch(first) - halved).mean() < 6  # the mean of four pixels, but for the wider filter
    assert np.abs(large.fetch(first).astype(float).reshape(20, 3, 32, 2, 32, 2).mean(axis=(3, 5)) - whole).mean() < 6
    assert len({images.digest for images in (small, large, original)}) == 3
    part = emoji_runs.few(emoji_runs.emoji(), 7)
    assert len(part.train) == part.info.num_train == 7 and part.train.labels.tolist() == sorted(
        part.train.labels.tolist()
    )


def test_jit_trains_on_the_runs_images_and_is_looked_at_between_steps():
    seen = []
    settings = emoji_runs.TINY_JIT | {"model.depth": "2", "model.width": "32", "train.images": "1280"}
    method, run = emoji_runs.untrained("jit", settings, 0, emoji_runs.emoji())
    losses = emoji_runs.fit_on(method, emoji_runs.emoji(), run.train, 0, seen.append)
    assert seen == list(range(40)) and np.mean(losses[-8:]) < 0.7 * np.mean(losses[:4])
    again, _ = emoji_runs.trained("jit", settings, 0, emoji_runs.emoji())
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), again.parameters(), strict=True))


def test_combinations_are_the_nine_at_both_sizes():
    assert len(set(jit_combinations.combinations(quick=False))) == 18
    quick = jit_combinations.combinations(quick=True)
    assert set(quick) < set(jit_combinations.combinations(quick=False)) and len(quick) == 8


def test_twice_the_resolution_in_as_many_tokens_costs_only_the_larger_patches():
    small, large = (jit_resolution.macs(size) for size in jit_resolution.SIZES)
    patches = 16 * (32 + 128) * 3 * (16**2 - 8**2)  # of one forward: into the bottleneck and out of the last layer
    assert large - small == patches * 9  # Heun's evaluations in five steps


def test_a_decoder_errs_more_on_noisier_latents(monkeypatch):
    torch.manual_seed(0)
    latents, x = torch.randn(8, 112, 8, 8), torch.rand(8, 3, 32, 32) * 2 - 1
    monkeypatch.setattr(rae_noise, "latents_and_images", lambda heldout: (latents, x))
    monkeypatch.setattr(rae_noise, "TRAINED", 8)
    errors = rae_noise.errors(0.0, 16 * 60, 0)
    assert len(errors) == len(rae_noise.NOISES) and errors[0] < errors[-1] and errors[0] < x.square().mean().sqrt()


class Recorded:
    """Images that keep which of them were fetched."""

    def __init__(self, images):
        self.images, self.fetched = images, []

    def __len__(self):
        return len(self.images)

    def fetch(self, indices):
        self.fetched.extend(indices)
        return self.images.fetch(indices)

    def counts(self):
        """Images of each class, over its share in the set."""
        labels = self.images.labels
        return np.bincount(labels[self.fetched], minlength=10) / np.bincount(labels) * len(self) / len(self.fetched)


@pytest.fixture
def held_out(monkeypatch):
    """The held-out emoji, which keep what is fetched, in the place of the claims' own."""
    source = emoji_runs.emoji()
    recorded = Recorded(source.heldout)
    for module in (rae_noise, reg_gain):
        monkeypatch.setattr(module, "emoji", lambda: replace(source, heldout=recorded))
    return recorded


def even(counts):
    """Every class is there, and none has more than twice its share;
    of the first 200 images eight classes are missing, of the first 300 seven.
    """
    return counts.min() > 0.25 and counts.max() < 2


def test_hidden_states_are_compared_on_images_of_all_classes(held_out, monkeypatch):
    class Teacher(torch.nn.Module):
        def load(self):
            pass

        def forward(self, images):
            return images

    monkeypatch.setattr(reg_gain, "build_encoder", lambda name: Teacher())
    assert reg_gain.teacher_features.__wrapped__().shape == (reg_gain.PROBED, 3)
    assert len(held_out.fetched) == reg_gain.PROBED and even(held_out.counts())
    of_the_teacher = list(held_out.fetched)
    held_out.fetched.clear()
    monkeypatch.setattr(reg_gain, "fit_on", lambda *_: [])
    monkeypatch.setattr(reg_gain, "emoji_distance", lambda *_: 1.0)
    monkeypatch.setattr(reg_gain, "teacher_features", lambda: torch.randn(reg_gain.PROBED, 4))
    reg_gain.run("sit", [32], 20, 0, Budget(True, (0, 1)))
    assert held_out.fetched == of_the_teacher  # CKNNA is of the same images


def test_decoders_are_compared_on_images_of_all_classes(held_out, monkeypatch):
    blank = SimpleNamespace(encoder=SimpleNamespace(load=lambda: None), encode=lambda images: images)
    monkeypatch.setattr(rae_noise, "decoder_method", lambda noise: blank)
    _, images = rae_noise.latents_and_images.__wrapped__(True)
    assert len(images) == rae_noise.HELD_OUT and even(held_out.counts())


def test_shifts_are_those_that_the_claim_names(monkeypatch):
    run = resolve(get_spec("rae"), rae_shift.SETTINGS)
    info = DataInfo.of(emoji_runs.emoji().info)
    shifts = [get_class("rae")(replace(run.model, shift_base=base), info).shift for base in rae_shift.BASES.values()]
    assert shifts == [1.0, pytest.approx(1.32, abs=0.01), pytest.approx(6.94, abs=0.01)]
    x = torch.randn(50, 112, 8, 8)
    gaussian = rae_shift.pooled(x)
    assert gaussian.n == 50 and torch.allclose(gaussian.mean, x.mean(dim=(0, 2, 3)).double(), atol=1e-6)


def test_the_collapse_claim_judges_what_the_study_measures():
    row = {
        "step": 0,
        "erank": 6.0,
        "erank_share": 0.75,
        "std_between": 0.5,
        "edof": 2.0,
        "unexplained": 0.5,
        "erank_predicted": 5.0,
    }
    runs = {preset: {0: [row, row], 1: [row, row]} for preset in collapse.PRESETS}
    texts = {each.text: each for each in collapse.claims(runs, collapse.PRESETS)}
    for criterion in dsd_collapse.CRITERIA:
        bound = texts[criterion.estimate]
        assert criterion.bound == (bound.at_most if criterion.sense == "at most" else bound.at_least)


def test_a_class_token_agrees_with_its_own_image(monkeypatch):
    """Where the generated token is the teacher's of the generated image,
    the agreement is one less what images of a class share.
    """
    method, run = emoji_runs.untrained("reg", reg_gain.SETTINGS, 0, emoji_runs.few(emoji_runs.emoji(), 20))
    monkeypatch.setattr(reg_gain, "SAMPLES", 20)
    random = reg_gain.token_agreement(method, run.sample, 0)
    solve = method.solve

    def perfect(labels, noise, sample):
        state = solve(labels, noise, sample)
        token = method.standardised(
            method.teacher_targets(method.decode(method.image_of(state)).float().clamp(-1, 1))[1]
        )
        return torch.cat((state[:, : -method.token_width], token.to(state)), dim=1)

    monkeypatch.setattr(method, "solve", perfect)
    assert reg_gain.token_agreement(method, run.sample, 0) > 0.04 > 2 * abs(random)


# -- the full run in the repository ------------------------------------------------------------------------------------


def test_results_in_the_repository_are_full_runs_of_the_claims_as_they_stand():
    """Whoever changes a setting or a criterion runs the claim again:
    `pixlat claims run NAME out=evaluation/studies/claims/results`.
    """
    left_out = []
    found = read_claims(RESULTS, left_out)
    records = {record["name"]: record for record, _ in found}
    assert not left_out and set(records) == set(all_claims())
    for name, each in all_claims().items():
        record = records[name]
        estimates = {
            c.estimate: Estimate(item["value"], item["se"], item["n"])
            for c, item in zip(each.criteria, record["criteria"], strict=True)
        }
        assert verdicts_of(each, Evidence(estimates, [], [], Figure()))[0] == record["verdict"], name
        assert [item["text"] for item in record["criteria"]] == [str(criterion) for criterion in each.criteria], name
        assert (record["paper"], record["statement"], record["setting"]) == (
            each.paper,
            each.statement,
            each.setting,
        ), name
        assert record["amended"] == each.amended, name
        assert not record["quick"] and record["seeds"] == list(each.budget(quick=False).seeds), name
    assert (RESULTS / "claims.md").read_text(encoding="utf-8") == command.to_markdown(found, RESULTS)
