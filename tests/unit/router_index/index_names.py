"""Names of made-up sequences for the index tests."""

from kelp.core.hashing import seed_hash, sequence_hashes


def names(count, salt=""):
    """A sequence of its own per salt."""
    return tuple(sequence_hashes(range(count), 1, seed_hash("m", "", salt)))


def depths(matches):
    """Device blocks by slot."""
    return dict(zip(matches.slots.tolist(), matches.blocks[:, 0].tolist(), strict=True))


def rows(matches):
    """Blocks of all tiers and predicted blocks by slot."""
    columns = zip(matches.slots.tolist(), matches.blocks.tolist(), matches.predicted.tolist(), strict=True)
    return {slot: (*blocks, predicted) for slot, blocks, predicted in columns}
