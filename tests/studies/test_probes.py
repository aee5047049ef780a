"""The controlled tasks: every label is computed again from the cells by slow loops, and every split keeps its promise."""

import math

import distant_ceiling
import pytest
import torch

from sape2.studies.probes import NOT_ASKED, TASKS, TRAIN, find_task
from sape2.studies.probes import count as count_task
from sape2.studies.probes import distant as distant_task
from sape2.studies.probes import profile as profile_task
from sape2.studies.probes import scenes as scenes_task

SPLITS = [(name, split) for name, task in TASKS.items() for split in task.splits]


def draw(name, split, number=16, seed=0):
    return TASKS[name].sample(split, number, torch.Generator().manual_seed(seed))


# --- labels again, from the cells alone ------------------------------------------------------------------------------


def count_label(cells, y, x, split):
    """Walks from the query cell and counts."""
    symbols = cells[:13].argmax(0)
    if symbols[y, x] <= 8:
        return NOT_ASKED
    dy, dx = ((0, -1), (0, 1), (-1, 0), (1, 0))[symbols[y, x] - 9]
    left = round(3 * float(cells[13, y, x]))
    while True:
        y, x = y + dy, x + dx
        assert 0 <= y < cells.shape[1]
        assert 0 <= x < cells.shape[2]
        left -= int(1 <= symbols[y, x] <= 8)
        if left == 0:
            return int(symbols[y, x]) - 1


def profile_label(cells, y, x, split, columns=False):
    """Looks for another row (column) of the same mask."""
    values = cells.argmax(0)
    if values[y, x] != 2:
        return NOT_ASKED
    lines, at = (values.T.tolist(), x) if columns else (values.tolist(), y)
    (twin,) = [line for index, line in enumerate(lines) if index != at and line[1:] == lines[at][1:]]
    return twin[0] - 3


def majority_label(scenes, index, token):
    """The bit that most tokens of the group show: the ceiling of what can be known, not the label itself."""
    shown = scenes.cells[index, -1].flatten()[scenes.groups[index] == scenes.groups[index, token]]
    return int(shown.sum() > 0)


ORACLES = {
    "count": count_label,
    "row_profile": profile_label,
    "column_profile": lambda *arguments: profile_label(*arguments, columns=True),
}


@pytest.mark.parametrize(("name", "split"), [pair for pair in SPLITS if pair[0] in ORACLES])
def test_labels_are_those_of_a_slow_oracle(name, split):
    scenes = draw(name, split, 6)
    width = scenes.cells.shape[3]
    for cells, labels in zip(scenes.cells, scenes.labels, strict=True):
        expected = [ORACLES[name](cells, token // width, token % width, split) for token in range(len(labels))]
        assert labels.tolist() == expected


@pytest.mark.parametrize("split", [s for s in TASKS["scenes"].splits if "rolled" not in s])
def test_scene_labels_are_found_in_the_picture(split, monkeypatch):
    """Objects are looked for as exact templates in one colour, which noise would hide."""
    monkeypatch.setattr(scenes_task, "NOISE", 0.0)
    scenes = draw("scenes", split, 24)
    scale = TASKS["scenes"].splits[split].scale
    for cells, label in zip(scenes.cells[:, :, ::scale, ::scale], scenes.labels.tolist(), strict=True):
        question = int(cells[5:, 0, 0].argmax())
        found = find_objects(cells[:5].argmax(0))
        assert 2 <= len(found) <= 3
        leftmost = sorted(found)[:2]
        assert leftmost[0][0] < leftmost[1][0]
        count = sum(shape == question - 1 for _, _, shape in found)
        assert label == (leftmost[0][2] if question == 0 else 6 + count)


def find_objects(board):
    """Non-overlapping (column, row, shape) whose cells explain the whole picture; searched with backtracking."""
    left = board.clone()
    if not left.any():
        return []
    y, x = left.nonzero()[0].tolist()
    for shape, template in enumerate(scenes_task.TEMPLATES):
        dy, dx = template.nonzero()[0].tolist()
        top, side = y - dy, x - dx
        if top < 0 or side < 0 or top + 3 > len(board) or side + 3 > board.shape[1]:
            continue
        window = left[top : top + 3, side : side + 3]
        if (window[template] == board[y, x]).all():
            rest = left.clone()
            rest[top : top + 3, side : side + 3][template] = 0
            others = find_objects(rest)
            if others is not None and all(abs(o[1] - top) >= 3 or abs(o[0] - side) >= 3 for o in others):
                return [(side, top, shape), *others]
    return None


def test_a_rolled_scene_asks_for_a_number_only():
    scenes = draw("scenes", "count, rolled", 64)
    assert (scenes.labels >= 6).all()
    assert (scenes.cells[:, 5] == 0).all()


def test_rolling_moves_every_cell_and_changes_none():
    board = torch.arange(2 * 12).view(2, 3, 4)
    rolled = scenes_task._rolled(board, torch.Generator().manual_seed(0))
    for before, after in zip(board, rolled, strict=True):
        shifts = [torch.roll(before, (dy, dx), (0, 1)) for dy in range(3) for dx in range(4)]
        assert any(torch.equal(after, shifted) for shifted in shifts)


@pytest.mark.parametrize("split", TASKS["distant"].splits)
def test_tokens_of_a_type_share_the_bit_and_mostly_show_it(split):
    scenes = draw("distant", split, 100)
    shown = (scenes.cells[:, -1].flatten(1) > 0).long()
    inside = scenes.groups > 0
    assert ((scenes.labels == NOT_ASKED) == ~inside).all()
    assert (scenes.cells[:, -1].flatten(1)[~inside] == 0).all()
    right = (shown == scenes.labels)[inside].double().mean()
    assert abs(right - distant_task.SHOWN) < 0.03
    for index in range(10):
        for group in range(1, int(scenes.groups[index].max()) + 1):
            assert len(scenes.labels[index][scenes.groups[index] == group].unique()) == 1


def test_the_majority_of_a_type_is_better_than_a_token():
    scenes = draw("distant", TRAIN, 40)
    inside = scenes.groups > 0
    voted = torch.tensor([[majority_label(scenes, i, t) for t in range(64)] for i in range(40)])
    assert (voted == scenes.labels)[inside].double().mean() > distant_task.SHOWN + 0.05


def test_the_ceiling_counts_votes_and_halves_ties():
    scenes, points = draw("distant", TRAIN, 20), []
    for index in range(20):
        for token in (scenes.labels[index] != NOT_ASKED).nonzero().flatten():
            votes = scenes.cells[index, -1].flatten()[scenes.groups[index] == scenes.groups[index, token]].sum()
            points.append(0.5 if votes == 0 else float((votes > 0) == (scenes.labels[index, token] == 1)))
    assert 0.5 in points
    assert distant_ceiling.majority_accuracy(scenes) == pytest.approx(sum(points) / len(points), abs=1e-6)


# --- chance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_chance_is_the_accuracy_of_the_best_constant_answer(name, split):
    number = 100 if name == "distant" else 400
    labels = draw(name, split, number).labels.flatten()
    labels = labels[labels != NOT_ASKED]
    shares = labels.bincount(minlength=TASKS[name].num_classes) / len(labels)
    chance = TASKS[name].splits[split].chance
    independent = number * TASKS[name].splits[split].types if name == "distant" else len(labels)  # a type has one label
    assert abs(float(shares.max()) - chance) < 4.5 * math.sqrt(chance * (1 - chance) / independent)


# --- what the splits promise -----------------------------------------------------------------------------------------


def test_n_of_a_split_is_asked_and_no_other():
    for split, options in TASKS["count"].splits.items():
        asked = (3 * draw("count", split, 64).cells[:, 13]).round().unique().tolist()
        assert asked == [0, *options.numbers]


@pytest.mark.parametrize(("split", "low", "high"), [("sparse", 0.12, 0.2), ("dense", 0.78, 0.88), (TRAIN, 0.4, 0.5)])
def test_foreground_has_the_density_of_its_split(split, low, high):
    assert low < float(draw("count", split, 300).cells[:, 1:9].sum(1).mean()) < high


def test_gaps_insert_blank_columns_and_keep_the_order_of_the_others():
    cells, labels = draw("count", TRAIN, 4)[:2]
    wide, grown = count_task.insert_blank_columns(cells, labels, 4, torch.Generator().manual_seed(1))
    for index in range(4):
        blank = [x for x in range(12) if bool((wide[index, 0, :, x] == 1).all())]
        filled = [x for x in range(12) if x not in blank]
        narrow = [x for x in range(8) if not bool((cells[index, 0, :, x] == 1).all())]
        assert torch.equal(wide[index][:, :, filled], cells[index][:, :, narrow])
        assert grown[index][grown[index] != NOT_ASKED].tolist() == labels[index][labels[index] != NOT_ASKED].tolist()


def masks_of(scenes):
    """(B, rows, width) of row profiles."""
    return (scenes.cells.argmax(1) == profile_task.FOREGROUND)[:, :, 1:].long()


def numbers_of(masks):
    return (masks << torch.arange(masks.shape[-1])).sum(-1)


def test_no_training_scene_contains_a_held_out_mask():
    trained = profile_task.is_trained(8)
    assert 0.6 < trained.double().mean() < 0.8
    assert trained[numbers_of(masks_of(draw("row_profile", TRAIN, 500)))].all()
    scenes = draw("row_profile", "held-out masks", 200)
    query = (scenes.cells.argmax(1)[:, :, 0] == profile_task.QUERY).long().argmax(1)
    twins = numbers_of(masks_of(scenes))[torch.arange(200), query]
    assert not trained[twins].any()


@pytest.mark.parametrize("split", profile_task.SPLITS)
def test_one_pair_of_rows_is_equal_and_three_others_are_near(split):
    options = profile_task.SPLITS[split]
    scenes = draw("row_profile", split, 32)
    masks, tags = masks_of(scenes), scenes.cells.argmax(1)[:, :, 0]
    for mask, tag in zip(masks, tags, strict=True):
        query = int((tag == profile_task.QUERY).nonzero())
        distance = (mask != mask[query]).sum(1)
        twins = [row for row in range(options.rows) if row != query and distance[row] == 0]
        near = (distance == 2) & (mask.sum(1) == mask[query].sum())
        assert len(twins) == 1
        assert options.apart[0] <= abs(twins[0] - query) <= options.apart[1]
        assert near.sum() >= profile_task.DISTRACTORS
        assert len(numbers_of(mask).unique()) == options.rows - 1


def test_the_column_task_is_the_row_task_transposed():
    rows, columns = draw("row_profile", TRAIN), draw("column_profile", TRAIN)
    assert torch.equal(rows.cells.transpose(2, 3), columns.cells)
    assert torch.equal(rows.labels.unflatten(1, (8, 9)).transpose(1, 2).flatten(1), columns.labels)


def test_corners_of_objects_lie_where_the_split_says():
    present = torch.ones(500, 3, dtype=torch.bool)
    for where, inside in (("inside", True), ("outside", False)):
        corners = scenes_task._corners(present, where, (12, 12), torch.Generator().manual_seed(0))
        assert ((corners < scenes_task.TRAINED).all(-1) == inside).all()
        assert corners.max() <= 9
        assert scenes_task._good(corners, present).all()


@pytest.mark.parametrize("corners", [[[0, 0], [2, 2], [9, 9]], [[0, 0], [6, 0], [9, 9]]], ids=["overlap", "two left-most"])
def test_bad_layouts_of_objects_are_seen(corners):
    assert not scenes_task._good(torch.tensor([corners]), torch.ones(1, 3, dtype=torch.bool)).any()


@pytest.mark.parametrize("split", distant_task.SPLITS)
def test_segments_of_a_type_keep_their_distance(split):
    options = distant_task.SPLITS[split]
    scenes = draw("distant", split, 8)
    for groups in scenes.groups.unflatten(1, options.grid):
        assert int(groups.max()) == options.types
        for group in range(1, options.types + 1):
            parts = components((groups == group).nonzero().tolist(), options.gap)
            assert len(parts) == options.segments
            sizes = {tuple(max(p[a] for p in part) - min(p[a] for p in part) + 1 for a in (0, 1)) for part in parts}
            assert sizes <= set(distant_task.SEGMENTS)


def components(cells, gap):
    """Cells closer than the gap joined: as many parts as segments says that no two segments are closer than the gap."""
    parts = []
    for cell in cells:
        near = [part for part in parts if any(max(abs(cell[0] - p[0]), abs(cell[1] - p[1])) < gap for p in part)]
        parts = [part for part in parts if part not in near] + [[cell, *(p for part in near for p in part)]]
    return parts


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_a_generator_decides_the_scenes_and_another_gives_others(name, split):
    first, again, other = draw(name, split, 4), draw(name, split, 4), draw(name, split, 4, seed=1)
    assert torch.equal(first.cells, again.cells)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.cells, other.cells)
    assert first.cells.shape == (4, TASKS[name].channels, *TASKS[name].splits[split].grid)


@pytest.mark.parametrize("name", TASKS)
def test_every_scene_can_be_shown(name):
    task = TASKS[name]
    for split in task.splits:
        example = task.example(draw(name, split, 2), 1)
        assert tuple(example.colours.shape) == task.splits[split].grid
        assert example.caption


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'counting'.* count, row_profile"):
        find_task("counting")
    with pytest.raises(ValueError, match=r"'dens'.* train, sparse"):
        draw("count", "dens")
