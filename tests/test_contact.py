"""Which judges a row has met: from the networks and earlier runs that records name, for every method's demo and through
evaluation, export, import and sampling.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluated_run import Projections, image_folder
from evaluated_run import run_folder as small_run
from records import fields, judges_protocol, protocol

from pixlat.common.config.identity import identity, to_yaml
from pixlat.common.config.resolve import resolve
from pixlat.common.frozen.efficientnet_lite0 import WEIGHTS_SHA256 as SHA256
from pixlat.common.training.state import state_without_external
from pixlat.common.weights import checkpoint
from pixlat.evaluation import run as evaluation_command
from pixlat.evaluation.records.contact import contact_fields, contact_of, judges_of
from pixlat.evaluation.records.parents import current_parents, earlier_runs
from pixlat.evaluation.records.record import build_record, read_record, write_record
from pixlat.evaluation.score.origin import networks_used
from pixlat.launch import prepare
from pixlat.launch import sample as sample_command
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo

LITE0 = {"id": "embedded-v1", "sha256": SHA256}
OURS = {"id": "plain-v1", "sha256": "11" * 32}
JUDGE = "0" * 64  # the digest of the stand-in for the extractor (evaluated_run.py)


def network(sha256, role="teacher", used_at="train", name="net"):
    return {"name": name, "role": role, "params": 5, "sha256": sha256, "used_at": used_at}


def parent(name, components=(), parents=(), checkpoint_sha256="ee" * 32):
    return {
        "key": "tokenizer", "name": name, "method": "vae", "row_id": None, "checkpoint_sha256": checkpoint_sha256,
        "images_seen": 5, "macs_total": 5, "device_seconds": 1.0,
        "pretrained_components": list(components), "parents": list(parents),
    }  # fmt: skip


def met(judge, role, via=None, component="net", used_at="train"):
    return {"judge": judge, "role": role, "component": component, "used_at": used_at, "via": via}


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_a_network_with_a_judges_digest_is_contact_and_another_is_not():
    judges = [LITE0, OURS]
    assert contact_of([], [], judges) == []
    assert contact_of([network("ab" * 32)], [parent("other", [network("cd" * 32)])], judges) == []
    found = contact_of([network(SHA256), network(SHA256, "loss"), network("11" * 32, "encoder", "both")], [], judges)
    assert found == [
        met("embedded-v1", "teacher"),
        met("embedded-v1", "loss"),
        met("plain-v1", "encoder", used_at="both"),
    ]
    assert contact_of([network(SHA256), network(SHA256)], [], judges) == [met("embedded-v1", "teacher")]  # said once


def test_earlier_runs_of_earlier_runs_count_and_say_the_way():
    chain = [parent("guide", [], [parent("decoder", [network(SHA256, "loss")], [parent("codec", [network(SHA256)])])])]
    assert contact_of([], chain, [LITE0]) == [
        met("embedded-v1", "loss", "guide > decoder"),
        met("embedded-v1", "teacher", "guide > decoder > codec"),
    ]


def test_a_judge_among_the_earlier_runs_is_met():
    """A judge of the user's own: a run of theirs whose checkpoint the row is built on."""
    own = {"id": "mine", "sha256": "77" * 32}
    chain = [parent("middle", [], [parent("my-judge", checkpoint_sha256="77" * 32)])]
    assert contact_of([], chain, [own]) == [met("mine", "tokenizer", "middle", "my-judge", "both")]


@pytest.mark.parametrize(
    ("components", "parents"),
    [
        ([network(None)], []),
        ([network(SHA256), network(None)], []),
        ([], [{key: value for key, value in parent("unfinished").items() if key != "pretrained_components"}]),
        ([], [parent("known", [], [parent("deep", [network(None)])])]),
    ],
)
def test_where_something_is_not_known_there_is_no_answer(components, parents):
    assert contact_of(components, parents, [LITE0]) is None
    assert contact_fields(components, parents, protocol()) == {}


def test_the_judges_are_those_of_the_protocol():
    assert [judge["id"] for judge in judges_of(judges_protocol())] == ["embedded-v1", "other-v1"]
    assert [judge["id"] for judge in judges_of(protocol())] == ["embedded-v1"] and judges_of(None) == []
    used = [network(protocol()["extractor"]["sha256"])]
    assert contact_fields(used, [], protocol()) == {"contact": [met("embedded-v1", "teacher")]}
    assert contact_fields(used, [], None) == {}
    row = build_record({**fields(pretrained_components=used), **contact_fields(used, [], protocol())})
    assert row["contact"] == [met("embedded-v1", "teacher")]


def test_an_evaluation_keeps_the_parents_of_the_training_and_learns_of_theirs():
    recorded = {key: value for key, value in parent("codec").items() if key not in ("pretrained_components", "parents")}
    now = parent("codec", [network(SHA256)])
    assert current_parents([recorded], [now]) == [now] and current_parents([], [now]) == [now]
    other = parent("other", checkpoint_sha256="aa" * 32)
    assert current_parents([recorded], [other]) == [recorded]


# -- the methods' demos ------------------------------------------------------------------------------------------------


def demo(method, **model):
    return resolve(get_spec(method), {f"model.{key}": str(value) for key, value in model.items()})


def networks_of(run):
    """The networks of others of a configuration, loaded from their files, as its record lists them."""
    method = get_class(run.method)(run.model, DataInfo("emoji32", 10, 32, 8))
    method.load_external()
    return method, fields(pretrained_components=[vars(part) for part in method.describe(run.sample).pretrained])


def contact_of_demo(run):
    """The contact in a demo's record with EfficientNet-Lite0."""
    _, known = networks_of(run)
    return contact_of(known["pretrained_components"], earlier_runs(run, run.model), [LITE0])


def finished_run(folder, run):
    """A run folder with a checkpoint and a record, as `pixlat train` leaves it."""
    torch.manual_seed(0)
    method, known = networks_of(run)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(run))
    state = {name: tensor.clone() for name, tensor in state_without_external(method).items()}
    average = {f"ema-{run.train.ema_decay[0]:g}": {name: state[name] for name in method.averaged_parameters()}}
    facts = {"step": 1, "identity": identity(run)}
    checkpoint.save(folder / "checkpoints", 1, checkpoint.Checkpoint({"model": state, **average}, facts), keep=1)
    write_record(build_record({**known, "name": folder.name, "protocol": None, "metrics": {}}), folder / "result.json")
    return folder


SHIPPED = "autoencoder32 (in the package)"
THROUGH_THE_AUTOENCODER = met("embedded-v1", "perceptual loss", SHIPPED, "embedded")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("jit", []),
        ("pmf", [met("embedded-v1", "perceptual loss", component="embedded")]),
        ("sit", [THROUGH_THE_AUTOENCODER]),
        ("dit", [THROUGH_THE_AUTOENCODER]),
        ("repa", [met("embedded-v1", "teacher", component="embedded"), THROUGH_THE_AUTOENCODER]),
        ("reg", [met("embedded-v1", "teacher", component="embedded"), THROUGH_THE_AUTOENCODER]),
        ("dsd", [met("embedded-v1", "teacher", component="embedded")]),
        ("vae", [met("embedded-v1", "perceptual loss", component="embedded")]),
    ],
)
def test_what_each_demo_has_met(method, expected):
    assert contact_of_demo(demo(method)) == expected


def test_rae_has_met_it_as_encoder_and_in_its_decoders_training(tmp_path):
    decoder = finished_run(tmp_path / "decoder", demo("rae_decoder"))
    found = contact_of_demo(demo("rae", decoder=decoder))
    assert found[0] == met("embedded-v1", "encoder", component="embedded")
    assert met("embedded-v1", "encoder", "decoder", "embedded", "both") in found
    assert {entry["role"] for entry in found if entry["via"] == "decoder"} == {"encoder", "perceptual"}


def test_an_autoencoder_of_ones_own_brings_what_it_has_met(tmp_path):
    plain = finished_run(tmp_path / "plain", demo("vae", perceptual="none"))
    assert contact_of_demo(demo("sit", tokenizer=plain)) == []
    taught = finished_run(tmp_path / "taught", demo("vae"))
    assert contact_of_demo(demo("sit", tokenizer=taught)) == [
        met("embedded-v1", "perceptual loss", "taught", "embedded")
    ]
    (taught / "result.json").unlink()  # nobody knows what an unfinished run has met
    assert contact_of_demo(demo("sit", tokenizer=taught)) is None


def test_a_network_that_a_description_forgets_is_met_all_the_same():
    run = demo("repa")
    method, _ = networks_of(run)
    described = replace(method.describe(run.sample), pretrained=())
    used = networks_used(method, described)
    assert [part["role"] for part in used] == ["tokenizer", "teacher"]
    assert contact_of(used, [], [LITE0]) == [met("embedded-v1", "teacher", component="embedded")]
    assert networks_used(method, method.describe(run.sample)) == used


# -- through the commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def taught(tmp_path, monkeypatch):
    """A run folder whose record names the judge as its teacher, and a stage of a stage that met it in a loss."""
    monkeypatch.setattr("pixlat.evaluation.judges.panel.EmbeddedExtractor", Projections)
    data = image_folder(tmp_path / "data")
    small_run(tmp_path / "taught", data)
    file = tmp_path / "taught" / "result.json"
    known = {key: value for key, value in json.loads(file.read_text()).items() if key != "row_id"}
    deep = [parent("codec", [], [parent("deep", [network(JUDGE, "loss")])])]
    write_record(build_record({**known, "pretrained_components": [network(JUDGE)], "parents": deep}), file)
    return tmp_path / "taught"


MET = [met("embedded-v1", "teacher"), met("embedded-v1", "loss", "codec > deep")]


def evaluated(*arguments):
    """The record of one evaluation."""
    path = evaluation_command.work([*arguments, "device=cpu", "num_images=24"]).splitlines()[-1]
    return read_record(Path(path))


def test_an_evaluation_says_what_the_training_has_met(taught, tmp_path):
    record = evaluated(f"run={taught}")
    assert record["contact"] == MET and record["parents"][0]["parents"][0]["name"] == "deep"
    small_run(tmp_path / "plain", tmp_path / "data")
    assert evaluated(f"run={tmp_path}/plain")["contact"] == []
    small_run(tmp_path / "unfinished", tmp_path / "data", record=False)
    assert evaluated(f"run={tmp_path}/unfinished")["contact"] == []  # its configuration says that it uses nothing


def test_an_export_keeps_it_and_says_it_on_its_card(taught, tmp_path):
    assert prepare.main(["export", f"from={taught}", f"to={tmp_path}/out"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        f"- net (teacher, sha256 {JUDGE})",
        "- the run deep (model.tokenizer, vae), used by codec",
        "used by deep",
    ):
        assert text in card, text
    assert prepare.main(["import", "method=jit", f"file={tmp_path}/out", "name=back", f"out={tmp_path}"]) == 0
    record = evaluated(f"run={tmp_path}/back")
    assert record["contact"] == MET and record["parents"][0]["parents"][0]["name"] == "deep"
    assert prepare.main(["export", f"from={tmp_path}/back", f"to={tmp_path}/again"]) == 0  # and a second time
    assert (tmp_path / "again" / "README.md").read_text().count(JUDGE) == 2
    sampled = samples(tmp_path / "out", tmp_path / "of-the-export")
    assert evaluated(f"npz={sampled}", f"out={tmp_path}/records")["contact"] == MET


def test_a_forged_lineage_is_refused(taught, tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    assert prepare.main(["export", f"from={taught}", f"to={tmp_path}/out"]) == 0
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for lineage in ("{", "[]", '{"parents": [{"name": 5}]}'):
        save_file(load_file(file), file, {**metadata, "lineage": lineage})
        assert prepare.main(["import", "method=jit", f"file={tmp_path}/out", "name=back", f"out={tmp_path}"]) == 2
        assert "its lineage is not valid" in capsys.readouterr().err and not (tmp_path / "back").exists()


def samples(source, to):
    assert sample_command.main([f"run={source}", f"to={to}", "n=24", "as=npz", "class=balanced", "device=cpu"]) == 0
    return to / "samples.npz"


def test_samples_keep_it_beside_them_and_images_of_unknown_origin_say_nothing(taught, tmp_path):
    npz = samples(taught, tmp_path / "samples")
    record = evaluated(f"npz={npz}", f"out={tmp_path}/records")
    assert record["contact"] == MET and record["config"] == evaluated(f"run={taught}")["config"]
    facts = json.loads((tmp_path / "samples" / "samples.json").read_text())
    facts["source"]["pretrained_components"][0]["sha256"] = "no digest"
    (tmp_path / "samples" / "samples.json").write_text(json.dumps(facts))
    with pytest.raises(Exception, match=r"samples.json is damaged .*pretrained_components.0.sha256"):
        evaluated(f"npz={npz}", f"out={tmp_path}/records")
    for name in ("pretrained_components", "parents", "config"):  # as early versions wrote it
        del facts["source"][name]
    (tmp_path / "samples" / "samples.json").write_text(json.dumps(facts))
    assert "contact" not in evaluated(f"npz={npz}", f"out={tmp_path}/early")
    (tmp_path / "samples" / "samples.json").unlink()
    own = ["data=folder", f"data.path={tmp_path}/data", "data.image_size=8"]
    assert "contact" not in evaluated(f"npz={npz}", f"out={tmp_path}/unknown", *own)
