"""The program that every thread of a CPU decode step runs, compiled by numba.

One OpenMP team, torch's own, runs it: phases are split over threads by rows, or by (stream, KV head, part of the
window), and end at a barrier. Activations are float32 [feature, lane], one lane a stream. What is small (norms,
merging) every thread repeats for itself, which is cheaper than a barrier.

Symbols ending in `_address` are addresses; an `exemplar` carries an element type (see `_vector_code`).
"""

import math

import numpy as np
from numba import carray, njit, types
from numba.np.unsafe.ndarray import to_fixed_tuple

from eunoe_kernels._vector_code import (
    add_weighted_slots,
    atomic_add,
    atomic_load,
    float_from_bits,
    item_bytes,
    multiply_tile,
    narrow,
    pointer_to,
    prefetch,
    score_slots,
    widen,
)

# Places in the block of int64 that a step is called with.
SIZES = (
    "num_layers", "dim", "num_query_heads", "num_kv_heads", "head_dim", "ffn_dim", "vocab_size", "num_streams",
    "num_lanes", "num_parts", "weights", "streams", "norm_eps", "cosines", "hidden", "qkv", "parts", "activation",
    "private", "private_bytes", "logits", "arrivals",
)  # fmt: skip
CHUNK_SLOTS = 256
"""Slots whose scores a thread holds at a time."""
HEAD_LANES = 3
"""Most query heads that share one pass over a KV head's slots: their sums fill 16 registers of 8 floats."""

_jit = njit(fastmath={"reassoc", "contract", "arcp", "nsz"}, error_model="numpy", boundscheck=False)
MAX_POLLS = 5000
"""Looks at a barrier, about 1 ns each, before a waiting thread offers its core to others."""

_F32 = np.float32(0)
_I64 = np.int64(0)
_yield = types.ExternalFunction("sched_yield", types.int32())
_thread_index = types.ExternalFunction("omp_get_thread_num", types.int32())
_team_size = types.ExternalFunction("omp_get_num_threads", types.int32())


@_jit
def _floats(address, count):
    return carray(pointer_to(address, _F32), count)


@_jit
def _exp2(x):
    """2^x for x <= 126, within 2e-7 of its value; branch-free, so loops over it vectorize."""
    x = max(x, np.float32(-126.0))
    whole = np.floor(x + np.float32(0.5))
    f = x - whole
    p = np.float32(1.535336188319500e-4)
    p = p * f + np.float32(1.339887440266574e-3)
    p = p * f + np.float32(9.618437357674640e-3)
    p = p * f + np.float32(5.550332471162809e-2)
    p = p * f + np.float32(2.402264791363012e-1)
    p = p * f + np.float32(6.931472028550421e-1)
    p = p * f + np.float32(1.0)
    return p * float_from_bits((np.int32(whole) + np.int32(127)) << np.int32(23))


@_jit
def _wait_for_team(arrivals_address, num_arrivals):
    """Barrier: count this thread in and wait for the rest. Returns the arrivals that end the next one.

    OpenMP's own barrier spins for milliseconds: on a busy machine it holds the core that the missing thread needs.
    """
    atomic_add(arrivals_address, 1)
    num_polls = 0
    while atomic_load(arrivals_address) < num_arrivals:
        num_polls += 1
        if num_polls > MAX_POLLS:
            _yield()
    return num_arrivals + np.int64(_team_size())


@_jit
def _share(count, thread, num_threads):
    """The part of range(count) that is a thread's own."""
    return count * thread // num_threads, count * (thread + 1) // num_threads


@_jit
def _multiply(weights_address, first, stop, inner, inputs_address, num_lanes, outputs_address, exemplar):
    """outputs[row - first, lane] = sum_k weights[row, k] inputs[k, lane] for the rows first to stop."""
    row_bytes = inner * item_bytes(exemplar)
    if num_lanes == 1:
        x, y = _floats(inputs_address, inner), _floats(outputs_address, stop - first)
        ahead_bytes = max(2048, 2 * row_bytes)
        for row in range(first, stop):
            address = weights_address + row * row_bytes
            # The hardware's prefetchers alone reach 80% of the memory's bandwidth here.
            for offset in range(0, row_bytes, 64):
                prefetch(address + ahead_bytes + offset)
            w = carray(pointer_to(address, exemplar), inner)
            total = _F32
            for k in range(inner):
                total += widen(w[k]) * x[k]
            y[row - first] = total
        return
    # Eight sums in flight hide the latency of a multiply-add; more would not fit in 16 registers.
    height = 4 if num_lanes == 16 else 8
    row = first
    while row < stop:
        if stop - row < height and stop - first >= height:
            row = stop - height  # the last tile overlaps the one before
        address = weights_address + row * row_bytes
        place = outputs_address + (row - first) * num_lanes * 4
        if stop - row < height:
            for _ in range(row, stop):
                _multiply_row(address, inner, inputs_address, place, exemplar, num_lanes)
                address += row_bytes
                place += num_lanes * 4
            return
        if num_lanes == 16:
            multiply_tile(address, inner, inputs_address, place, exemplar, 4, 16)
        elif num_lanes == 8:
            multiply_tile(address, inner, inputs_address, place, exemplar, 8, 8)
        else:
            multiply_tile(address, inner, inputs_address, place, exemplar, 8, 4)
        row += height


@_jit
def _multiply_row(address, inner, inputs_address, place, exemplar, num_lanes):
    if num_lanes == 16:
        multiply_tile(address, inner, inputs_address, place, exemplar, 1, 16)
    elif num_lanes == 8:
        multiply_tile(address, inner, inputs_address, place, exemplar, 1, 8)
    else:
        multiply_tile(address, inner, inputs_address, place, exemplar, 1, 4)


@_jit
def _normalize(hidden_address, weight_address, dim, num_lanes, norm_eps, normed_address, scratch):
    """RMSNorm of each lane."""
    hidden = _floats(hidden_address, dim * num_lanes)
    weight = _floats(weight_address, dim)
    normed = _floats(normed_address, dim * num_lanes)
    if num_lanes == 1:
        total = _F32
        for i in range(dim):
            total += hidden[i] * hidden[i]
        scale = np.float32(1) / np.sqrt(total / np.float32(dim) + norm_eps)
        for i in range(dim):
            normed[i] = hidden[i] * scale * weight[i]
        return
    scales = _floats(scratch, num_lanes)
    for lane in range(num_lanes):
        scales[lane] = _F32
    for i in range(dim):
        for lane in range(num_lanes):
            scales[lane] += hidden[i * num_lanes + lane] * hidden[i * num_lanes + lane]
    for lane in range(num_lanes):
        scales[lane] = np.float32(1) / np.sqrt(scales[lane] / np.float32(dim) + norm_eps)
    for i in range(dim):
        for lane in range(num_lanes):
            normed[i * num_lanes + lane] = hidden[i * num_lanes + lane] * scales[lane] * weight[i]


@_jit
def _add_product(weights_address, thread, num_threads, num_rows, inner, inputs_address, lanes, hidden_address, scratch,
                 exemplar):  # fmt: skip
    """hidden += weights @ inputs, this thread's rows."""
    first, stop = _share(num_rows, thread, num_threads)
    _multiply(weights_address, first, stop, inner, inputs_address, lanes, scratch, exemplar)
    hidden = _floats(hidden_address + first * lanes * 4, (stop - first) * lanes)
    product = _floats(scratch, (stop - first) * lanes)
    for i in range((stop - first) * lanes):
        hidden[i] += product[i]


@_jit
def _write_slot(keys_address, rotated_address, values_address, qkv, key_row, value_row, lane, lanes, cosines, sines,
                head_dim, exemplar):  # fmt: skip
    """Store the new token's key, rotated key and value. The stored key is rotated, as a rebuild would."""
    half = head_dim // 2
    keys = carray(pointer_to(keys_address, exemplar), head_dim)
    rotated = carray(pointer_to(rotated_address, exemplar), head_dim)
    values = carray(pointer_to(values_address, exemplar), head_dim)
    for i in range(head_dim):
        keys[i] = narrow(qkv[(key_row + i) * lanes + lane], exemplar)
        values[i] = narrow(qkv[(value_row + i) * lanes + lane], exemplar)
    for i in range(half):
        a, b = widen(keys[i]), widen(keys[half + i])
        rotated[i] = narrow(a * cosines[i] - b * sines[i], exemplar)
        rotated[half + i] = narrow(b * cosines[i] + a * sines[i], exemplar)


@_jit
def _score(keys_address, values_address, count, head_dim, query_address, scores_address, num_heads, exemplar):
    """Scores [head, slot] of `count` slots, rows CHUNK_SLOTS apart."""
    slot_bytes, stride = head_dim * item_bytes(exemplar), np.int64(4 * CHUNK_SLOTS)
    slot = 0
    while slot < count:
        if count >= 4:
            slot = min(slot, count - 4)  # the last four overlap those before
            # The values of this chunk and the keys of the next are wanted soon.
            for offset in range(slot * slot_bytes, (slot + 4) * slot_bytes, 64):
                prefetch(values_address + offset)
                prefetch(keys_address + CHUNK_SLOTS * slot_bytes + offset)
            address, place = keys_address + slot * slot_bytes, scores_address + 4 * slot
            if num_heads == 3:
                score_slots(address, head_dim, query_address, place, stride, exemplar, 3, 4)
            elif num_heads == 2:
                score_slots(address, head_dim, query_address, place, stride, exemplar, 2, 4)
            else:
                score_slots(address, head_dim, query_address, place, stride, exemplar, 1, 4)
            slot += 4
        else:
            for head in range(num_heads):
                score_slots(keys_address + slot * slot_bytes, head_dim, query_address + head * head_dim * 4,
                            scores_address + 4 * slot + head * stride, stride, exemplar, 1, 1)  # fmt: skip
            slot += 1


@_jit
def _add_values(scores_address, values_address, count, head_dim, sums_address, num_heads, exemplar):
    """sums [head, head_dim] += scores [head, slot] @ values."""
    stride = np.int64(4 * CHUNK_SLOTS)
    for i in range(0, head_dim, 16):
        values, sums = values_address + i * item_bytes(exemplar), sums_address + 4 * i
        if num_heads == 3:
            if head_dim % 32 != 0:
                add_weighted_slots(scores_address, stride, values, head_dim, count, sums, exemplar, 3, 16)
            elif i % 32 == 0:
                add_weighted_slots(scores_address, stride, values, head_dim, count, sums, exemplar, 3, 32)
        elif num_heads == 2:
            add_weighted_slots(scores_address, stride, values, head_dim, count, sums, exemplar, 2, 16)
        else:
            add_weighted_slots(scores_address, stride, values, head_dim, count, sums, exemplar, 1, 16)


@_jit
def _attend_slots(keys_address, values_address, count, head_dim, query_address, scores_address, num_heads, result,
                  exemplar):  # fmt: skip
    """Online softmax over slots, in base 2. A row of `result` is a head's sums, its largest score and its total."""
    scores = carray(pointer_to(scores_address, _F32), (HEAD_LANES, CHUNK_SLOTS))
    sums_address = scores_address + 4 * HEAD_LANES * CHUNK_SLOTS
    sums = carray(pointer_to(sums_address, _F32), (HEAD_LANES, head_dim))
    slot_bytes = head_dim * item_bytes(exemplar)
    for head in range(num_heads):
        result[head, head_dim], result[head, head_dim + 1] = np.float32(-np.inf), _F32
        for i in range(head_dim):
            sums[head, i] = _F32
    for start in range(0, count, CHUNK_SLOTS):
        num_slots = min(CHUNK_SLOTS, count - start)
        keys, values = keys_address + start * slot_bytes, values_address + start * slot_bytes
        _score(keys, values, num_slots, head_dim, query_address, scores_address, num_heads, exemplar)
        for head in range(num_heads):
            row, previous = scores[head], result[head, head_dim]
            largest = previous
            for s in range(num_slots):
                largest = max(largest, row[s])
            total = _F32
            for s in range(num_slots):
                row[s] = _exp2(row[s] - largest)
                total += row[s]
            decay = _exp2(previous - largest)
            result[head, head_dim] = largest
            result[head, head_dim + 1] = result[head, head_dim + 1] * decay + total
            for i in range(head_dim):
                sums[head, i] *= decay
        _add_values(scores_address, values, num_slots, head_dim, sums_address, num_heads, exemplar)
    for head in range(num_heads):
        for i in range(head_dim):
            result[head, i] = sums[head, i]


@_jit
def _attend(layer, sizes, thread, num_threads, scratch, exemplar):
    """Attention of this thread's (stream, KV head, part of the window) tasks; writes the new slot on the way."""
    (_, _, num_query_heads, num_kv_heads, head_dim, _, _, num_streams, lanes, num_parts, _, streams_address, _,
     cosines_address, _, qkv_address, parts_address, _, _, _, _, _) = sizes  # fmt: skip
    group, half = num_query_heads // num_kv_heads, head_dim // 2
    qkv = _floats(qkv_address, (num_query_heads + 2 * num_kv_heads) * head_dim * lanes)
    streams = carray(pointer_to(streams_address, _I64), (num_streams, 5))
    cosine_rows = carray(pointer_to(cosines_address, _F32), (2, num_streams, half))
    parts = carray(pointer_to(parts_address, _F32), (num_streams, num_query_heads, num_parts, head_dim + 2))
    query = carray(pointer_to(scratch, _F32), (HEAD_LANES, head_dim))
    results = carray(pointer_to(scratch + 4 * HEAD_LANES * head_dim, _F32), (HEAD_LANES, head_dim + 2))
    scores_address = scratch + 4 * HEAD_LANES * (2 * head_dim + 2)
    scale = np.float32(math.log2(math.e) / math.sqrt(head_dim))

    first_task, stop_task = _share(num_streams * num_kv_heads * num_parts, thread, num_threads)
    for task in range(first_task, stop_task):
        part, pair = task % num_parts, task // num_parts
        stream, head = pair // num_kv_heads, pair % num_kv_heads
        num_slots = streams[stream, 4]
        cosines, sines = cosine_rows[0, stream], cosine_rows[1, stream]
        slab = (layer * num_kv_heads + head) * streams[stream, 3] * head_dim * item_bytes(exemplar)
        new_slot = slab + num_slots * head_dim * item_bytes(exemplar)
        first, stop = _share(num_slots + 1, part, num_parts)
        if stop == num_slots + 1:
            key_row = (num_query_heads + head) * head_dim
            _write_slot(streams[stream, 0] + new_slot, streams[stream, 1] + new_slot, streams[stream, 2] + new_slot,
                        qkv, key_row, key_row + num_kv_heads * head_dim, stream, lanes, cosines, sines, head_dim,
                        exemplar)  # fmt: skip
        keys, values = streams[stream, 1] + slab, streams[stream, 2] + slab
        first_slot = first * head_dim * item_bytes(exemplar)
        # Three at a time; a rest of four goes as two and two.
        first_head = 0
        while first_head < group:
            rest = group - first_head
            num_heads = 2 if rest == 4 else min(HEAD_LANES, rest)
            for lane in range(num_heads):
                row = (head * group + first_head + lane) * head_dim
                for i in range(half):
                    a = qkv[(row + i) * lanes + stream] * scale
                    b = qkv[(row + half + i) * lanes + stream] * scale
                    query[lane, i] = a * cosines[i] - b * sines[i]
                    query[lane, half + i] = b * cosines[i] + a * sines[i]
            _attend_slots(keys + first_slot, values + first_slot, stop - first, head_dim, scratch, scores_address,
                          num_heads, results, exemplar)  # fmt: skip
            first_of_group = head * group + first_head
            for lane in range(num_heads):
                for i in range(head_dim + 2):
                    parts[stream, first_of_group + lane, part, i] = results[lane, i]
            first_head += num_heads


@_jit
def _merge_parts(sizes, attended_address):
    """The parts' sums as attention outputs [query head and dim, lane]."""
    num_query_heads, head_dim, num_streams, lanes, num_parts = sizes[2], sizes[4], sizes[7], sizes[8], sizes[9]
    parts = carray(pointer_to(sizes[16], _F32), (num_streams, num_query_heads, num_parts, head_dim + 2))
    attended = _floats(attended_address, num_query_heads * head_dim * lanes)
    for stream in range(num_streams):
        for head in range(num_query_heads):
            largest = np.float32(-np.inf)
            for part in range(num_parts):
                largest = max(largest, parts[stream, head, part, head_dim])
            total = _F32
            for part in range(num_parts):
                total += _exp2(parts[stream, head, part, head_dim] - largest) * parts[stream, head, part, head_dim + 1]
            for part in range(num_parts):
                weight = _exp2(parts[stream, head, part, head_dim] - largest) / total
                for i in range(head_dim):
                    place = (head * head_dim + i) * lanes + stream
                    previous = attended[place] if part else _F32
                    attended[place] = previous + weight * parts[stream, head, part, i]


@_jit
def _gate(gate_address, up_address, count, out_address):
    """out = SiLU(gate) * up"""
    gate, up, out = _floats(gate_address, count), _floats(up_address, count), _floats(out_address, count)
    for i in range(count):
        exponential = _exp2(min(gate[i] * np.float32(-math.log2(math.e)), np.float32(126)))
        out[i] = gate[i] / (np.float32(1) + exponential) * up[i]


@_jit
def decode_program(arguments, weight_exemplar, kv_exemplar):
    """One thread's part of a step; see `SIZES` for the arguments."""
    sizes = to_fixed_tuple(carray(arguments, 22), 22)
    (num_layers, dim, num_query_heads, num_kv_heads, head_dim, ffn_dim, vocab_size, num_streams, lanes, _,
     weights_address, _, norm_eps_address, _, hidden, qkv, _, activation, private, private_bytes, logits_address,
     arrivals) = sizes  # fmt: skip
    thread, num_threads = np.int64(_thread_index()), np.int64(_team_size())
    num_arrivals = num_threads
    matrices = carray(pointer_to(weights_address, _I64), num_layers * 6 + 2)
    norm_eps = _floats(norm_eps_address, 1)[0]
    normed = private + thread * private_bytes
    scratch = normed + max(dim, num_query_heads * head_dim) * lanes * 4
    query_dim = num_query_heads * head_dim
    qkv_first, qkv_stop = _share(query_dim + 2 * num_kv_heads * head_dim, thread, num_threads)
    ffn_first, ffn_stop = _share(ffn_dim, thread, num_threads)
    ffn_bytes = (ffn_stop - ffn_first) * lanes * 4

    for layer in range(num_layers):
        base = layer * 6
        _normalize(hidden, matrices[base], dim, lanes, norm_eps, normed, scratch)
        _multiply(matrices[base + 1], qkv_first, qkv_stop, dim, normed, lanes, qkv + qkv_first * lanes * 4,
                  weight_exemplar)  # fmt: skip
        num_arrivals = _wait_for_team(arrivals, num_arrivals)
        _attend(layer, sizes, thread, num_threads, scratch, kv_exemplar)
        num_arrivals = _wait_for_team(arrivals, num_arrivals)
        _merge_parts(sizes, normed)
        _add_product(matrices[base + 2], thread, num_threads, dim, query_dim, normed, lanes, hidden, scratch,
                     weight_exemplar)  # fmt: skip
        num_arrivals = _wait_for_team(arrivals, num_arrivals)
        _normalize(hidden, matrices[base + 3], dim, lanes, norm_eps, normed, scratch)
        gate_up = matrices[base + 4]
        _multiply(gate_up, ffn_first, ffn_stop, dim, normed, lanes, scratch, weight_exemplar)
        up = gate_up + ffn_dim * dim * item_bytes(weight_exemplar)
        _multiply(up, ffn_first, ffn_stop, dim, normed, lanes, scratch + ffn_bytes, weight_exemplar)
        _gate(scratch, scratch + ffn_bytes, ffn_bytes // 4, activation + ffn_first * lanes * 4)
        num_arrivals = _wait_for_team(arrivals, num_arrivals)
        _add_product(matrices[base + 5], thread, num_threads, dim, ffn_dim, activation, lanes, hidden, scratch,
                     weight_exemplar)  # fmt: skip
        num_arrivals = _wait_for_team(arrivals, num_arrivals)
    _normalize(hidden, matrices[num_layers * 6], dim, lanes, norm_eps, normed, scratch)
    logits = carray(pointer_to(logits_address, _F32), (num_streams, vocab_size))
    first, stop = _share(vocab_size, thread, num_threads)
    for row in range(first, stop, 96):
        count = min(96, stop - row)
        _multiply(matrices[num_layers * 6 + 1], row, row + count, dim, normed, lanes, scratch, weight_exemplar)
        product = _floats(scratch, count * lanes)
        for stream in range(num_streams):
            for i in range(count):
                logits[stream, row + i] = product[i * lanes + stream]
