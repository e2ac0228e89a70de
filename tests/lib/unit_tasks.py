"""Functions of units that worker processes import, and raw data for builds with many units."""

import json
import os
import random

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrstz"]


def die_once(argument):
    """Kill the own process with a signal at the first attempt, or at every one without a file for the attempts."""
    path, number = argument
    attempt = 1
    if path is not None:
        with path.open("ab") as file:
            file.write(b"x")
        attempt = path.stat().st_size
    if number and (path is None or attempt == 1):
        os.kill(os.getpid(), number)
    return {"samples": 1, "attempt": attempt}


def documents(folder, count, seed=0):
    """Write texts of 60 words, of which some are copies of earlier ones, or copies with a few other words."""
    chance = random.Random(seed)
    folder.mkdir(parents=True)
    texts = []
    with (folder / "samples.jsonl").open("w") as file:
        for number in range(count):
            words = chance.choices(WORDS, k=60)
            if texts and number % 10 < 2:
                words = list(chance.choice(texts))
                if number % 10:
                    words[chance.randrange(60)] = "other"
            texts.append(words)
            file.write(json.dumps({"text": " ".join(words), "key": f"{chance.getrandbits(48):012x}"}) + "\n")
    return folder
