from types import SimpleNamespace

import pytest

from shardwise.data import movielens_rows
from shardwise.data.movielens_rows import movielens_20m, movielens_25m, movielens_32m

pytest.importorskip("polars")

RATINGS = "userId,movieId,rating,timestamp\n2,30,4.5,200\n1,10,3.0,100\n1,30,0.5,200\n"
MOVIES = 'movieId,title,genres\n30,"Thing, The (1982)",Horror|Sci-Fi\n10,Untitled,War\n'

EDITIONS = {"ml-20m": movielens_20m, "ml-25m": movielens_25m, "ml-32m": movielens_32m}


def edition(folder, ratings=RATINGS, movies=MOVIES):
    folder.mkdir(exist_ok=True)
    (folder / "ratings.csv").write_text(ratings)
    (folder / "movies.csv").write_text(movies)
    return folder


@pytest.mark.parametrize("name", EDITIONS)
def test_rows_come_in_the_order_of_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SHARDWISE_DATA", str(tmp_path))
    edition(tmp_path / name)
    rows = EDITIONS[name]()
    assert len(rows) == 3
    assert list(rows) == [
        {"userId": 2, "movieId": 30, "rating": 4.5, "timestamp": 200},
        {"userId": 1, "movieId": 10, "rating": 3.0, "timestamp": 100},
        {"userId": 1, "movieId": 30, "rating": 0.5, "timestamp": 200},
    ]


def test_rows_are_joined_with_their_movies(tmp_path):
    rows = list(movielens_20m(edition(tmp_path), include_movies_data=True))
    assert [(row["movieId"], row["title"], row["genres"]) for row in rows] == [
        (30, "Thing, The (1982)", "Horror|Sci-Fi"),
        (10, "Untitled", "War"),
        (30, "Thing, The (1982)", "Horror|Sci-Fi"),
    ]


@pytest.mark.parametrize("lacking", [10, 30])
def test_rating_of_an_unlisted_movie_is_named(tmp_path, lacking):
    edition(tmp_path, movies=MOVIES.replace(f"{lacking},", "20,"))
    with pytest.raises(ValueError, match=f"ratings speak of movie {lacking}, which the file"):
        movielens_25m(tmp_path, include_movies_data=True)
    assert len(list(movielens_25m(tmp_path))) == 3


@pytest.mark.parametrize("name", EDITIONS)
def test_absent_edition_says_what_to_fetch(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SHARDWISE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"download {name}\.zip from https://grouplens"):
        EDITIONS[name]()


def test_damaged_line_is_named(tmp_path):
    edition(tmp_path, ratings=RATINGS + "1,30,9,100\n")
    with pytest.raises(ValueError, match=r"ratings\.csv: line 5: rating is '9', wanted float"):
        movielens_32m(tmp_path)


def test_workers_share_the_rows_out(tmp_path, monkeypatch):
    rows = movielens_20m(edition(tmp_path))
    monkeypatch.setattr(movielens_rows, "_ROWS_AT_ONCE", 1)
    shares = []
    for worker in range(2):
        info = SimpleNamespace(id=worker, num_workers=2)
        monkeypatch.setattr(movielens_rows, "get_worker_info", lambda info=info: info)
        shares.append([row["rating"] for row in rows])
    assert shares == [[4.5, 0.5], [3.0]]
