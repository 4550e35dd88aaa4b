import pytest

from shardwise.data.movielens import SHIPPED, find_movielens, read_movielens

pytest.importorskip("polars")

FILES = {
    "ratings.csv": "userId,movieId,rating,timestamp\n2,30,4.5,200\n1,10,3.0,100\n1,30,0.5,200\n",
    "movies.csv": "movieId,title,genres\n"
    '30,"Thing, The (1982)",Horror|Sci-Fi\n10,Untitled,(no genres listed)\n',
    "tags.csv": "userId,movieId,tag,timestamp\n2,30,Cult ,150\n1,30,arctic,150\n",
}


def edition(folder, **changes):
    for name, text in FILES.items():
        (folder / name).write_text(changes.get(name.partition(".")[0], text), "utf-8")
    return folder


def test_csv_edition_is_sorted_by_time(tmp_path):
    data = read_movielens(edition(tmp_path))
    assert data.times.tolist() == [100, 200, 200]
    assert data.users.tolist() == [1, 1, 2]
    assert data.movies.tolist() == [10, 30, 30]
    assert data.ratings.tolist() == [3.0, 0.5, 4.5]
    assert data.tags.tolist() == ["arctic", "cult"]


def test_titles_and_genres_are_taken_apart(tmp_path):
    data = read_movielens(edition(tmp_path))
    assert data.catalog.tolist() == [10, 30]
    assert data.release_years.tolist() == [0, 1982]
    assert data.genres == ((), ("Horror", "Sci-Fi"))


def test_dat_edition_has_no_tags(tmp_path):
    (tmp_path / "ratings.dat").write_bytes(b"1::10::5::978300760\n2::11::3::978300000\n")
    (tmp_path / "movies.dat").write_bytes(
        "10::Café (1995)::Drama\n11::B (1994)::War\n".encode("l1")
    )
    data = read_movielens(tmp_path)
    assert data.users.tolist() == [2, 1]
    assert data.genres == (("Drama",), ("War",))
    assert len(data.tags) == len(data.tag_times) == 0


def test_first_keeps_what_was_known_then(tmp_path):
    data = read_movielens(edition(tmp_path)).first(0.4)
    assert data.times.tolist() == [100]
    assert data.tag_times.tolist() == [150, 150]
    assert data.catalog.tolist() == [10, 30]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.5])
def test_first_of_nothing_or_too_much_is_refused(tmp_path, fraction):
    with pytest.raises(ValueError, match=f"fraction {fraction} of 3 ratings keeps"):
        read_movielens(edition(tmp_path)).first(fraction)


def test_cut_never_falls_within_a_moment(tmp_path):
    data = read_movielens(edition(tmp_path))
    assert data.num_before(0.99) == 1
    with pytest.raises(ValueError, match=r"0\.1 leaves none of 3 ratings before the cut"):
        data.num_before(0.1)
    with pytest.raises(ValueError, match=r"the fraction is 1\.0, wanted: over 0 and under 1"):
        data.num_before(1.0)


def test_missing_folder_says_where_and_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDWISE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        find_movielens(edition="ml-1m")
    for part in (tmp_path / "ml-1m", SHIPPED / "ml-1m", "$SHARDWISE_DATA", "grouplens.org"):
        assert str(part) in str(caught.value)


def test_missing_named_folder_is_not_replaced_by_another(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'nowhere': no such folder, looked for"):
        find_movielens(tmp_path / "nowhere")


def test_data_folder_goes_before_the_shipped_copy(tmp_path, monkeypatch):
    (tmp_path / "ml-latest-small").mkdir()
    monkeypatch.setenv("SHARDWISE_DATA", str(tmp_path))
    assert find_movielens() == tmp_path / "ml-latest-small"


def test_missing_file_is_named(tmp_path):
    (edition(tmp_path) / "movies.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no movies\.csv or movies\.csv\.gz"):
        read_movielens(tmp_path)


def test_rating_of_an_unlisted_movie_is_named(tmp_path):
    edition(tmp_path, movies=FILES["movies.csv"].replace("30,", "31,"))
    with pytest.raises(
        ValueError, match=r"ratings speak of movie 30, which the file of movies lacks"
    ):
        read_movielens(tmp_path)


def test_shipped_edition_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDWISE_DATA", str(tmp_path))
    data = read_movielens()
    assert len(data.ratings) == 100_836
    assert len(set(data.users.tolist())) == 610
    assert (len(data.catalog), len(data.tags)) == (9_742, 3_683)
    assert data.times[[0, -1]].tolist() == [828_124_615, 1_537_799_250]
