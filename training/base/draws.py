"""Seeds for random draws, as pure functions of a name and a key: independent of workers, ranks and restarts."""

import hashlib


def draw_seed(seed: int, name: str, *key: int | str) -> int:
    """A 63-bit seed for the draw `name` of `key` (an epoch and a clip, or a sample's position in the run).

    Hashed, not added, so that neighbouring keys give unrelated streams.
    """
    text = "/".join([str(seed), name, *map(str, key)])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
