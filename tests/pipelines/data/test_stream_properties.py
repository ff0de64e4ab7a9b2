"""A stream that is stopped anywhere and goes on elsewhere: the same batches to the bit.

On 4, then 2, then 1 ranks, with other numbers of threads and batches ahead, for images and videos,
with every kind of variation.
"""

import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.data.order import Position, SampleOrder
from pipelines.data.settings import AugmentConfig, ClipConfig, OrderConfig, ReadConfig
from tests.dataset_folder import write_dataset
from tests.pipelines.data.pixels.hostile_videos import encode as encode_video
from tests.pipelines.data.streams import (
    SEED,
    START,
    joined,
    open_eval,
    open_train,
    same,
    take,
    take_ranks,
)

STEPS = 10
CLIPS = {"frames": 4, "batch_size": 4, "resize": 18, "clip": ClipConfig(stride=2)}
PLAIN = AugmentConfig()
MIXED = AugmentConfig(mixup=0.4, mixup_images=3)
VARIED = AugmentConfig(randaugment_layers=2, color_jitter=0.8, grey=0.2, mixup=0.3)

# Keeps its position as training does, until it is killed.
RUN = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from tests.pipelines.data.streams import START, open_train

kept = Path(sys.argv[2])
for batch, position in open_train(Path(sys.argv[1])).batches(START):
    print(json.dumps(batch.labels_R.tolist()), flush=True)
    new = kept.with_suffix(".new")
    new.write_text(json.dumps(asdict(position)))
    new.replace(kept)
"""

relaxed = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def images(tmp_path_factory, noise, encode):
    """26 images of different sizes in six shards."""
    folder = tmp_path_factory.mktemp("images") / "train"
    files = {i: (encode(noise(20 + i, 40 - i, seed=i)), i) for i in range(26)}
    write_dataset(folder, files, num_classes=26, per_shard=5)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """10 videos of different lengths in four shards."""
    folder = tmp_path_factory.mktemp("videos") / "train"
    files = {i: (encode_video(count=6 + 3 * i, size=(64, 32)), i) for i in range(10)}
    write_dataset(folder, files, num_classes=10, per_shard=3, media="mp4")
    return folder


@pytest.fixture(scope="module")
def unbroken():
    """What a run that was never stopped sees, by dataset and variation."""
    seen = {}

    def of(folder, **changes):
        name = (folder, repr(changes))
        if name not in seen:
            seen[name] = [
                (joined([batch]), position) for batch, position in take(folder, STEPS, **changes)
            ]
        return seen[name]

    return of


def readers():
    """How a worker reads: never part of what it reads."""
    return st.builds(ReadConfig, threads=st.integers(1, 4), prefetch=st.integers(1, 4))


def assert_resumed(folder, expected, stops, reads, **changes):
    """Train on 4, 2 and 1 ranks in turn, stopped after so many steps each."""
    position, done = START, 0
    for world, steps, read in zip((4, 2, 1), stops, reads, strict=True):
        ranks = take_ranks(folder, world, steps, position, read=read, **changes)
        for step in range(steps):
            batch, after = expected[done + step]
            assert {rank[step][1] for rank in ranks} == {after}
            assert same(joined([rank[step][0] for rank in ranks]), batch)
            position = after
        done += steps


@relaxed
@given(
    augment=st.sampled_from([PLAIN, MIXED, VARIED]),
    stops=st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 3)),
    reads=st.tuples(readers(), readers(), readers()),
)
def test_images_resume_anywhere_on_fewer_ranks_to_the_bit(images, unbroken, augment, stops, reads):
    expected = unbroken(images, augment=augment)

    assert_resumed(images, expected, stops, reads, augment=augment)


@settings(relaxed, max_examples=5)
@given(
    augment=st.sampled_from([PLAIN, MIXED, VARIED]),
    stops=st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 3)),
    reads=st.tuples(readers(), readers(), readers()),
)
def test_videos_resume_anywhere_on_fewer_ranks_to_the_bit(videos, unbroken, augment, stops, reads):
    changes = {"augment": augment, **CLIPS}
    expected = unbroken(videos, **changes)

    assert_resumed(videos, expected, stops, reads, **changes)


def test_what_a_global_batch_mixes_is_the_same_on_any_ranks(images):
    """The rows that only serve mixing are another rank's: their weighted sums agree."""
    whole = [batch.inputs() for batch, _ in take(images, 4, augment=MIXED)]

    for world in (2, 4, 8):
        ranks = take_ranks(images, world, 4, augment=MIXED)
        for step, expected in enumerate(whole):
            parts = torch.cat([rank[step][0].inputs() for rank in ranks])
            assert torch.equal(parts, expected)


@relaxed
@given(
    lanes=st.sampled_from([1, 2, 4, 8]),
    window=st.integers(1, 30),
    epoch=st.integers(0, 100),
)
def test_an_epoch_has_every_sample_once_but_for_the_dropped(images, lanes, window, epoch):
    config = OrderConfig(lanes=lanes, window=window)
    start = Position(seed=SEED, epoch=epoch, step=0)
    order = SampleOrder(
        shard_samples=(5, 5, 5, 5, 5, 1), batch_size=8, lanes=lanes, window=window, seed=SEED
    )

    batches = [batch for batch, _ in take(images, 3, start, order=config)]

    seen = torch.cat([batch.labels_R for batch in batches]).tolist()
    assert sorted([*seen, *order.dropped(epoch).tolist()]) == list(range(26))


def test_no_two_epochs_are_alike(images):
    epochs = [tuple(b.labels_R.tolist()) for b, p in take(images, 90) if p.step == 1]

    assert len(epochs) == len(set(epochs)) == 30


def test_clips_and_their_views_have_their_shapes(videos):
    (batch, _) = take(videos, 1, **CLIPS)[0]
    assert batch.pixels_RTHWC.shape == (4, 4, 16, 16, 3)

    clip = ClipConfig(stride=2, views=2, crops=3)
    tested = list(open_eval(videos, frames=4, batch_size=14, clip=clip))

    assert [b.pixels_RTHWC.shape for b in tested] == [(12, 4, 16, 16, 3)] * 5
    assert all(b.samples == 2 and b.views == 6 for b in tested)
    labels = torch.cat([b.labels_R for b in tested])
    assert labels.tolist() == np.repeat(np.arange(10), 6).tolist()
    alone = list(open_eval(videos, frames=4, batch_size=1, clip=clip))
    assert [b.samples for b in alone] == [1] * 10
    together = torch.cat([b.pixels_RTHWC for b in tested])
    assert torch.equal(torch.cat([b.pixels_RTHWC for b in alone]), together)


def test_a_killed_run_goes_on_where_its_last_position_says(images, unbroken, tmp_path):
    """A process that keeps its position as training does, killed without warning."""
    kept = tmp_path / "position.json"
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(images), str(kept)],
        cwd=Path(__file__).resolve().parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    seen = [json.loads(line) for line in islice(process.stdout, 5)]
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()
    assert process.wait(20) == -signal.SIGKILL
    seen += [json.loads(line) for line in rest.splitlines() if line.endswith("]")]

    position = Position(**json.loads(kept.read_text()))
    done = position.epoch * 3 + position.step
    resumed = open_train(images).batches(position)
    after = [batch.labels_R.tolist() for batch, _ in islice(resumed, 3)]
    resumed.close()

    straight = [batch.labels_R.tolist() for batch, _ in take(images, done + 3)]
    assert seen[:done] == straight[: len(seen[:done])]
    assert done >= 4
    assert after == straight[done:]
