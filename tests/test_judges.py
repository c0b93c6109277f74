"""The judges of emoji32: the files are those of the digests, they see every degradation, and no method can name one."""

import ast
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pixlat
from pixlat import methods
from pixlat.common.config.resolve import load_presets, resolve
from pixlat.common.config.schema import to_dict
from pixlat.common.errors import UserError
from pixlat.common.files import read_json, sha256_of
from pixlat.common.frozen import efficientnet_lite0 as lite0
from pixlat.common.frozen.encoders import encoder_names
from pixlat.common.frozen.tokenizer import SD_REPOSITORIES
from pixlat.common.images.emoji32 import load_emoji32
from pixlat.common.weights.shipped import AUTOENCODERS
from pixlat.evaluation.features.extractor import EmbeddedExtractor
from pixlat.evaluation.judges import degradations, prepare
from pixlat.evaluation.judges.degradations import COPIES, ROWS, Validation, faults_of
from pixlat.evaluation.judges.networks import NETWORKS, NUM_DESCRIPTION, build, describe
from pixlat.evaluation.judges.recipe import RECIPES, Part, Training, accuracies, augmented, judge_data, train_judge
from pixlat.evaluation.judges.shipped import FOLDER, JUDGES, load_file, load_judge
from pixlat.launch.prepare import main

ROOT = Path(__file__).resolve().parent.parent
NAMES = list(JUDGES)
SMALL = replace(RECIPES["emoji32-plain-v1"], steps=6, batch=8, warmup=2)
CELLS = {  # a few quick cells of the table for each judge: (row, position of the strength)
    "emoji32-plain-v1": (("blur", 0), ("swaps", 1)),
    "emoji32-residual-v1": (("noise", 0), ("lost", 1)),
    "emoji32-vit-v1": (("shuffle", 1), ("jpeg", 0)),
}


@pytest.fixture(scope="module")
def data():
    return judge_data()


@pytest.fixture(scope="module")
def judges():
    return {name: load_judge(name) for name in NAMES}


@pytest.fixture(scope="module")
def validations(judges, data):
    """One for each judge; it extracts the training images once for all tests."""
    return {name: Validation(judges[name], data) for name in NAMES}


@pytest.fixture(scope="module")
def few(data):
    """A twelfth of the training images, for trainings of a few steps."""
    return data._replace(train=Part(*(tensor[::12] for tensor in data.train)))


def card_of(name):
    return read_json(FOLDER / f"{name}.json")


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_files_cards_and_networks_belong_together(name):
    judge, card = JUDGES[name], read_json(JUDGES[name].card)
    assert sha256_of(judge.file) == judge.sha256 == card["sha256"]
    assert judge.file.stat().st_size == card["bytes"] < 2.5e6
    network = build(name)
    assert card["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert 4e5 < card["parameters"] < 1e6
    assert not [key for key, _ in network.named_buffers() if "running" in key]
    recipe = RECIPES[name]
    assert card["recipe"] == dataclasses.asdict(recipe)
    assert card["images_seen"] == recipe.steps * recipe.batch
    assert {key: card[key] for key in ("images_seen", "macs_forward", "macs_training")} == prepare.costs(name, recipe)


def test_nothing_else_is_in_the_folder():
    expected = {f"{name}{suffix}" for name in NAMES for suffix in (".json", ".safetensors")}
    assert {path.name for path in FOLDER.iterdir() if path.suffix != ".py" and path.is_file()} == {
        *expected,
        f"{EmbeddedExtractor.id}.json",
    }


def test_three_different_architectures_from_the_training_part_only(data):
    assert len(NETWORKS) == len(JUDGES) == 3
    assert len({JUDGES[name].sha256 for name in NAMES}) == 3
    for name in NAMES:
        assert card_of(name)["data"] == {"name": "emoji32", "digest": data.digest, "train": 4089, "heldout": 1017}
        assert not card_of(name).get("provisional")


def test_the_heads_have_an_output_for_every_label_of_the_data(data):
    sheet = load_emoji32()
    assert (len(sheet.class_names), len(sheet.style_names), len(sheet.subgroup_names)) == (10, 3, 97)
    assert sheet.subgroup_names[int(sheet.subgroups[0])] == "face-costume"  # of the first emoji, U+1F47D
    network = build(NAMES[0])
    assert [head.out_features for head in (network.classes, network.styles, network.subgroups)] == [10, 3, 97]
    for labels, number in zip(data.train[1:], (10, 3, 97), strict=True):
        assert labels.unique().tolist() == list(range(number))


@pytest.mark.parametrize("damage", ["missing", "shorter", "one bit", "another judge"])
def test_a_damaged_file_is_a_user_error(tmp_path, damage):
    name, other = NAMES[:2]
    file, content = tmp_path / "weights.safetensors", bytearray(JUDGES[name].file.read_bytes())
    if damage == "shorter":
        content = content[:-1]
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
    elif damage == "another judge":
        content = JUDGES[other].file.read_bytes()
    if damage != "missing":
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"weights.safetensors is {'missing' if damage == 'missing' else 'damaged'}"):
        load_file(name, file, JUDGES[name].sha256)


def test_a_file_of_other_tensors_does_not_fit():
    """Even with its own digest."""
    name, other = NAMES[:2]
    with pytest.raises(UserError, match="does not fit JudgeNetwork"):
        load_file(name, JUDGES[other].file, JUDGES[other].sha256)


def test_an_unknown_judge_gets_a_suggestion():
    with pytest.raises(UserError, match="Did you mean 'emoji32-vit-v1'"):
        load_judge("emoji32-vit")


# -- the extractors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_features_do_not_depend_on_the_batch(judges, data, name):
    extractor, images = judges[name], data.heldout.images[:40]
    together = extractor(images)
    alone = [extractor(images[i : i + 1]) for i in (0, 17, 39)]
    assert together.pooled.dtype == torch.float32 and together.pooled.shape == (40, extractor.dims)
    assert together.logits.shape == (40, extractor.num_classes) == (40, 10)
    for i, features in zip((0, 17, 39), alone, strict=True):
        torch.testing.assert_close(features.pooled[0], together.pooled[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.logits[0], together.logits[i], rtol=1e-4, atol=1e-5)
    black = images.clone()
    black[1:] = 0
    torch.testing.assert_close(extractor(black).pooled[0], together.pooled[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_normalised_over_the_training_images_by_one_scale(validations, name):
    pooled = validations[name].train_features.double()
    assert pooled.mean(0).abs().max() < 1e-3
    assert pooled.var(0, correction=0).mean() == pytest.approx(1, abs=1e-3)
    assert validations[name].extractor.network.scale.ndim == 0


def test_other_sizes_and_types_are_errors(judges):
    extractor = judges[NAMES[0]]
    with pytest.raises(UserError, match=r"32 x 32 pixels, and these have 64 x 48.*eval\.judges"):
        extractor(torch.zeros(2, 3, 48, 64, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8"):
        extractor(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("name", NAMES)
def test_held_out_accuracy_is_that_of_the_card(judges, data, name):
    measured, card = accuracies(judges[name].network, data.heldout), card_of(name)["accuracy"]["heldout"]
    for head, share in card.items():
        assert measured[head] == pytest.approx(
            share, abs=3.1 / len(data.heldout)
        )  # another machine may round otherwise
    assert card["class"] > 0.6 and card["style"] > 0.6 and card["subgroup"] > 0.3  # chance: 0.2, 0.37, 0.05
    right = judges[name](data.heldout.images).logits.argmax(1) == data.heldout.classes
    assert float(right.double().mean()) == pytest.approx(measured["class"], abs=1e-3)


# -- what they see -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_judge_sees_every_degradation_and_the_stronger_the_worse(name):
    ratios = card_of(name)["ratios"]
    assert set(ratios) == {*ROWS, COPIES}
    assert all(len(ratios[row]) == 3 == len(ROWS[row].strengths) for row in ROWS)
    assert faults_of(ratios) == []
    assert ratios[COPIES][0] < 1  # why the distance to the training images alone must not rank


def test_blind_spots_are_noticed():
    ratios = dict(card_of(NAMES[0])["ratios"])
    flat, falling = {**ratios, "noise": [1.0, 1.1, 3.0]}, {**ratios, "blur": [1.5, 1.4, 3.0]}
    assert len(faults_of(flat)) == len(faults_of(falling)) == 1
    assert "noise" in faults_of(flat)[0] and "blur" in faults_of(falling)[0]


@pytest.mark.parametrize("name", NAMES)
def test_cells_of_the_table_are_what_the_weights_give(validations, data, name):
    validation, card = validations[name], card_of(name)
    assert validation.floor == pytest.approx(card["fd_heldout"], rel=1e-3)
    assert validation.ratio(data.heldout.images) == 1
    assert validation.copies() == pytest.approx(card["ratios"][COPIES][0], rel=2e-3)
    for row, position in CELLS[name]:
        (value,) = validation.row(row, [ROWS[row].strengths[position]])
        assert value == pytest.approx(card["ratios"][row][position], rel=0.01), row


def test_the_data_card_shows_the_table_of_the_cards():
    cards = [card_of(name) for name in (*NAMES, EmbeddedExtractor.id)]
    assert cards[-1]["sha256"] == EmbeddedExtractor.sha256
    text = (ROOT / "common" / "data" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(prepare.table_lines(cards)) in text
    for name in NAMES:
        assert JUDGES[name].sha256 in text


def test_degradations_keep_what_they_should(data):
    images, classes = data.heldout.images[::7], data.heldout.classes[::7]
    for name, row in ROWS.items():
        weak, strong = (
            row.degrade(images, classes, strength, degradations.seeded(name, strength))
            for strength in (row.strengths[0], row.strengths[-1])
        )
        assert weak.shape == strong.shape == images.shape and weak.dtype == torch.uint8
        assert not torch.equal(weak, images) and not torch.equal(strong, weak), name
        again = row.degrade(images, classes, row.strengths[0], degradations.seeded(name, row.strengths[0]))
        assert torch.equal(again, weak), name


def test_swaps_exchange_images_between_classes_only(data):
    images, classes = data.heldout.images, data.heldout.classes
    numbered = torch.arange(len(images)).view(-1, 1, 1, 1)  # an image's content is its number
    swapped = degradations.class_swaps(numbered, classes, 50, degradations.seeded("swaps", 50)).flatten()
    assert torch.equal(swapped.sort().values, numbered.flatten())  # the same images
    moved = swapped != numbered.flatten()
    assert moved.double().mean() == pytest.approx(0.5, abs=0.01)
    assert (classes[swapped][moved] != classes[moved]).all()


def test_shuffling_repeating_and_losing_do_what_their_titles_say(data):
    images, classes = data.heldout.images, data.heldout.classes
    assert torch.equal(degradations.from_patches(degradations.patches_of(images)), images)
    numbered = torch.arange(len(images)).view(-1, 1, 1, 1)
    kept = degradations.repeats(numbered, classes, 50, degradations.seeded("repeats", 50)).flatten()
    assert len(kept.unique()) == 50 and torch.equal(classes[kept], classes)
    left = degradations.lost_classes(numbered, classes, 5, degradations.seeded("lost", 5)).flatten()
    assert len(classes[left].unique()) == 5
    squares = torch.arange(16).view(1, 16, 1, 1, 1).expand(5, 16, 3, 8, 8)
    shuffled = degradations.shuffled_patches(degradations.from_patches(squares), classes, 4, degradations.seeded("", 0))
    numbers = degradations.patches_of(shuffled)[:, :, 0, 0, 0]
    assert (numbers.sort(1).values == torch.arange(16)).all() and ((numbers != torch.arange(16)).sum(1) == 4).all()


# -- the recipe --------------------------------------------------------------------------------------------------------


def weights_of(training):
    return {key: tensor.clone() for key, tensor in training.network.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path, few, name):
    whole, first = Training(name, SMALL, few), Training(name, SMALL, few)
    losses = [whole.do_step() for _ in range(4)]
    for _ in range(2):
        first.do_step()
    first.save(tmp_path / "state")
    torch.manual_seed(1)  # the state of torch's generator plays no part
    second = Training(name, SMALL, few)
    second.resume(tmp_path / "state")
    assert second.step == 2 and [second.do_step() for _ in range(2)] == losses[2:]
    for key, tensor in weights_of(second).items():
        assert torch.equal(tensor, whole.network.state_dict()[key]), key
    assert weights_of(second)["classes.weight"].ne(Training(name, SMALL, few).network.classes.weight).any()


def test_training_ends_continues_and_refuses_another_recipe(tmp_path, few):
    state, name = tmp_path / "state.safetensors", NAMES[0]
    network = train_judge(name, SMALL, few, state)
    again = train_judge(name, SMALL, few, state)  # its steps are done
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
        assert key in prepare.NORMALISATION or torch.equal(tensor, tensor.half().float())  # as in the file
    with pytest.raises(UserError, match="the state of another training"):
        train_judge(name, replace(SMALL, seed=1), few, state)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state\.safetensors is damaged"):
        train_judge(name, SMALL, few, state)


def test_no_held_out_image_is_trained_on(data):
    training = Training(NAMES[0], SMALL, data)
    held_out = {image.numpy().tobytes() for image in data.heldout.images}
    assert not held_out & {image.numpy().tobytes() for image in training.train.images}
    assert len(training.train) == 4089 and len(held_out) > 1000
    positions, pixels = training.batch()
    assert pixels.shape == (8, 3, 32, 32) and pixels.min() >= 0 and pixels.max() <= 255 and len(positions) == 8


def test_batches_prefer_small_classes_by_the_root_of_their_size(data):
    shares = Training(NAMES[0], SMALL, data).shares
    totals = torch.zeros(10, dtype=torch.float64).index_add_(0, data.train.classes, shares)
    sizes = torch.bincount(data.train.classes).double()
    torch.testing.assert_close(totals / totals.sum(), sizes.sqrt() / sizes.sqrt().sum())


def test_upright_images_are_only_shifted_by_whole_pixels(data):
    images = data.train.images[:16].float()
    upright = replace(SMALL, upright=1.0, shift=2.0)
    moved = augmented(images, upright, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, [3] * 4, value=255)
    shifts = [padded[:, :, y : y + 32, x : x + 32] for y in range(7) for x in range(7)]
    nearest = torch.stack([(moved - shifted).abs().amax((1, 2, 3)) for shifted in shifts]).amin(0)
    assert nearest.max() < 0.01
    turned = augmented(images, replace(upright, upright=0.0), torch.Generator().manual_seed(0))
    assert (turned - moved).abs().amax((1, 2, 3)).min() > 1


def test_the_description_tells_noise_blur_and_order(data):
    images, classes = data.heldout.images[:50], data.heldout.classes[:50]
    plain = describe(images.float())
    assert plain.shape == (50, NUM_DESCRIPTION)
    places, finest, diagonal = slice(None, 192), slice(192, 204), slice(200, 204)  # the last two of neighbours
    noisy = describe(degradations.noise(images, classes, 8, degradations.seeded("noise", 8)).float())
    blurred = describe(degradations.blur(images, classes, 1, degradations.seeded("blur", 1)).float())
    assert (noisy - plain)[:, finest].mean() > 0.5 and (blurred - plain)[:, diagonal].mean() < -0.3
    shuffled = degradations.shuffled_patches(images, classes, 16, degradations.seeded("shuffle", 16))
    assert (describe(shuffled.float()) - plain)[:, places].abs().mean() > 0.1


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_trains_validates_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "validated", lambda *_: {"fd_heldout": 1.0, "ratios": card_of(NAMES[0])["ratios"]})
    (tmp_path / "embedded-v1.json").write_text(json.dumps(card_of("embedded-v1")))
    command = ["judges", f"to={tmp_path}", f"only={NAMES[0]}", "steps=2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    card = read_json(tmp_path / f"{NAMES[0]}.json")
    assert card["sha256"] in printed and "| blur of 0.5, 1, 2 pixels |" in printed
    assert card["recipe"]["steps"] == 2 and card["images_seen"] == 128
    load_file(NAMES[0], tmp_path / f"{NAMES[0]}.safetensors", card["sha256"])
    monkeypatch.setattr(prepare, "train_judge", lambda *_: pytest.fail("a finished judge was trained again"))
    assert main(command) == 0 and capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "to= is missing"),
        (["to=x", "only=emoji32-plain"], "Did you mean 'emoji32-plain-v1'"),
        (["to=x", "steps=0"], "steps=0 is not a number of training steps"),
    ],
)
def test_mistakes_in_the_command_are_explained(arguments, message, capsys):
    assert main(["judges", *arguments]) == 2
    assert message in capsys.readouterr().err


# -- no method knows them ----------------------------------------------------------------------------------------------


def forbidden_words():
    """Everything by which a judge could be named."""
    files = {path.name for path in FOLDER.iterdir() if path.suffix == ".safetensors"}
    return {
        *NAMES,
        *(judge.sha256 for judge in JUDGES.values()),
        *files,
        str(FOLDER),
        "evaluation/judges",
        "judges/data",
    }


def test_no_configuration_of_any_method_names_a_judge():
    """Neither the defaults of a method's settings nor any of its presets."""
    words, count = forbidden_words(), 0
    for name in methods.registered():
        spec = methods.get_spec(name)
        for where, settings in {"defaults": to_dict(resolve(spec, {})), **load_presets(spec.presets)}.items():
            assert not [word for word in words if word in json.dumps(settings, default=str)], (name, where)
            count += 1
    assert count > 40


def test_no_registry_of_frozen_networks_leads_to_a_judge():
    """Encoders, teachers, perceptual networks, tokenizers, and the weights that methods find in the package."""
    digests = {judge.sha256 for judge in JUDGES.values()}
    assert lite0.WEIGHTS_SHA256 not in digests
    assert not {*encoder_names(), *SD_REPOSITORIES, *AUTOENCODERS, "lpips", "convnext", "embedded"} & {*NAMES}
    cards = [Path(card) for card in AUTOENCODERS.values()]
    stages = [stage for name in methods.registered() for stage in methods.get_spec(name).stages]
    cards += [Path(card) for stage in stages for card in stage.shipped.values()]
    assert cards
    for card in cards:
        text = card.read_text(encoding="utf-8")
        assert not [word for word in forbidden_words() if word in text]
        assert sha256_of(card.with_suffix(".safetensors")) not in digests


def strings_of(path):
    """All strings in a module's code, without comments; of other files the whole text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    nodes = ast.walk(ast.parse(text))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_no_file_that_methods_can_reach_is_or_names_a_judge():
    """The code of common/ and methods/ names no judge and holds none. It may not import evaluation/ (test_layout)."""
    digests, words = {judge.sha256 for judge in JUDGES.values()}, forbidden_words()
    assert Path(pixlat.__file__).parent.parent == ROOT
    for folder in ("common", "methods"):
        for path in (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"):
            assert sha256_of(path) not in digests, path
            if path.suffix in (".py", ".yaml", ".json"):
                text = strings_of(path)
                assert not [word for word in words if word in text], path
