"""What every run holds, by purpose, whatever stays resident: in the fast tier, and in RAM behind a device.

A *device* has a memory of its own, VRAM, that the host does not reach.  Without one the fast tier is RAM.
Knows nothing of budgets.
"""

from typing import Any

from subspec.memory.streamer import REQUEST_BYTES, STAGING_BUFFERS, THREADS
from subspec.memory.tiers import MIB, page_aligned
from subspec.models.config import ModelConfig
from subspec.models.kv_cache import cache_bytes
from subspec.planning.cost import Images
from subspec.speculation.calibration import CANDIDATES
from subspec.speculation.draft import TreeShape
from subspec.speculation.preview import PREVIEW_ROWS
from subspec.speculation.sampling import NOISY_POSITIONS
from subspec.store.layout import head_chunks, layer_bytes, layer_matrices
from subspec.substitute.layout import tile_bytes

EMBEDDING_CACHE_BYTES = 8 * MIB
NOISE_BYTES = 4  # a position's noise on a device, per vocabulary entry
UNIFORM_BYTES = 8  # what it is made from, on the CPU
SAMPLING_BYTES = 48  # temporaries of one row's filters, per vocabulary entry
STAGING_BYTES = (
    STAGING_BUFFERS * THREADS * REQUEST_BYTES
)  # each reader fills one buffer while its other one is copied
INDEX_BYTES = 8
ROW_INDICES = 5  # a row's token, position, slot, prefix length and path length; its path comes on top
THIRD_SLOT_SHARE = 0.05


def tree_slots(tree: TreeShape, *, device: bool) -> int:
    """Slots of the KV cache for a tree: its nodes and, on a device, a shadow for each node of a draft pass.

    Without a device shadows take what the nodes leave, there every slot is as good as another; and rows of
    the sweep that are previewed come last.
    """
    return tree.drafted + (tree.width if device else PREVIEW_ROWS)


def cache_rows(config: ModelConfig, itemsize: int) -> int:
    """Embedding rows that the cache holds where the table is on disk."""
    return min(max(EMBEDDING_CACHE_BYTES // (config.hidden_size * itemsize), 16), config.vocab_size)


def fast_parts(
    config: ModelConfig,
    itemsize: int,
    small_bytes: int,
    wishes: dict[str, Any],
    images: Images,
    *,
    device: bool,
) -> dict[str, int]:
    """What every run holds in the fast tier, in bytes.

    Args:
        config: the model.
        itemsize: bytes of an exact weight.
        small_bytes: norms, biases and checksums.
        wishes: a request, filled in.
        images: the store's units.
        device: whether that tier is a device's memory; the embedding is in RAM then, and one rebuilt weight
            takes memory of its own.
    """
    tree = _tree(wishes)
    substitutes = config.layers * page_aligned(layer_bytes(config, itemsize)[1])
    parts = {
        "substitutes": substitutes + page_aligned(tile_bytes(config.vocab_size, config.hidden_size)),
        "norms_biases": small_bytes,
        "kv_cache": page_aligned(
            cache_bytes(config, wishes["context"] + tree_slots(tree, device=device), itemsize)
        ),
        "embedding_cache": page_aligned(cache_rows(config, itemsize) * config.hidden_size * itemsize),
        "workspace": _workspace(config, itemsize, wishes, tree, device=device) + images.scratch,
    }
    if device:
        parts["embedding_cache"] = 0
        parts["workspace"] -= images.scratch
        parts["scratch"] = page_aligned(largest_matrix(config, itemsize)) if images.rebuilt else 0
    return parts


def host_parts(config: ModelConfig, itemsize: int, wishes: dict[str, Any]) -> dict[str, int]:
    """What every run behind a device pins in RAM beside staging buffers and images, in bytes.

    ``embedding`` is the exact table, whole: the device gathers its rows over the bus.  ``uploads`` is what
    the host prepares for the device: descriptions of a prompt's rows, or of a tree with its paths and
    guesses, twice, since the next one is described while the last one's copy may be under way, and as often a
    row of noise or penalties.  ``results`` is what it hears from it: the logits of the nodes that a sweep
    verifies, and of every node the guesses that it looks at, twice alike.
    """
    tree, vocabulary = _tree(wishes), config.vocab_size
    of_node = ROW_INDICES + 2 * CANDIDATES + tree.depth + 1  # as a tree that survives is planted
    described = wishes["context"] * INDEX_BYTES + tree.drafted * of_node * INDEX_BYTES
    guesses = tree_slots(tree, device=True) * (2 * CANDIDATES + ROW_INDICES) * INDEX_BYTES
    logits = tree.verified * vocabulary * itemsize
    return {
        "embedding": page_aligned(vocabulary * config.hidden_size * itemsize),
        "uploads": page_aligned(2 * (described + vocabulary * NOISE_BYTES)),
        "results": page_aligned(2 * (guesses + logits)),
    }


def slot_count(parts: dict[str, int], slot_bytes: int, *, device: bool) -> int:
    """How many slots a sweep streams through, if it streams: two, or three on a device where that is cheap.

    A third slot evens out units from RAM and from disk.  It is cheap below 5 % of what every run holds: a
    measure that does not depend on the budget, so that more memory never trades a resident layer for a slot.
    """
    return 3 if device and slot_bytes < THIRD_SLOT_SHARE * sum(parts.values()) else 2


def largest_matrix(config: ModelConfig, itemsize: int) -> int:
    """Bytes of the largest exact matrix of a layer, or of a chunk of the output head."""
    sizes = [matrix.n * matrix.k for matrix in layer_matrices(config)]
    sizes += [(chunk.stop - chunk.start) * config.hidden_size for chunk in head_chunks(config, itemsize)]
    return max(sizes) * itemsize


def _tree(wishes: dict[str, Any]) -> TreeShape:
    """The tree of a request that was filled in."""
    return TreeShape(wishes["depth"], wishes["width"], wishes["nodes"])


def _workspace(
    config: ModelConfig, itemsize: int, wishes: dict[str, Any], tree: TreeShape, *, device: bool
) -> int:
    """Largest sum of temporaries: activations of a chunk, logits, noise, rotary tables.

    Beside a sweep's logits there are those of a draft pass or, without a device, of a preview.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = (config.heads + 2 * config.kv_heads) * config.head_dim
    rows = max(wishes["prefill_rows"], tree.verified)
    activations = rows * (4 * hidden + 2 * attention + 3 * inner) * itemsize
    prompt = wishes["context"] * (hidden * itemsize + 64)
    drafted = 2 * tree.width if device else max(2 * tree.width, PREVIEW_ROWS)
    logits = (tree.verified + drafted) * config.vocab_size * itemsize
    positions = tree.depth + 1
    noise = positions * NOISE_BYTES if device else min(positions, NOISY_POSITIONS) * UNIFORM_BYTES
    sampling = config.vocab_size * (noise + SAMPLING_BYTES)
    tables = (wishes["context"] + tree.drafted) * config.head_dim * 4
    return int(activations + prompt + logits + sampling + tables)
