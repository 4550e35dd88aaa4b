import numpy as np
import pytest

from shardwise.data import criteo_shuffle, npy
from shardwise.data.criteo_npy import BinaryCriteoUtils
from shardwise.data.npy import NpyWriter, open_matrix

RANGES = BinaryCriteoUtils.get_file_row_ranges_and_remainder


def write_tsv(folder, rows):
    path = folder / "day_0"
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def convert(folder, rows, **options):
    outputs = [folder / f"{name}.npy" for name in ("dense", "sparse", "labels")]
    skipped = BinaryCriteoUtils.tsv_to_npys(write_tsv(folder, rows), *outputs, **options)
    return (*map(np.load, outputs), skipped)


def save(path, matrix):
    path.parent.mkdir(exist_ok=True)
    np.save(path, matrix)
    return path


# ---- raw to matrices


def test_tsv_becomes_three_matrices(tmp_path):
    pytest.importorskip("polars")
    rows = [[1, -3, "", *[7] * 11, "ffffffff", "", *["1000001"] * 24], [0, *[4] * 13, *["a"] * 26]]
    dense, sparse, labels, skipped = convert(tmp_path, rows)
    expected = np.log(np.array([[-3, 0, *[7] * 11], [4] * 13]) + 3 + 2.0)
    np.testing.assert_array_equal(dense, expected.astype(np.float32))
    assert (sparse.dtype, labels.dtype) == (np.int64, np.int32)
    assert sparse[0, :3].tolist() == [2**32 - 1, 0, 0x1000001]
    assert labels.tolist() == [[1], [0]]
    assert skipped == 0


def test_greatest_span_of_numbers_does_not_overflow(tmp_path):
    pytest.importorskip("polars")
    rows = [[1, -(2**31), 2**31 - 1, *[0] * 11, *["a"] * 26]]
    dense, *_ = convert(tmp_path, rows)
    np.testing.assert_allclose(dense[0, :2], np.log([2, 2**32 + 1]), rtol=1e-6)


def test_bad_lines_leave_no_files_or_are_counted(tmp_path):
    pytest.importorskip("polars")
    rows = [[1, *[1] * 13, *["a"] * 26], ["x"]]
    with pytest.raises(ValueError, match="line 2: found 1 fields"):
        convert(tmp_path, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["day_0"]
    dense, _, _, skipped = convert(tmp_path, rows, on_bad_lines="skip")
    assert (dense.shape, skipped) == ((1, 13), 1)


def test_other_set_or_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset_name is 'criteo'"):
        BinaryCriteoUtils.tsv_to_npys("a", "b", "c", "d", "criteo")
    with pytest.raises(ValueError, match="path_manager_key is 's3': files are opened as local"):
        BinaryCriteoUtils.tsv_to_npys("a", "b", "c", "d", path_manager_key="s3")


# ---- contiguous ids


def contiguous(folder, *files, threshold=2, **options):
    paths = [save(folder / f"day_{i}_sparse.npy", np.array(f)) for i, f in enumerate(files)]
    output = folder / "out"
    output.mkdir()
    columns = np.array(files[0]).shape[1]
    BinaryCriteoUtils.sparse_to_contiguous(paths, output, threshold, columns, **options)
    return [np.load(output / f"day_{i}_sparse_contig_freq.npy") for i in range(len(files))]


def test_ids_are_numbered_by_first_appearance_over_all_files(tmp_path):
    one, two = contiguous(tmp_path, [[9, 5], [4, 5], [9, 5]], [[4, 6], [2**40, 0]])
    assert one.tolist() == [[2, 2], [3, 2], [2, 2]]
    assert two.tolist() == [[3, 1], [1, 1]]
    assert one.dtype == np.int32


def test_no_rows_give_no_rows(tmp_path):
    (ids,) = contiguous(tmp_path, np.empty((0, 3), np.int64))
    assert ids.shape == (0, 3)


@pytest.mark.parametrize("threshold", [0, 1])
def test_threshold_of_one_keeps_every_id(tmp_path, threshold):
    (ids,) = contiguous(tmp_path, [[9], [4], [9]], threshold=threshold)
    assert ids.tolist() == [[2], [3], [2]]


def test_ids_past_the_precision_of_float32_stay_apart(tmp_path):
    (ids,) = contiguous(tmp_path, [[2**24], [2**24 + 1], [2**32 - 1], [2**32 - 2]], threshold=1)
    assert ids.tolist() == [[2], [3], [4], [5]]


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_blocks_number_ids_as_one_pass_does(tmp_path, monkeypatch, block_rows):
    monkeypatch.setattr(npy, "BLOCK_ROWS", block_rows)
    files = [np.random.default_rng(i).integers(0, 40, (100, 3)) for i in range(2)]
    found = np.concatenate(contiguous(tmp_path, *files, threshold=3))
    both = np.concatenate(files)
    for column, new in zip(both.T, found.T, strict=True):
        numbers = {}
        for id_ in column:
            if (column == id_).sum() >= 3:
                numbers.setdefault(id_, len(numbers) + 2)
        assert new.tolist() == [numbers.get(id_, 1) for id_ in column]


def test_wrong_columns_and_equal_names_are_refused(tmp_path):
    path = save(tmp_path / "day_0.npy", np.zeros((2, 3), np.int64))
    with pytest.raises(ValueError, match=r"day_0\.npy: 3 columns of int64, wanted 26"):
        BinaryCriteoUtils.sparse_to_contiguous([path], tmp_path)
    with pytest.raises(ValueError, match="hold one name twice"):
        BinaryCriteoUtils.sparse_to_contiguous([path, path], tmp_path, columns=3)


# ---- shuffle


def make_days(folder, sizes):
    """Row r of all days has label r % 2, dense (r + 0.5, 0.1) and ids (r, 2**31 - 1 - r)."""
    start = 0
    for day, size in enumerate(sizes):
        rows = np.arange(start, start + size)
        start += size
        save(folder / "in" / f"day_{day}_labels.npy", (rows % 2)[:, None].astype(np.int32))
        dense = np.stack([rows + 0.5, np.full(size, 0.1)], 1).astype(np.float32)
        save(folder / "in" / f"day_{day}_dense.npy", dense)
        ids = np.stack([rows, 2**31 - 1 - rows], 1)
        save(folder / "in" / f"day_{day}_sparse_contig_freq.npy", ids.astype(np.int32))
    (folder / "out").mkdir(exist_ok=True)


def run_shuffle(folder, sizes, **options):
    make_days(folder, sizes)
    rows_per_day = dict(enumerate(sizes))
    BinaryCriteoUtils.shuffle(
        folder / "in",
        folder / "in",
        folder / "out",
        rows_per_day,
        None,
        len(sizes),
        2,
        2,
        **options,
    )
    return [
        {n: np.load(folder / "out" / f"day_{d}_{n}.npy") for n in ("labels", "dense", "sparse")}
        for d in range(len(sizes))
    ]


@pytest.mark.parametrize(("block_rows", "bucket_rows"), [(1000, 1000), (7, 10), (3, 30)])
def test_rows_move_whole_and_the_last_day_stays(tmp_path, monkeypatch, block_rows, bucket_rows):
    monkeypatch.setattr(npy, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(criteo_shuffle, "BUCKET_ROWS", bucket_rows)
    days = run_shuffle(tmp_path, [20, 0, 25, 9])
    assert [len(day["labels"]) for day in days] == [20, 0, 25, 9]
    order = np.concatenate([day["sparse"][:, 0] for day in days])
    assert sorted(order[:45]) == list(range(45)) != order[:45].tolist()
    assert order[45:].tolist() == list(range(45, 54))
    joined = {name: np.concatenate([day[name] for day in days]) for name in days[0]}
    np.testing.assert_array_equal(joined["labels"][:, 0], order % 2)
    np.testing.assert_array_equal(joined["dense"][:, 0], order + np.float32(0.5))
    np.testing.assert_array_equal(joined["dense"][:, 1], np.float32(0.1))
    np.testing.assert_array_equal(joined["sparse"][:, 1], 2**31 - 1 - order)
    assert [d.dtype for d in joined.values()] == [np.int32, np.float32, np.int32]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".npy"}


def test_order_is_numpys_by_seed(tmp_path):
    days = run_shuffle(tmp_path, [8, 4, 1], random_seed=5)
    order = np.concatenate([day["sparse"][:, 0] for day in days[:2]])
    assert order.tolist() == np.random.RandomState(5).permutation(12).tolist()


def test_full_set_is_the_shuffled_days_in_a_row(tmp_path):
    make_days(tmp_path, [5, 6, 2])
    (tmp_path / "full").mkdir()
    folders = [tmp_path / name for name in ("in", "in", "out")]
    BinaryCriteoUtils.shuffle(*folders, {0: 5, 1: 6, 2: 2}, tmp_path / "full", 3, 2, 2)
    days = [np.load(tmp_path / "out" / f"day_{d}_dense.npy") for d in range(2)]
    np.testing.assert_array_equal(np.load(tmp_path / "full" / "dense.npy"), np.concatenate(days))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": {0: 4, 1: 3}}, "day 0 has 3 rows, rows_per_day says 4"),
        ({"sizes": {1: 3}}, "day 0 has 3 rows, rows_per_day says None"),
        ({"ints": 3}, r"day_0_dense\.npy: shape \(3, 2\), wanted \(3, 3\)"),
        ({"large": True}, r"day_0_sparse_contig_freq\.npy: id 2147483648 is 2\*\*31 or more"),
    ],
)
def test_days_that_do_not_fit_are_refused(tmp_path, change, message):
    make_days(tmp_path, [3, 3])
    if change.get("large"):
        save(tmp_path / "in" / "day_0_sparse_contig_freq.npy", np.full((3, 2), 2**31))
    folders = [tmp_path / name for name in ("in", "in", "out")]
    with pytest.raises(ValueError, match=message):
        BinaryCriteoUtils.shuffle(
            *folders, change.get("sizes", {0: 3, 1: 3}), None, 2, change.get("ints", 2), 2
        )
    assert list((tmp_path / "out").iterdir()) == []


# ---- rows of files


@pytest.mark.parametrize("lengths", [[5], [3, 4, 2], [0, 1, 0, 8]])
@pytest.mark.parametrize("world_size", [1, 2, 4, 11])
@pytest.mark.parametrize(("start", "last"), [(0, None), (1, 3), (2, 1)])
def test_every_row_goes_to_one_rank_in_order(lengths, world_size, start, last):
    rows = [(number, row) for number, length in enumerate(lengths) for row in range(length)]
    shares = []
    for rank in range(world_size):
        ranges, remainder = RANGES(lengths, rank, world_size, start, last)
        shares.append([(n, row) for n, (a, b) in ranges.items() for row in range(a, b + 1)])
    wanted = rows[start : None if last is None else last + 1]
    assert [row for share in shares for row in share] == wanted
    assert remainder == len(wanted) % world_size
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("numbers", [(2, 2), (-1, 2), (0, 2, -1), (0, 2, 0, 9), (0, 2, 5, 3)])
def test_rank_or_rows_out_of_range_are_refused(numbers):
    with pytest.raises(ValueError, match=r"in files of \[4, 5\] rows"):
        RANGES([4, 5], *numbers)


@pytest.mark.parametrize("mmap_mode", [False, True])
def test_range_of_rows_is_loaded(tmp_path, mmap_mode):
    path = save(tmp_path / "a.npy", np.arange(12).reshape(6, 2))
    rows = BinaryCriteoUtils.load_npy_range(path, 2, 3, mmap_mode=mmap_mode)
    assert rows.tolist() == [[4, 5], [6, 7], [8, 9]]
    assert isinstance(rows, np.memmap) == mmap_mode
    assert BinaryCriteoUtils.get_shape_from_npy(path) == (6, 2)
    with pytest.raises(ValueError, match="start_row 4 and num_rows 3, but it has 6 rows"):
        BinaryCriteoUtils.load_npy_range(path, 4, 3)


def test_damaged_matrix_is_named(tmp_path):
    path = save(tmp_path / "a.npy", np.zeros((6, 2)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a\.npy: cut off or not npy"):
        open_matrix(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.npy: cut off or not npy"):
        open_matrix(path)
    with pytest.raises(ValueError, match=r"b\.npy: wanted a matrix"):
        open_matrix(save(tmp_path / "b.npy", np.zeros(3)))
    with pytest.raises(FileNotFoundError, match=r"c\.npy: no such file"):
        open_matrix(tmp_path / "c.npy")


@pytest.mark.parametrize("sizes", [[], [0], [3, 0, 2]])
def test_written_matrix_is_what_was_appended(tmp_path, sizes):
    parts = [np.full((size, 2), i) for i, size in enumerate(sizes)]
    with NpyWriter(tmp_path / "a.npy", 2, np.int32) as writer:
        for part in parts:
            writer.append(part)
    wanted = np.concatenate([np.empty((0, 2)), *parts])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), wanted)


def test_failed_writing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), NpyWriter(tmp_path / "a.npy", 2, np.int32):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
