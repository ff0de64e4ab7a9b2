"""Which sample goes where: arithmetic on hashes, no Ray and no bytes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pipelines.data.manifest import Manifest, Resized
from pipelines.data.sharding.plan import (
    BINS,
    Part,
    PartCount,
    ShardJob,
    ShardRange,
    check_classes,
    check_labels,
    check_quality,
    check_repeats,
    check_splits,
    cut,
    grouped,
    order_hash,
    scan_digest,
    shard_count,
    unit_digest,
)
from pipelines.data.sources.base import Listed, Source, Unit
from pipelines.errors import ArchiveError
from pipelines.storage import Place

SOURCE = Source(
    layout="imagenet21k",
    archive=Place("raw"),
    media="image",
    units=(Unit(kind="tar", path="n01.tar", name="n01.tar", size=9, class_name="n01"),),
)


def job(*parts: str, source: Source = SOURCE, val_fraction: float = 0.0) -> ShardJob:
    return ShardJob(
        source=source,
        units=("u",),
        parts=tuple(Part(name=name, out=Place(name)) for name in parts),
        scratch=Place("scratch"),
        classes=None,
        seed=0,
        val_fraction=val_fraction,
    )


def histogram(bins: Sequence[int]) -> np.ndarray:
    return np.bincount(np.array(bins, np.int64), minlength=BINS)


@pytest.mark.parametrize(
    ("samples", "mebibytes", "count"),
    [(0, 0, 0), (1, 0, 1), (8, 1, 2), (9, 1, 3), (9, 256, 3), (9, 1025, 5), (2, 5000, 2)],
)
def test_as_few_shards_as_keep_to_both_limits(samples: int, mebibytes: int, count: int) -> None:
    assert shard_count(samples, mebibytes * 2**20, 4) == count


def test_a_few_samples_are_cut_evenly() -> None:
    bins = [order_hash(0, f"n{i}") >> 44 for i in range(61)]
    counts = histogram(bins)
    sizes = [int(counts[first:last].sum()) for first, last in cut(counts, 0, 25)]
    assert sizes == [20, 20, 21]


@pytest.mark.parametrize("samples", [10_000, 300_000])
@pytest.mark.parametrize("limit", [100, 4096])
def test_shards_of_many_samples_are_even_and_within_the_limit(samples: int, limit: int) -> None:
    counts = histogram(np.random.default_rng(0).integers(0, BINS, samples).tolist())
    cuts = cut(counts, 0, limit)
    sizes = np.array([counts[first:last].sum() for first, last in cuts])
    assert sizes.sum() == samples
    assert sizes.max() <= limit
    assert sizes.max() - sizes.min() <= 2 * counts.max()
    assert [last for _, last in cuts[:-1]] == [first for first, _ in cuts[1:]]


def test_14_million_samples_are_within_the_limit() -> None:
    counts = np.random.default_rng(0).poisson(14_197_122 / BINS, BINS)
    sizes = np.array([counts[first:last].sum() for first, last in cut(counts, 0, 4096)])
    assert sizes.max() <= 4096
    assert sizes.min() >= 4000


def test_no_shard_is_without_samples_where_many_share_a_bin() -> None:
    counts = histogram([5] * 9 + [7])
    assert cut(counts, 0, 2) == [(0, 6), (6, 8)]
    assert cut(histogram([]), 0, 2) == []


def test_neighbours_are_grouped_up_to_a_size() -> None:
    assert grouped([1, 1, 5, 1, 9, 9], 6) == [[0, 1], [2, 3], [4], [5]]
    assert grouped([3, 3], 0) == [[0], [1]]
    assert grouped([], 9) == []


def test_a_key_is_on_one_side_of_the_split_for_good() -> None:
    keys = [f"n01_{i}" for i in range(2000)]
    both = job("train", "val", val_fraction=0.25)
    sides = [both.part_of(key, None) for key in keys]
    assert 0.2 < np.mean(np.array(sides, float)) < 0.3
    val = job("val", val_fraction=0.25)
    assert [val.part_of(key, None) for key in keys] == [0 if side else None for side in sides]
    wider = job("train", "val", val_fraction=0.5)
    assert all(wider.part_of(key, None) for key, side in zip(keys, sides, strict=True) if side)


def test_a_release_s_own_splits_decide_and_what_has_none_is_told_with_the_first() -> None:
    source = replace(SOURCE, splits=("train", "val"))
    both = job("train", "val", source=source)
    assert [both.part_of("x", split) for split in ("train", "val", None)] == [0, 1, 0]
    assert job("val", source=source).part_of("x", "train") is None
    assert job("all", source=source).part_of("x", "train") == 0


def test_a_unit_is_told_apart_by_each_of_its_properties() -> None:
    unit = SOURCE.units[0]
    others = [
        replace(unit, size=10),
        replace(unit, name="n02.tar"),
        replace(unit, start=512),
        replace(unit, split="val"),
        replace(unit, class_name="n02"),
        replace(unit, above=1),
    ]
    digests = {unit_digest(each) for each in (unit, *others)} | {unit_digest(unit, "content")}
    assert len(digests) == 8
    assert unit_digest(unit) == unit_digest(replace(unit))


def test_another_list_or_seed_or_split_makes_another_scan() -> None:
    listed = replace(SOURCE, listed={"a": Listed(class_name="x", split=None)})
    digests = {
        scan_digest(SOURCE, seed=0, parts=("all",), val_fraction=0.0),
        scan_digest(SOURCE, seed=1, parts=("all",), val_fraction=0.0),
        scan_digest(SOURCE, seed=0, parts=("train", "val"), val_fraction=0.1),
        scan_digest(listed, seed=0, parts=("all",), val_fraction=0.0),
        scan_digest(
            SOURCE,
            seed=0,
            parts=("all",),
            val_fraction=0.0,
            resized=Resized(short_side=9, quality=90),
        ),
    }
    assert len(digests) == 5


def test_a_shard_is_named_after_its_number() -> None:
    assert ShardRange(number=1_000_000, part=0, first=0, last=1).name == "shard-1000000.tar"


def test_numbers_of_units_add_up() -> None:
    total = PartCount()
    total.add(PartCount(samples=2, bytes=20, classes={"a": 2}))
    more = {"problems": 1, "lost": 25, "open_ended": 1}
    total.add(PartCount(samples=1, bytes=10, **more, classes={"a": 1}))
    assert total == PartCount(samples=3, bytes=30, **more, classes={"a": 3})
    assert total.bad == 1 + 3


def check(count: PartCount, limit: float = 0.01) -> None:
    check_quality(SOURCE, count, "a is empty", max_bad_fraction=limit, kept="out/.unfinished")


def test_bad_members_and_what_damage_cost_are_held_against_the_limit() -> None:
    check(PartCount(samples=99, bytes=990, problems=1))
    message = (
        r"^about 3 of the 101 files in archive raw cannot be used \(2\.97%, the limit is 1\.00%\): "
        r"a is empty; mend the archive or raise --max-bad-fraction \(what was found is kept in "
        r"out/\.unfinished for the next run\)$"
    )
    with pytest.raises(ArchiveError, match=message):
        check(PartCount(samples=98, bytes=980, problems=1, lost=15))


def test_a_loss_that_nobody_can_tell_is_taken_only_where_any_is() -> None:
    count = PartCount(samples=1000, bytes=1000, problems=1, open_ended=1)
    message = (
        r"^archive raw is cut off, and nobody can tell how much of it is missing; fetch it again, "
        r"or take what is there with --max-bad-fraction 1 \(what was found is kept in out/"
    )
    with pytest.raises(ArchiveError, match=message):
        check(count, 0.9)
    check(count, 1.0)


def test_repeated_keys_are_held_against_the_limit_with_bad_members() -> None:
    count = PartCount(samples=99, bytes=990, problems=1)
    check_repeats(SOURCE, count, [], max_bad_fraction=0.0)
    check_repeats(SOURCE, count, ["n01.tar/1.jpg"], max_bad_fraction=0.02)
    message = (
        r"^4 of the 100 files in archive raw have the key of an earlier member \(class, folders "
        r"and name, without suffix\), and 1 cannot be used \(5\.00% are left out, the limit is "
        r"4\.00%\): a, b, c; rename them or take them out, or raise --max-bad-fraction \(the "
    )
    with pytest.raises(ArchiveError, match=message):
        check_repeats(SOURCE, count, list("abcd"), max_bad_fraction=0.04)


def test_messages_name_the_archive_that_the_user_gave() -> None:
    spooled = replace(SOURCE, archive=Place("out/.unfinished/spool"), packed=Place("raw.tar.gz"))
    with pytest.raises(ArchiveError, match=r"^archive raw\.tar\.gz holds no images: none of its 2"):
        check_quality(spooled, PartCount(problems=2), "x", max_bad_fraction=1.0, kept="out")


def test_classes_that_the_train_split_lacks_are_refused_unless_they_are_given() -> None:
    splits = replace(SOURCE, splits=("train", "val"))
    counts = (PartCount(classes={"a": 1}), PartCount(classes={"a": 1, "images": 9}))
    message = r"archive raw: val has 1 classes that train lacks, such as 'images'; sort .*--classes"
    with pytest.raises(ArchiveError, match=message):
        check_splits(splits, ("train", "val"), counts, None)
    check_splits(splits, ("train", "val"), counts, ("a", "images"))
    check_splits(SOURCE, ("train", "val"), counts, None)
    check_splits(splits, ("val",), counts[1:], None)


def test_labelled_samples_and_others_make_no_dataset_together() -> None:
    base = Manifest(
        version=1, classes=("a",), sources=(), seed=0, samples=3, bytes=3, shards=(), skipped=()
    )
    unlabelled = PartCount(samples=4, unlabelled=4)
    check_labels(SOURCE, "test", unlabelled, replace(base, labelled=False))
    check_labels(SOURCE, "test", PartCount(samples=4), base)
    message = r"samples of part 'test' have none, and those of the dataset have classes; make a"
    with pytest.raises(ArchiveError, match=message):
        check_labels(SOURCE, "test", unlabelled, base)
    with pytest.raises(ArchiveError, match=r"'test' have classes, and those .* have none; make a"):
        check_labels(SOURCE, "test", PartCount(samples=4), replace(base, labelled=False))


def test_an_archive_without_samples_is_refused() -> None:
    with pytest.raises(ArchiveError, match="holds no images: its 1 pieces are empty"):
        check(PartCount())
    with pytest.raises(ArchiveError, match="no images: none of its 2 files can be used: a is em"):
        check(PartCount(problems=2), 1.0)


def test_a_part_has_labels_for_all_or_for_none() -> None:
    check_labels(SOURCE, "test", PartCount(samples=4, unlabelled=4))
    with pytest.raises(ArchiveError, match="2 of the 4 samples of part 'all' have no class; shard"):
        check_labels(SOURCE, "all", PartCount(samples=4, unlabelled=2))


def test_unknown_classes_are_named_with_their_numbers() -> None:
    check_classes(SOURCE, {"a": 3}, None)
    check_classes(SOURCE, {"a": 3}, ("a", "b"))
    found = dict.fromkeys("abcdefg", 2) | {"b": None}
    with pytest.raises(
        ArchiveError,
        match=r"has 6 classes that the list of 1 classes lacks: b, c \(2 samples\), d .*, f .*, \.",
    ):
        check_classes(SOURCE, found, ("a",))
