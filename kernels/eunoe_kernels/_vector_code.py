"""LLVM vector code for the CPU decode path: the loops that numba's own vectorizer does not keep in registers.

numba compiles these with the LLVM it carries, so the user's machine needs no compiler. Vectors are written at the
width of the algorithm (8 or 16 float32 lanes); LLVM maps them to what the processor has (one AVX-512 register, two of
AVX2, four of NEON). bfloat16 arrives as uint16 and is widened in registers: its bits are the upper half of a float32.

Addresses are integers. `exemplar` is a value whose type, uint16 or float32, is the element type behind an address.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _splat(builder: Any, scalar: Any, lanes: int) -> Any:
    vector = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _fused_multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(a.type, [a.type] * 3)
    function = builder.module.declare_intrinsic(f"llvm.fma.v{a.type.count}f32", (), kind)
    return builder.call(function, [a, b, c])


def _load(builder: Any, address: Any, offset_bytes: Any, element: Any) -> Any:
    pointer = builder.inttoptr(builder.add(address, offset_bytes), element.as_pointer())
    return builder.load(pointer, align=2 if element == ir.VectorType(_I16, 8) else 4)


def _store(builder: Any, value: Any, address: Any, offset_bytes: int) -> None:
    pointer = builder.inttoptr(builder.add(address, _I64(offset_bytes)), value.type.as_pointer())
    builder.store(value, pointer, align=4)


def _prefetch(builder: Any, address: Any) -> None:
    pointer = builder.inttoptr(address, _I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
    builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])


def _load_wide(builder: Any, address: Any, index: Any, is_bf16: bool) -> Any:
    """Eight elements from `index` on, as float32."""
    if not is_bf16:
        return _load(builder, address, builder.mul(index, _I64(4)), ir.VectorType(_F32, 8))
    words = ir.VectorType(_I32, 8)
    wide = builder.zext(_load(builder, address, builder.mul(index, _I64(2)), ir.VectorType(_I16, 8)), words)
    return builder.bitcast(builder.shl(wide, ir.Constant(words, [16] * 8)), ir.VectorType(_F32, 8))


def _pick(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(places)), places))


def _add_halves(builder: Any, vector: Any) -> Any:
    """Eight floats as four: the lower half plus the upper."""
    return builder.fadd(_pick(builder, vector, vector, [0, 1, 2, 3]), _pick(builder, vector, vector, [4, 5, 6, 7]))


def _add_neighbours(builder: Any, a: Any, b: Any) -> Any:
    """Four floats: a0 + a1, a2 + a3, b0 + b1, b2 + b3."""
    return builder.fadd(_pick(builder, a, b, [0, 2, 4, 6]), _pick(builder, a, b, [1, 3, 5, 7]))


def _loop(builder: Any, stop: Any, step: int, start_values: list[Any], body: Any) -> list[Any]:
    """Emits `for index in range(0, stop, step)` over values kept in registers; `body(index, values) -> values`."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_I64)
    values = [builder.phi(value.type) for value in start_values]
    index.add_incoming(_I64(0), before)
    for phi, value in zip(values, start_values, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
    builder.position_at_end(inside)
    new_values = body(index, list(values))
    index.add_incoming(builder.add(index, _I64(step)), builder.block)
    for phi, value in zip(values, new_values, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


@intrinsic(prefer_literal=True)
def multiply_tile(
    typingctx: Any, rows: Any, inner: Any, inputs: Any, outputs: Any, exemplar: Any, num_rows: Any, num_lanes: Any
) -> Any:
    """outputs[r, lane] = sum_k rows[r, k] * inputs[k, lane] for `num_rows` rows of `inner` (even) contiguous elements.

    Every element is read once and used for all lanes (4, 8 or 16). A row's result does not depend on its tile.
    """
    height, lanes, is_bf16 = num_rows.literal_value, num_lanes.literal_value, exemplar == types.uint16
    item = 2 if is_bf16 else 4
    # Elements come in pairs (k, k + 1). With 4 lanes both halves of a vector of 8 work, one on each of the pair.
    width = max(lanes, 8)
    vector, halves = ir.VectorType(_F32, width), ir.VectorType(_I16, 2 * width)

    def spread(builder: Any, pair: Any, picks: list[int]) -> Any:
        """The pair's elements `picks`, one a lane; a bfloat16 becomes the upper half of its lane."""
        if not is_bf16:
            return builder.shuffle_vector(pair, pair, ir.Constant(ir.VectorType(_I32, width), picks))
        shorts = builder.bitcast(_splat(builder, pair, width), halves)
        zeros = ir.Constant(halves, [0] * 2 * width)
        mask = [j for lane, pick in enumerate(picks) for j in (2 * width, 2 * lane + pick)]
        upper = builder.shuffle_vector(shorts, zeros, ir.Constant(ir.VectorType(_I32, 2 * width), mask))
        return builder.bitcast(upper, vector)

    picks = [[0] * 4 + [1] * 4] if lanes == 4 else [[0] * width, [1] * width]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, stop, inputs_address, outputs_address = args[:4]
        row_bytes = builder.mul(stop, _I64(item))
        row_addresses = [row]
        for _ in range(height - 1):
            row_addresses.append(builder.add(row_addresses[-1], row_bytes))

        def body(index: Any, sums: list[Any]) -> list[Any]:
            first_input = builder.add(inputs_address, builder.mul(index, _I64(4 * lanes)))
            x = [_load(builder, first_input, _I64(4 * width * j), vector) for j in range(len(picks))]
            # A little at a time: asked for at once, the next tile's lines would block the loads of this one.
            ahead = builder.mul(builder.add(index, stop), _I64(item * height))
            _prefetch(builder, builder.add(row, ahead))
            for r, address in enumerate(row_addresses):
                kind = _I32 if is_bf16 else ir.VectorType(_F32, 2)
                pair = _load(builder, address, builder.mul(index, _I64(item)), kind)
                for j, pick in enumerate(picks):
                    sums[r] = _fused_multiply_add(builder, spread(builder, pair, pick), x[j], sums[r])
            return sums

        zero = ir.Constant(vector, [0.0] * width)
        for r, total in enumerate(_loop(builder, stop, 2, [zero] * height, body)):
            if lanes == 4:
                total = _add_halves(builder, total)
            _store(builder, total, outputs_address, 4 * lanes * r)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4, exemplar, num_rows, num_lanes), codegen


@intrinsic(prefer_literal=True)
def score_slots(
    typingctx: Any, slots: Any, head_dim: Any, queries: Any, scores: Any, score_stride: Any, exemplar: Any,
    num_heads: Any, num_slots: Any,
) -> Any:  # fmt: skip
    """scores[h, s] = sum_d queries[h, d] * slots[s, d] for 1 to 3 heads and 1 or 4 slots; head_dim in multiples of 8.

    Queries are float32, rows `head_dim` apart; rows of scores are `score_stride` bytes apart.
    """
    heads, count, is_bf16 = num_heads.literal_value, num_slots.literal_value, exemplar == types.uint16
    vector = ir.VectorType(_F32, 8)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        slots_address, stop, queries_address, scores_address, stride = args[:5]
        slot_bytes = builder.mul(stop, _I64(2 if is_bf16 else 4))
        slot_addresses, query_addresses = [slots_address], [queries_address]
        for _ in range(count - 1):
            slot_addresses.append(builder.add(slot_addresses[-1], slot_bytes))
        for _ in range(heads - 1):
            query_addresses.append(builder.add(query_addresses[-1], builder.mul(stop, _I64(4))))

        def body(index: Any, sums: list[Any]) -> list[Any]:
            query = [_load(builder, address, builder.mul(index, _I64(4)), vector) for address in query_addresses]
            for s, address in enumerate(slot_addresses):
                key = _load_wide(builder, address, index, is_bf16)
                for h in range(heads):
                    sums[h * count + s] = _fused_multiply_add(builder, key, query[h], sums[h * count + s])
            return sums

        zero = ir.Constant(vector, [0.0] * 8)
        sums = _loop(builder, stop, 8, [zero] * (heads * count), body)
        for h in range(heads):
            # Pairs of vectors are added by neighbours until one vector holds every slot's sum.
            layer = [_add_halves(builder, total) for total in sums[h * count : (h + 1) * count]]
            while len(layer) > 1:
                layer = [_add_neighbours(builder, a, b) for a, b in zip(layer[::2], layer[1::2], strict=True)]
            if count == 1:
                layer = [_add_neighbours(builder, _add_neighbours(builder, layer[0], layer[0]), layer[0])]
                layer = [builder.extract_element(layer[0], _I32(0))]
            _store(builder, layer[0], builder.add(scores_address, builder.mul(stride, _I64(h))), 0)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5, exemplar, num_heads, num_slots), codegen


@intrinsic(prefer_literal=True)
def add_weighted_slots(
    typingctx: Any, weights: Any, weight_stride: Any, slots: Any, slot_dim: Any, num_slots: Any, sums: Any,
    exemplar: Any, num_heads: Any, width: Any,
) -> Any:  # fmt: skip
    """sums[h, :width] += sum_s weights[h, s] * slots[s, :width]; rows of slots and of sums are `slot_dim` long.

    Weights and sums are float32; rows of weights are `weight_stride` bytes apart; width in multiples of 8.
    """
    heads, num_vectors, is_bf16 = num_heads.literal_value, width.literal_value // 8, exemplar == types.uint16
    vector = ir.VectorType(_F32, 8)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weights_address, weight_bytes, slots_address, slot_dim, count, sums_address = args[:6]
        sum_bytes = builder.mul(slot_dim, _I64(4))
        sum_rows = [builder.add(sums_address, builder.mul(sum_bytes, _I64(h))) for h in range(heads)]
        weight_rows = [builder.add(weights_address, builder.mul(weight_bytes, _I64(h))) for h in range(heads)]

        def body(index: Any, values: list[Any]) -> list[Any]:
            place = builder.mul(index, _I64(4))
            weight = [_splat(builder, _load(builder, row, place, _F32), 8) for row in weight_rows]
            first = builder.mul(index, slot_dim)
            for j in range(num_vectors):
                value = _load_wide(builder, slots_address, builder.add(first, _I64(8 * j)), is_bf16)
                for h in range(heads):
                    place = h * num_vectors + j
                    values[place] = _fused_multiply_add(builder, weight[h], value, values[place])
            return values

        start = [_load(builder, row, _I64(32 * j), vector) for row in sum_rows for j in range(num_vectors)]
        for place, total in enumerate(_loop(builder, count, 1, start, body)):
            _store(builder, total, sum_rows[place // num_vectors], 32 * (place % num_vectors))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6, exemplar, num_heads, width), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Asks for the cache line at `address`; any address is allowed."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def pointer_to(typingctx: Any, address: Any, exemplar: Any) -> Any:
    """The address as a pointer to the exemplar's type, for `numba.carray`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(exemplar)(types.int64, exemplar), codegen


@intrinsic
def float_from_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 whose bits are the given int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.int32), codegen


@intrinsic
def widen(typingctx: Any, element: Any) -> Any:
    """A float32, or the bits of a bfloat16 as uint16, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if element != types.uint16:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _I32(16)), _F32)

    return types.float32(element), codegen


@intrinsic
def narrow(typingctx: Any, value: Any, exemplar: Any) -> Any:
    """A float32 as the exemplar's type; bfloat16 rounds to nearest even and keeps NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if exemplar != types.uint16:
            return args[0]
        bits = builder.bitcast(args[0], _I32)
        is_odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(is_odd, _I32(0x7FFF))), _I32(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, _I32(0x7FC0), rounded), _I16)

    return exemplar(types.float32, exemplar), codegen


@intrinsic
def item_bytes(typingctx: Any, exemplar: Any) -> Any:
    """Size of the exemplar's type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _I64(exemplar.bitwidth // 8)

    return types.int64(exemplar), codegen


@intrinsic
def atomic_add(typingctx: Any, address: Any, amount: Any) -> Any:
    """Adds to the int64 at `address`; returns what was there. Orders memory like a lock taken and released."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _I64.as_pointer()), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    """The int64 at `address`; what other threads wrote before they changed it can be read afterwards."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen
