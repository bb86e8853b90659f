"""Tuning: exactly the scores of the long way, a planted optimum, and no leak between the halves of cross-validation."""

from itertools import product

import cv2
import numpy as np
import pytest
import torch

from dbnet.annotations import Annotation
from dbnet.checkpoint import change_checkpoint, load_checkpoint, save_checkpoint
from dbnet.config import Config
from dbnet.errors import UserError
from dbnet.inference import most_polygons, polygons_of, print_full
from dbnet.metric import score_image
from dbnet.targets import make_targets
from dbnet.tuning import ScoredMap, Tuning, grid_of, tune

BOTH_MODES = pytest.mark.parametrize("use_polygon", [True, False], ids=["polygon", "quad"])


def config_of(**changes):
    return Config.from_preset("v1", **changes)


def grid_with(*values, use_polygon=True):
    """A grid of these values of thresh, box_thresh, the unclip ratio and min_size."""
    return dict(zip(grid_of(config_of(use_polygon=use_polygon)), values, strict=True))


def box(left, top, width, height):
    return np.array([[left, top], [left + width, top], [left + width, top + height], [left, top + height]], float)


def planted_page(name, shift=0):
    """Words that are found exactly with thresh 0.3 (not 0.1: a haze joins them; not 0.8: they are 0.7 themselves),
    box_thresh 0.6 (not 0.2: a stain; not 0.8), unclip ratio 2 (not 9: neighbours are swallowed) and min_size 6 (not 1:
    dust)."""
    words = [box(20 + 110 * column + shift, 20 + 38 * row, 90, 24) for row in range(3) for column in range(2)]
    prob_map = make_targets(words, 190, 280)[0].astype(np.float32) * 0.7
    prob_map[20:120, 20:230] = np.maximum(prob_map[20:120, 20:230], 0.15)
    prob_map[150:165, 20:80] = 0.4
    for left in range(120, 260, 20):
        prob_map[160:164, left : left + 4] = 0.9
    return ScoredMap(
        name, np.rint(prob_map * 255).astype(np.uint8), (280, 190), Annotation(words, [False] * len(words))
    )


def noisy_page(name, seed):
    """Words, some don't care, and a map of them as a network gives it: soft, rough and with gaps."""
    random = np.random.default_rng(seed)
    words = [box(10 + 75 * column, 10 + 34 * row, 62, 20) for row in range(5) for column in range(4)]
    kernels = make_targets(words, 190, 320)[0].astype(np.float32)
    noise = cv2.resize(random.normal(0, 1, (24, 40)).astype(np.float32), (320, 190), interpolation=cv2.INTER_CUBIC)
    prob_map = np.clip(cv2.GaussianBlur(kernels, (0, 0), 2) + 0.2 * noise, 0, 1)
    annotation = Annotation([word * 2.1 for word in words], [index % 7 == 3 for index in range(len(words))])
    return ScoredMap(name, np.rint(prob_map * 255).astype(np.uint8), (672, 399), annotation)


@BOTH_MODES
@pytest.mark.parametrize("max_candidates", [500, 16])
def test_every_combination_scores_what_post_processing_and_metric_give(use_polygon, max_candidates):
    config = config_of(use_polygon=use_polygon, max_candidates=max_candidates, image_size=320)
    grid = grid_with((0.3, 0.5), (0.2, 0.75), (1.0, 3.0), (0.0, 4.0, 9.0), use_polygon=use_polygon)
    pages = [noisy_page(f"{seed}.png", seed) for seed in range(2)]
    tuning = tune(pages, config, grid)
    assert len(np.unique(tuning.scores, axis=0)) > (5 if max_candidates == 500 else 1)  # the grid makes a difference
    for values, scores in zip(tuning.combinations, tuning.scores, strict=True):
        changed = config.changed(**values)
        for page, score in zip(pages, scores, strict=True):
            polygons, _ = polygons_of(page.prob_map, page.size, changed)
            expected = score_image(page.annotation.polygons, polygons, page.annotation.dont_care)
            assert tuple(score) == (expected.precision, expected.recall, expected.hmean)


@BOTH_MODES
def test_the_tuner_finds_a_planted_optimum(use_polygon):
    ratio = "polygon_unclip_ratio" if use_polygon else "box_unclip_ratio"
    config = config_of(use_polygon=use_polygon, thresh=0.1, box_thresh=0.2, min_size=1.0, **{ratio: 9.0})
    grid = grid_with((0.1, 0.3, 0.8), (0.2, 0.6, 0.8), (2.0, 9.0), (1.0, 6.0), use_polygon=use_polygon)
    tuning = tune([planted_page("a.png"), planted_page("b.png", shift=5)], config, grid)
    best = tuning.combinations[tuning.best]
    assert best == {"thresh": 0.3, "box_thresh": 0.6, ratio: 2.0, "min_size": 6.0}
    assert tuning.means[tuning.best, 2] == 1.0 == tuning.cross_validated
    assert (tuning.means[:, 2] == 1).sum() == 1  # no other one does
    assert tuning.combinations[0] == {"thresh": 0.1, "box_thresh": 0.2, ratio: 9.0, "min_size": 1.0}


def test_processes_score_what_one_process_scores():
    pages = [noisy_page(f"{seed}.png", seed) for seed in range(3)]
    grid = grid_with((0.3,), (0.2, 0.5), (1.5, 2.0), (3.0,))
    alone, shared = (tune(pages, config_of(), grid, workers) for workers in (0, 2))
    assert alone.combinations == shared.combinations
    np.testing.assert_array_equal(alone.scores, shared.scores)


def test_an_unreadable_image_counts_zero_with_any_values():
    pages = [planted_page("a.png"), planted_page("b.png")._replace(prob_map=None, size=None)]
    tuning = tune(pages, config_of(), grid_with((0.3,), (0.6,), (2.0,), (6.0,)))
    assert tuning.scores[:, 1].max() == 0 and tuning.means[tuning.best, 2] == 0.5


def test_tuning_needs_two_images():
    with pytest.raises(UserError, match="--tune: needs two images"):
        tune([planted_page("a.png")], config_of())


# ------------------------------------------------------------------------------------------- what lasts of the gain


def test_an_image_is_scored_with_the_values_that_are_best_on_the_other_half():
    hmeans = np.array([[0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.1, 0.3], [0.2, 0.0, 0.8, 0.8]])
    # The first half chooses the second row and the second half the third; each is poor on the other half.
    assert tuning_of(hmeans).held_out.tolist() == [0.2, 0.0, 0.1, 0.3]
    assert tuning_of(hmeans).best == 1


def test_values_that_are_best_by_chance_gain_nothing_in_cross_validation():
    """Noise around 0.5: the best of many rows seems far better, and would if the choice saw what it is scored on."""
    random = np.random.default_rng(0)
    noises = random.random((40, 300, 16))
    results = [(noise.mean(axis=1).max(), tuning_of(noise).cross_validated) for noise in noises]
    best, held_out = np.mean(results, axis=0)
    assert best > 0.68
    assert held_out == pytest.approx(0.5, abs=0.03)


def test_the_score_of_an_image_takes_no_part_in_the_choice_of_its_own_values():
    random = np.random.default_rng(1)
    hmeans = random.random((20, 9))
    for page in range(9):
        other_half = slice(4, 9) if page < 4 else slice(0, 4)
        chosen = tuning_of(hmeans[:, other_half]).best
        spoilt = hmeans.copy()
        spoilt[:, page] = 0
        spoilt[(chosen + 1) % 20, page] = 1  # a choice that saw this page might now fall on another row
        before, after = tuning_of(hmeans).cross_validated, tuning_of(spoilt).cross_validated
        # The values of the page's own half stay; what changes is its score, and the choice for the other half.
        own_half = slice(0, 4) if page < 4 else slice(4, 9)
        for table, total in ((hmeans, before), (spoilt, after)):
            expected = table[chosen, own_half].sum() + table[tuning_of(table[:, own_half]).best, other_half].sum()
            assert total == pytest.approx(expected / 9)


def test_halves_are_by_file_name_in_any_order_of_the_images():
    pages = [planted_page(name, shift) for name, shift in (("c.png", 0), ("a.png", 9), ("d.png", 5), ("b.png", 2))]
    pages[0].annotation.polygons.pop()
    pages[0].annotation.dont_care.pop()
    grid = grid_with((0.3,), (0.2, 0.6), (2.0,), (1.0, 6.0))
    one, other = tune(pages, config_of(), grid), tune(pages[::-1], config_of(), grid)
    np.testing.assert_array_equal(one.scores, other.scores)


def tuning_of(hmeans):
    grid = grid_with(tuple(np.arange(len(hmeans)) / 10), (0.5,), (2.0,), (3.0,))
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return Tuning(combinations, np.repeat(np.array(hmeans, float)[..., None], 3, axis=2))


def test_overfitted_values_are_not_saved():
    overfitted = tuning_of(np.repeat([[0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.1, 0.2], [0.1, 0.2, 0.9, 0.9]], 5, axis=1))
    assert overfitted.means[overfitted.best, 2] > overfitted.means[0, 2]
    assert overfitted.doubt == "cross-validated, other values are no better"


def test_few_images_are_too_few_to_choose_on():
    assert tuning_of([[0.5] * 9, [0.9] * 9]).doubt.startswith("9 images are too few")
    assert tuning_of([[0.5] * 10, [0.9] * 10]).doubt == ""
    unreadable = [0.0] * 20
    assert tuning_of([[0.5] * 9 + unreadable, [0.9] * 9 + unreadable]).doubt.startswith("9 images are too few")


def test_a_gain_within_its_standard_error_is_not_saved():
    gains = np.array([0.3, -0.2, 0.3, -0.2, 0.3, -0.2, 0.3, -0.2, 0.3, -0.2, 0.3, -0.2])
    assert "is within its standard error of 0.07" in tuning_of([np.full(12, 0.5), 0.5 + gains]).doubt
    assert tuning_of([np.full(12, 0.5), 0.5 + gains + 0.1]).doubt == ""


def test_own_values_are_kept_where_others_are_only_as_good():
    config = config_of(thresh=0.3, box_thresh=0.6, min_size=6.0)
    tuning = tune(
        [planted_page("a.png"), planted_page("b.png")], config, grid_with((0.25, 0.35), (0.55,), (1.9,), (6.0,))
    )
    assert (tuning.means[:, 2] == 1).sum() > 1
    assert tuning.best == 0 and tuning.doubt
    assert tuning.ranking()[0] == 0
    assert len(tuning.ranking()) == len(np.unique(tuning.scores.reshape(len(tuning.scores), -1), axis=0))


# ------------------------------------------------------------------------------------------------- the checkpoint


def test_a_change_of_the_configuration_keeps_all_else_in_a_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    config = config_of()
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "history": [{"epoch": 1}],
        "best": 0.5,
    }
    save_checkpoint(path, config, model, **state)
    before = load_checkpoint(path)
    change_checkpoint(path, {"thresh": 0.15}, tunings=[{"before": {"thresh": 0.3}}])
    after = load_checkpoint(path)
    assert after.pop("config") == before.pop("config").changed(thresh=0.15)
    assert after.pop("tunings") == [{"before": {"thresh": 0.3}}]
    assert after.keys() == before.keys()
    assert_same(after, before)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


def test_a_change_that_cannot_be_written_leaves_the_checkpoint_as_it_was(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(path, config_of(), torch.nn.Linear(3, 2))
    before = path.read_bytes()
    with pytest.raises(UserError, match="--thresh 7"):
        change_checkpoint(path, {"thresh": 7.0})
    assert path.read_bytes() == before


def test_a_strip_in_windows_may_have_as_many_polygons_in_each_and_says_where_they_are_cut(capsys):
    prob_map, words = np.zeros((1190, 380), np.uint8), []
    for place in range(5):
        words.append(box(50, 100 + 200 * place, 250, 40))
        prob_map[100 + 200 * place :][:40, 50:300] = 230
    page = ScoredMap("a.png", prob_map, (380, 1190), Annotation(words, [False] * 5))
    for most, found in ((3, 5), (2, 4)):  # 1216 px with its padding: two windows of 800
        config = config_of(image_size=800, max_candidates=most)
        polygons, _ = polygons_of(prob_map, page.size, config)
        assert len(polygons) == found and most_polygons(page.size, config) == 2 * most
        tuning = tune([page, page._replace(name="b.png")], config, grid_with((0.3,), (0.25,), (2.0,), (3.0,)))
        expected = score_image(words, polygons)
        assert tuning.scores[0, 0].tolist() == [expected.precision, expected.recall, expected.hmean]
        print_full([("a.png", found, page.size), ("unreadable.png", 0, None)], config)
        line = "1 images have as many polygons as --max-candidates allows, a.png first: raise it for all text\n"
        assert capsys.readouterr().out == (line if most == 2 else "")
