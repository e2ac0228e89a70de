"""Takes a batch of a VideoStream for each input line; prints "number digest" of its clips, then "state n".

Arguments: folder of video shards, decoder, batch size, workers, consumed.
"""

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from megamm.media.video_stream import Clip, VideoStream
from megamm.shards.folder import ShardFolder

SIZES = SimpleNamespace(image_size=48, frame_rate=7.0, max_frames=9, frames_per_step=4)


def digests(batch):
    return [(clip.number, hashlib.sha256(clip.frames.tobytes()).hexdigest()) for clip in batch]


def main():
    folder, decoder, batch_size, workers, consumed = sys.argv[1:]
    shards = ShardFolder(Path(folder))
    clips = [Clip(shards, i) for i in range(len(shards))]
    counts = {"batch_size": int(batch_size), "workers": int(workers), "consumed": int(consumed)}
    stream = VideoStream(clips, SIZES, decoder, torch.device("cpu"), **counts)
    for batch in stream:
        if not sys.stdin.readline():
            return
        for number, digest in digests(batch):
            print(number, digest)
        print("state", stream.state(), flush=True)


if __name__ == "__main__":
    main()
