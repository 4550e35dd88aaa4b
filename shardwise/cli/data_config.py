"""What the section `[data]` can say: one class per source, told apart by the field `source`."""

from dataclasses import dataclass
from typing import Literal

from shardwise.cli.checks import require, require_least


@dataclass(frozen=True, kw_only=True)
class MovieLensConfig:
    """MovieLens: will this user like this movie?

    Attributes:
        source: Where the samples come from: movielens, criteo-kaggle or sequences. The other
            fields depend on it.
        root: Folder of the MovieLens edition; empty: look in $SHARDWISE_DATA, then take the copy
            shipped with the project.
        edition: Name of the edition's folder, used when root is empty.
        train_fraction: Share of the ratings to train on, the earliest; the others are held out.
        history_length: Most movies in a bag of liked or disliked ones, the latest.
        max_tags: Most tags in a bag, the latest.
    """

    source: Literal["movielens"] = "movielens"
    root: str = ""
    edition: str = "ml-latest-small"
    train_fraction: float = 0.8
    history_length: int = 20
    max_tags: int = 10

    def __post_init__(self) -> None:
        """Check each field."""
        fraction = self.train_fraction
        require("data.train_fraction", fraction, 0 < fraction < 1, "over 0 and under 1")
        require("data.edition", self.edition, bool(self.edition), "the name of a folder")
        require_least("data.history_length", self.history_length, 1)
        require_least("data.max_tags", self.max_tags, 1)

    @property
    def has_validation(self) -> bool:
        """Whether a part is kept to judge epochs by: none here."""
        return False


@dataclass(frozen=True, kw_only=True)
class CriteoConfig:
    """Criteo's click logs as they are published: will this advertisement be clicked?

    Attributes:
        source: Where the samples come from: movielens, criteo-kaggle or sequences. The other
            fields depend on it.
        path: The file of rows, gzipped or not; empty: criteo-kaggle-10k/train_examples.txt in
            $SHARDWISE_DATA.
        train_rows: Rows to train on, the first of the file.
        validation_rows: Rows among them, the last, that are kept to judge epochs by instead.
        test_rows: Rows held out, those that follow.
        hash_size: Rows of each field's table, onto which its ids are hashed; 3 or more.
        min_count: Ids that the rows trained on hold less often than this share one row of a table.
    """

    source: Literal["criteo-kaggle"] = "criteo-kaggle"
    path: str = ""
    train_rows: int = 8000
    validation_rows: int = 0
    test_rows: int = 2000
    hash_size: int = 3000
    min_count: int = 3

    def __post_init__(self) -> None:
        """Check each field."""
        require_least("data.train_rows", self.train_rows, 1)
        require_least("data.test_rows", self.test_rows, 1)
        require_least("data.hash_size", self.hash_size, 3)
        require_least("data.min_count", self.min_count, 1)
        rows, wanted = self.validation_rows, f"at least 0 and under train_rows, {self.train_rows}"
        require("data.validation_rows", rows, 0 <= rows < self.train_rows, wanted)

    @property
    def has_validation(self) -> bool:
        """Whether a part is kept to judge epochs by."""
        return self.validation_rows > 0


@dataclass(frozen=True, kw_only=True)
class SequencesConfig:
    """What each user took, in order: what next?

    The last item of each user is the test, the one before is to judge epochs by.

    Attributes:
        source: Where the samples come from: movielens, criteo-kaggle or sequences. The other
            fields depend on it.
        path: The file, a line "user item item ..." per user; empty: s3rec/Beauty.txt in
            $SHARDWISE_DATA.
        max_length: Most items of a user that the model reads, the latest.
    """

    source: Literal["sequences"] = "sequences"
    path: str = ""
    max_length: int = 50

    def __post_init__(self) -> None:
        """Check each field."""
        require_least("data.max_length", self.max_length, 1)

    @property
    def has_validation(self) -> bool:
        """Whether a part is kept to judge epochs by."""
        return True


DataConfig = MovieLensConfig | CriteoConfig | SequencesConfig
