"""How much memory the passes of a step take, under bfloat16 autocast, and what follows from it.

Bytes are those of the tensors that live at the worst moment; the coefficients were counted on the
operations that torch makes (tests/test_memory.py compares). What the allocator rounds up and the
kernels' workspaces are not in them.
"""

from nanosophia.options import Config


def activation_bytes(config: Config) -> int:
    """Returns the bytes that the backward pass needs of one sequence.

    Per token and block, in units of n_embd: two float32 inputs of layer norms (8), their outputs
    (4), q, k, v (6) and the attention's output (2), both sides of the GELU (16), all in bfloat16
    but the first; and 4 bytes per head. Checkpointing keeps a block's float32 input and one block.
    The head: its input twice (6), logits in bfloat16 and float32, their softmax in float32; with
    `loss_chunk` these are not each sequence's.
    """
    c = config
    block = c.block_size * (36 * c.n_embd + 4 * c.n_head + 16)
    blocks = c.n_layer * 4 * c.block_size * c.n_embd + block if c.activation_checkpointing else \
        c.n_layer * block
    logits = 0 if c.loss_chunk else 2 + 4 + 4
    return blocks + c.block_size * (6 * c.n_embd + logits * c.vocab_size)


def pass_bytes(config: Config, rows: int) -> int:
    """Returns the bytes of a forward and backward pass over `rows` sequences, without gradients.

    A loss in chunks has one chunk's logits, probabilities and the gradients of both factors.
    """
    c, chunk = config, 0
    if c.loss_chunk:
        positions = min(c.loss_chunk, rows * c.block_size)
        chunk = c.vocab_size * (positions * (2 + 4 + 2) + 4 * c.n_embd)
    return activation_bytes(config) * rows + chunk


def second_pass_bytes(config: Config, rows: int) -> int:
    """Returns the bytes of a pass that is differentiated twice, without tensors per parameter.

    Per token and block 73 bytes times n_embd stay until the end. Beside them there are the head and
    one block, or the logits and what attention computes anew of one sequence: eleven matrices of
    scores in float32. With dropout, attention keeps five of them per block and sequence, and eight
    more of all the sequences of one block.
    """
    c = config
    token, scores = c.block_size * c.n_embd, 4 * c.n_head * c.block_size ** 2
    logits = c.block_size * c.vocab_size
    block, anew = 73 * token, 11 * scores
    if c.dropout:
        block, anew = 85 * token + 5 * scores, 8 * scores * rows
    head, attention = rows * (26 * logits + 80 * token), rows * 13 * logits + anew + 32 * token
    return rows * c.n_layer * block + max(head, attention)


def estimate_bytes(config: Config, parameters: int, rows: int, second_derivatives: bool) -> int:
    """Returns the bytes of a curvature estimate in micro-batches of `rows` sequences.

    Hutchinson's has four float32 tensors per parameter: the probe, the gradient, its derivative and
    the sum. The others have the gradient of a micro-batch and the sum, and with chunks the squares.
    """
    if second_derivatives:
        return 16 * parameters + second_pass_bytes(config, rows)
    return (12 if config.hessian_chunks > 1 else 8) * parameters + pass_bytes(config, rows)


def step_bytes(config: Config, parameters: int, rows: int) -> int:
    """Returns the bytes of the gradient and of the passes over micro-batches of `rows`."""
    return 4 * parameters + pass_bytes(config, rows)


def largest_estimate_rows(config: Config, parameters: int, second_derivatives: bool) -> int:
    """Returns the sequences of an estimate's largest micro-batch: batch_size, or fewer where a
    twice differentiated pass would need more memory than a training step.

    At least one. It depends neither on the device nor on the number of ranks.
    """
    rows, limit = config.batch_size, step_bytes(config, parameters, config.batch_size)
    while second_derivatives and rows > 1 and \
            estimate_bytes(config, parameters, rows, second_derivatives) > limit:
        rows -= 1
    return rows
