# mypy: allow-untyped-defs, allow-incomplete-defs
"""Vectors in LLVM's own words, for loops that Numba's compiler does not make vectors of by itself.

`lanes` is a type of vector, `pointer` points to its first number; numbers need no alignment.
"""

from llvmlite import ir

CONTRACT = ("contract",)


def load_lanes(builder, pointer, lanes):
    """The vector that lies there."""
    return builder.load(builder.bitcast(pointer, lanes.as_pointer()), align=4)


def store_lanes(builder, values, pointer):
    """The inverse."""
    builder.store(values, builder.bitcast(pointer, values.type.as_pointer()), align=4)


def row_pointer(context, builder, kind, array, row=None):
    """Where a contiguous array begins, or row `row` of a matrix."""
    x = context.make_array(kind)(context, builder, array)
    if row is None:
        return x.data
    return builder.gep(x.data, [builder.mul(row, builder.extract_value(x.shape, 1))])


def splat(builder, x, lanes):
    """A number in every lane."""
    undefined = ir.Constant(lanes, ir.Undefined)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes.count), None)
    return builder.shuffle_vector(
        builder.insert_element(undefined, x, ir.IntType(32)(0)), undefined, zeros
    )


def sum_of_lanes(builder, values):
    """The sum of a vector's numbers, in whatever order is fast."""
    number = values.type.element
    name = f"llvm.vector.reduce.fadd.v{values.type.count}f{32 if number == ir.FloatType() else 64}"
    kind = ir.FunctionType(number, (number, values.type))
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, (ir.Constant(number, -0.0), values), fastmath=("reassoc",))


def add_product(builder, total, a, b):
    """total + a b, in one instruction where there is one."""
    return builder.fadd(total, builder.fmul(a, b, flags=CONTRACT), flags=CONTRACT)
